"""TrainingLog: what log.jsonl tells of every step, ready to be drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_GATES = "gates"


class GateShares(NamedTuple):
    """Gates of one kind at one step: the share that is open, open by half, closed; their mean."""

    step: int
    open: float
    half_open: float
    closed: float
    mean: float


@dataclass(frozen=True)
class TrainingLog:
    """The steps of a run in the log's order; numbers that are not finite are left out.

    Attributes:
        losses: Phase (`gates`, `recovery`) -> (step, loss).
        budget: (step, share of the units that the calibration allowed).
        gates: Kind -> where its gates stood; empty for runs that were made before the log had it.
    """

    losses: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    budget: tuple[tuple[int, float], ...] = ()
    gates: Mapping[str, tuple[GateShares, ...]] = field(default_factory=dict)


def read_log(file: Path) -> TrainingLog:
    """Read a run's log; an empty one where there is no file."""
    losses: dict[str, list[tuple[int, float]]] = {}
    budget: list[tuple[int, float]] = []
    gates: dict[str, list[GateShares]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        row = _row(line)
        if row is None:
            continue
        step, phase = int(row["step"]), str(row["phase"])
        losses.setdefault(phase, []).append((step, float(row["loss"])))
        if phase == _GATES and "budget" in row:
            budget.append((step, float(row["budget"])))
        for kind, shares in _shares(row, step):
            gates.setdefault(kind, []).append(shares)
    return TrainingLog(
        {phase: tuple(rows) for phase, rows in losses.items()},
        tuple(budget),
        {kind: tuple(rows) for kind, rows in gates.items()},
    )


def _shares(row: Mapping[str, Any], step: int) -> Iterator[tuple[str, GateShares]]:
    """The kinds that a line tells of (`KIND_open` and three more), as `gate_figures` names them."""
    for key in row:
        kind = key.removesuffix("_half_open")
        names = [f"{kind}_{name}" for name in GateShares._fields[1:]]
        if kind != key and all(name in row for name in names):
            yield kind, GateShares(step, *(float(row[name]) for name in names))


def _row(line: str) -> dict[str, Any] | None:
    """One line of the log; None for the half of one that a kill left, or numbers that are none."""
    try:
        row = json.loads(line)
        step, numbers = int(row["step"]), [v for k, v in row.items() if k not in ("phase", "step")]
        is_whole = step >= 0 and "loss" in row and all(math.isfinite(v) for v in numbers)
        return {**row, "phase": str(row["phase"])} if is_whole else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
