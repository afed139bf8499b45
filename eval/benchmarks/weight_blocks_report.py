"""The tables of weight_blocks.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from weight_blocks_cases import (
    ACDC_STEPS,
    METHODS,
    NUM_ROWS,
    OURS,
    RECOVERY_STEPS,
    REFIT_ROWS,
    STAGES,
    Case,
    all_cases,
    file_of,
)

from llmprune_eval.perplexity import Perplexity
from llmprune_eval.perplexity_intervals import paired_ratio


@dataclass(frozen=True)
class Found:
    """What a stage gave."""

    perplexity: Perplexity
    seconds: int
    about: str


Column = tuple[tuple[int, int], float]


def read(arguments: argparse.Namespace) -> dict[str, dict[Case, Found]]:
    """All figures that are there, by stage."""
    found: dict[str, dict[Case, Found]] = {stage: {} for stage in STAGES}
    for case in all_cases():
        for stage in case.stages:
            file = file_of(case, stage, arguments)
            if file.is_file():
                data = json.loads(file.read_text())
                about = "; ".join(f"{key} {value}" for key, value in data["environment"].items())
                perplexity = Perplexity(**data["perplexity"])
                found[stage][case] = Found(perplexity, data["seconds"], about)
    return found


def report(found: dict[str, dict[Case, Found]], dense: Perplexity) -> str:
    """Markdown of all that is there."""
    abouts = sorted({one.about for stage in found.values() for one in stage.values()})
    lines = [
        "# Which weight blocks to keep: SmolLM2-135M-Instruct",
        "",
        f"Perplexity of wiki.test.raw, first {dense.num_windows} windows of {dense.window} tokens, "
        f"float32 (dense {dense.value:.2f}). Blocks of the MLPs' three projections become zero, "
        f"equally many in every block row. All methods score on the same {NUM_ROWS} rows of 512 "
        "tokens of wiki.train (in-domain); SequentialAttention++ also takes 40 gate steps of 2 of "
        "these rows, all weights fixed. One seed. 128x32 does not divide down_proj, whose blocks "
        "are 64x64 there.",
        "",
    ]
    for stage, title in TITLES.items():
        if rows := found[stage]:
            lines += [f"## {title[0]}", "", *title[1:], *_table(rows), "", *_ratios(rows), ""]
    lines += [
        "Seconds are of the stage alone, beside whatever else the machine did. Made by "
        f"`{COMMAND}`.",
        "",
        *(f"- {about}" for about in abouts),
        "",
    ]
    return "\n".join(lines)


COMMAND = "python eval/benchmarks/weight_blocks.py"
TITLES = {
    "choice": (
        "Choice alone: no weight is changed",
        "So many blocks at once, and nothing done about it, is more than the model survives: no "
        "figure here is of a model to use. They say who breaks it less.",
        "",
    ),
    "refit": (
        "After the refit",
        f"What stays of every projection is refitted by least squares on {REFIT_ROWS} rows, layer "
        "by layer, to what the dense layer makes of the same stream (`reconstruction`).",
        "",
    ),
    "recovered": (
        "After training",
        f"{RECOVERY_STEPS} steps of one row (distillation, all weights) after each refit. "
        f"ACDC-style and the way in which weights learn along train in all their {ACDC_STEPS} "
        "steps, as many rows as gate and recovery steps of SequentialAttention++ together, and "
        "have no refit; in the first magnitude masks close three times, in the second gates shrink "
        "once.",
        "",
    ),
}


def _columns(rows: dict[Case, Found]) -> list[Column]:
    return sorted({(row.block, row.sparsity) for row in rows}, key=lambda c: (c[1], c[0]))


def _table(rows: dict[Case, Found]) -> list[str]:
    columns = _columns(rows)
    heads = " | ".join(f"{b[0]}x{b[1]}, {s:.0%} zero" for b, s in columns)
    lines = [f"| method | {heads} | seconds |", "|---|" + "---:|" * (len(columns) + 1)]
    by_column = {c: _of_column(rows, c) for c in columns}
    for method, label in METHODS.items():
        own = [by_column[column].get(method) for column in columns]
        times = sorted(one.seconds for one in own if one)
        if not times:
            continue
        # nobody is best alone
        least = [
            min(v.perplexity.value for v in by_column[c].values())
            if len(by_column[c]) > 1
            else None
            for c in columns
        ]
        cells = []
        for one, best in zip(own, least, strict=True):
            shown = "" if one is None else f"{one.perplexity.value:.2f}"
            is_best = one is not None and one.perplexity.value == best
            cells.append(f"**{shown}**" if is_best else shown)
        lines.append(f"| {label} | {' | '.join(cells)} | {times[0]} to {times[-1]} |")
    return lines


def _of_column(rows: dict[Case, Found], column: Column) -> dict[str, Found]:
    return {r.method: v for r, v in rows.items() if (r.block, r.sparsity) == column}


def _ratios(rows: dict[Case, Found]) -> list[str]:
    """The best of SequentialAttention++ over the best of the others, with a paired interval."""
    lines = []
    for block, sparsity in _columns(rows):
        others = _of_column(rows, (block, sparsity))
        own = [others.pop(name) for name in OURS if name in others]
        if not own or not others:
            continue
        ours = min(own, key=lambda one: one.perplexity.value)
        name, best = min(others.items(), key=lambda pair: pair[1].perplexity.value)
        ratio = paired_ratio(best.perplexity, ours.perplexity)
        interval = f"{_number(ratio.low)} to {_number(ratio.high)}"
        lines.append(
            f"- {block[0]}x{block[1]}, {sparsity:.0%}: SequentialAttention++ has "
            f"{_number(ratio.value)} ({interval}) times the perplexity of {METHODS[name]}, the "
            "best of the others."
        )
    return lines


def _number(ratio: float) -> str:
    """Three decimals, or as many digits where these would be zeros."""
    return f"{ratio:.3f}" if ratio >= 0.01 else f"{ratio:.1e}"
