"""The record of one GPU run: rows, ceilings and what was left out; as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmprune_kernels.tiles import Problem
from llmprune_kernels.timing import Timing

HEADER = ("layer", "block", "d", "M", "what", "us", "range", "TB/s", "TFLOP/s", "x dense", "x same")


@dataclass(frozen=True)
class Row:
    """One time: `name` is what ran ("dense", "decode", ...), `section` the table it belongs to."""

    section: str
    problem: Problem
    name: str
    timing: Timing
    detail: str = ""
    date: str = ""

    def products(self) -> int:
        """Dense layers' worth of products that it computes: two for a gated pair."""
        return 2 if self.section == "gated" else 1

    def tb_s(self) -> float:
        """Terabytes of stored blocks a second."""
        return self.products() * self.problem.stored_bytes / self.timing.median_us / 1e6

    def tflop_s(self) -> float:
        """Teraflops of stored blocks a second."""
        flops = 2 * self.problem.tokens * self.problem.stored
        return self.products() * flops / self.timing.median_us / 1e6


@dataclass
class Report:
    """Everything a run found; written whole at any time."""

    device: str
    versions: dict[str, str]
    date: str
    checks: list[dict[str, str]] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def keep_others(self, folder: Path, sections: Collection[str]) -> None:
        """Take the rows of all other sections from the device's file, where there is one.

        Raises:
            ValueError: It was written with other versions, whose times do not belong beside these.
        """
        path = folder / f"{self._slug}.json"
        if not path.exists():
            return
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["versions"] != self.versions:
            raise ValueError(
                f"{path} has times of {old['versions']}, here is {self.versions}: time all sections"
            )
        for row in old["rows"]:
            if row["section"] not in sections:
                self.rows.append(_row_of(row, old["date"]))

    @property
    def _slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @property
    def failures(self) -> list[dict[str, str]]:
        """Checks that failed."""
        return [check for check in self.checks if check["problem"]]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `<device>.json` and `<device>.md`, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / f"{self._slug}.json", folder / f"{self._slug}.md"
        _replace(paths[0], json.dumps(self.to_json(), indent=1) + "\n")
        _replace(paths[1], self.to_markdown())
        return paths

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [
            {
                "section": row.section,
                "name": row.name,
                "detail": row.detail,
                **asdict(row.problem) | {"dtype": str(row.problem.dtype)},
                **asdict(row.timing),
                "date": row.date or self.date,
            }
            for row in self.rows
        ]
        return {
            "device": self.device,
            "versions": self.versions,
            "date": self.date,
            "ceilings": self.ceilings,
            "checks": self.checks,
            "rows": rows,
            "left_out": self.left_out,
        }

    def to_markdown(self) -> str:
        """A page: what was checked, the ceilings, one table for every section, what is missing."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parts = [f"# {self.device}", f"{self.date}; {versions}; clocks as they were.", ""]
        parts.append(
            f"{len(self.checks) - len(self.failures)} of {len(self.checks)} checks against float64 "
            "passed."
        )
        parts += [f"- FAILED {check['case']}: {check['problem']}" for check in self.failures]
        parts += [f"- {name}: {value:.3g}" for name, value in self.ceilings.items()]
        for section in dict.fromkeys(row.section for row in self.rows):
            dates = {row.date or self.date for row in self.rows if row.section == section}
            parts += ["", f"## {section}", ""]
            if dates != {self.date}:
                parts += [f"Of {', '.join(sorted(dates))}.", ""]
            parts += [_line(HEADER), _line(["---"] * len(HEADER))]
            parts += [self._row(row) for row in self.rows if row.section == section]
        if self.left_out:
            parts += ["", "## Left out", "", *(f"- {what}" for what in self.left_out)]
        return "\n".join(parts) + "\n"

    def _row(self, row: Row) -> str:
        problem, timing = row.problem, row.timing
        return _line(
            [
                f"{problem.out_features}x{problem.in_features}",
                f"{problem.block[0]}x{problem.block[1]}",
                f"{problem.density:g}",
                str(problem.tokens),
                f"{row.name} {row.detail}".strip(),
                f"{timing.median_us:.1f}",
                f"{timing.fastest_us:.1f}-{timing.slowest_us:.1f}",
                # a dense layer reads and computes more than the stored blocks
                *(
                    ("", "")
                    if row.name == "dense"
                    else (f"{row.tb_s():.2f}", f"{row.tflop_s():.0f}")
                ),
                self._ratio(row, "dense"),
                self._ratio(row, "shrunk"),
            ]
        )

    def _ratio(self, row: Row, name: str) -> str:
        for other in self.rows:
            if (other.section, other.problem, other.name) == (row.section, row.problem, name):
                return f"{other.timing.median_us / row.timing.median_us:.2f}"
        return ""


def _row_of(data: dict[str, Any], date: str) -> Row:
    """A row as `to_json` wrote it; `date` where it has none of its own."""
    problem = Problem(
        tokens=data["tokens"],
        out_features=data["out_features"],
        in_features=data["in_features"],
        density=data["density"],
        block=(data["block"][0], data["block"][1]),
        dtype=getattr(torch, data["dtype"].removeprefix("torch.")),
    )
    timing = Timing(data["median_us"], data["fastest_us"], data["slowest_us"])
    detail, date = data.get("detail", ""), data.get("date") or date
    return Row(data["section"], problem, data["name"], timing, detail, date)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
