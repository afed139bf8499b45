"""Comparison: methods side by side in blocks of one model, budget and text; JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmprune_eval.perplexity_intervals import paired_ratio
from llmprune_eval.stored_results import Result, Stage

COMPARISON_FORMAT = "llmprune-comparison/1"
STAGES: tuple[Stage, ...] = ("compensated", "refit", "recovered")


@dataclass(frozen=True)
class Seeded:
    """The results of one method in one stage: the recipe's own seed first, then further ones."""

    results: tuple[Result, ...]

    @property
    def values(self) -> list[float]:
        """Perplexity of every seed."""
        return [result.value for result in self.results if result.value is not None]

    @property
    def mean(self) -> float | None:
        """Mean perplexity over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One method of a block; `final` is its last stage on more windows."""

    method: str
    label: str
    is_control: bool
    stages: dict[Stage, Seeded]
    final: Result | None = None

    def mean(self, stage: Stage) -> float | None:
        """Mean perplexity in a stage; None where it was not measured."""
        return self.stages[stage].mean if stage in self.stages else None

    @property
    def last(self) -> Stage | None:
        """The last stage with a figure."""
        return next((s for s in reversed(STAGES) if self.mean(s) is not None), None)

    @property
    def result(self) -> Result | None:
        """The result of the furthest stage that was tried, for all but perplexity."""
        tried = [stage for stage in STAGES if stage in self.stages]
        return self.stages[tried[-1]].results[0] if tried else None


@dataclass(frozen=True)
class BlockTable:
    """One recipe's methods, and the dense model on the same windows.

    `in_domain`: calibration used the corpus that is measured on.
    """

    name: str
    text: str
    in_domain: bool
    calibration: str
    budget: str
    dense: Result | None
    dense_final: Result | None
    rows: tuple[Row, ...]

    def ranked(self, stage: Stage) -> list[Row]:
        """Rows with a figure in a stage, best first."""
        return sorted((r for r in self.rows if r.mean(stage)), key=lambda r: r.mean(stage) or 0.0)

    @property
    def stages(self) -> list[Stage]:
        """Stages that any row has a figure in."""
        return [stage for stage in STAGES if self.ranked(stage)]


@dataclass(frozen=True)
class Comparison:
    """All blocks, and the command that repeats them."""

    blocks: tuple[BlockTable, ...]
    command: str = ""

    def to_json(self) -> str:
        """Every figure of every block, the NLLs of windows aside (they are in results/)."""
        data = {
            "format": COMPARISON_FORMAT,
            "command": self.command,
            "blocks": [_block(block) for block in self.blocks],
        }
        return json.dumps(data, indent=1) + "\n"

    def to_markdown(self) -> str:
        """A table a block, a sentence that says who leads by how much, and how it was measured."""
        parts = ["# Comparison of methods", ""]
        for block in self.blocks:
            parts += [*_section(block), ""]
        parts += _notes(self)
        return "\n".join(parts) + "\n"


def _block(block: BlockTable) -> dict[str, Any]:
    return {
        "name": block.name,
        "text": block.text,
        "in_domain": block.in_domain,
        "calibration": block.calibration,
        "budget": block.budget,
        "dense": _figures(block.dense),
        "dense_final": _figures(block.dense_final),
        "rows": [
            {
                "method": row.method,
                "label": row.label,
                "is_control": row.is_control,
                "stages": {
                    stage: {
                        "mean": seeded.mean,
                        "spread": seeded.spread,
                        "seeds": [_figures(result) for result in seeded.results],
                    }
                    for stage, seeded in row.stages.items()
                },
                "final": _figures(row.final),
            }
            for row in block.rows
        ],
    }


def _figures(result: Result | None) -> dict[str, Any] | None:
    if result is None:
        return None
    found = result.perplexity
    text = None
    if found is not None:
        text = {
            "perplexity": found.value,
            "nll_mean": found.nll_mean,
            "nll_stderr": found.nll_stderr,
            "num_windows": found.num_windows,
            "window": found.window,
            "num_tokens": found.num_tokens,
        }
    return {
        **(text or {"refused": result.refused}),
        "removed": result.removed,
        "parameters": result.parameters,
        "units": dict(result.units),
        "tokens": dict(result.tokens),
        "seconds": dict(result.seconds),
        "is_partial_time": result.is_partial_time,
        "environment": dict(result.environment),
    }


def _section(block: BlockTable) -> list[str]:
    mark = " (in-domain)" if block.in_domain else ""
    lines = [f"## {block.name}", ""]
    lines.append(
        f"Perplexity of {block.text}{mark}; calibrated on {block.calibration}; to remove: "
        f"{block.budget}."
    )
    stages = block.stages
    has_final = any(row.final for row in block.rows)
    columns = ["method", "tokens", "gate-training tokens", "seconds", "removed", "of which"]
    columns += [*stages, *(["final"] if has_final else []), "/ dense"]
    lines += ["", _line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    lines.append(_line(_dense_cells(block, has_final)))
    best = {stage: ranked[0].method for stage in stages if (ranked := block.ranked(stage))}
    finals = {row.method: row.final.value for row in block.rows if row.final and row.final.value}
    best_final = min(finals, key=lambda method: finals[method]) if finals else None
    for row in _in_order(block):
        cells = [row.label, *_effort_cells(row.result)]
        cells += [_bold(_seeded_cell(row, s), best.get(s) == row.method) for s in stages]
        if has_final:
            cells.append(_bold(_value(row.final), best_final == row.method))
        lines.append(_line([*cells, _ratio_cell(block, row)]))
    lines += ["", *_refusals(block), *_sentences(block), *_devices(block)]
    return lines


def _in_order(block: BlockTable) -> list[Row]:
    """SequentialAttention++ and baselines by their last figure, controls after them."""

    def place(row: Row) -> tuple[bool, int, float]:
        last = row.last
        depth = -STAGES.index(last) if last else 1
        return row.is_control, depth, (row.mean(last) if last else None) or 0.0

    return sorted(block.rows, key=place)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _bold(cell: str, is_best: bool) -> str:
    return f"**{cell}**" if is_best else cell


def _value(result: Result | None) -> str:
    return "" if result is None or result.value is None else f"{result.value:.2f}"


def _dense_cells(block: BlockTable, has_final: bool) -> list[str]:
    figures = [_value(block.dense)] * len(block.stages)
    figures += [_value(block.dense_final)] if has_final else []
    return ["dense", "", "", "", "", "", *figures, "1"]


def _effort_cells(result: Result | None) -> list[str]:
    """Tokens to score, tokens to train gates, seconds of all steps, share removed, of which."""
    if result is None or not result.units:
        return ["", "", "", "", ""]
    seconds = sum(value for step, value in result.seconds.items() if step != "evaluation")
    mark = "> " if result.is_partial_time else ""
    units = ", ".join(
        f"{kind} {gone / total:.1%}" for kind, (gone, total) in result.units.items() if total
    )
    return [
        _count(result.tokens.get("scores", 0)),
        _count(result.tokens.get("gates", 0)),
        f"{mark}{seconds:.0f}",
        f"{result.removed:.2%}",
        units,
    ]


def _count(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "0"


def _seeded_cell(row: Row, stage: Stage) -> str:
    mean = row.mean(stage)
    if mean is None:
        return ""
    seeded = row.stages[stage]
    if seeded.spread is None:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {seeded.spread:.2f} ({len(seeded.values)})"


def _ratio_cell(block: BlockTable, row: Row) -> str:
    """The furthest figure over the dense model's on the same windows."""
    if row.final and row.final.value and block.dense_final and block.dense_final.value:
        return f"{row.final.value / block.dense_final.value:.3f} (final)"
    value = row.mean(row.last) if row.last else None
    if value is None or block.dense is None or block.dense.value is None:
        return ""
    return f"{value / block.dense.value:.3f} ({row.last})"


def _refusals(block: BlockTable) -> list[str]:
    refused = [(row.label, row.result.refused) for row in block.rows if row.result]
    lines = [f"- {label}: no figure: {' '.join(why.split())}" for label, why in refused if why]
    return [*lines, ""] if lines else []


def _sentences(block: BlockTable) -> list[str]:
    """Who leads in each stage and by how much, in the data's own words."""
    return [sentence for stage in block.stages if (sentence := _sentence(block, stage))]


def _sentence(block: BlockTable, stage: Stage) -> str:
    ranked = [row for row in block.ranked(stage) if not row.is_control]
    if not ranked:
        return ""
    first = ranked[0]
    place = f"best of {len(ranked)}" if len(ranked) > 1 else "the only method measured,"
    text = f"- {stage}: {first.label} is {place} with {first.mean(stage):.2f}"
    own = next((row for row in ranked if row.method == "sequential_attention"), None)
    if own is not None and own is not first:
        rank = ranked.index(own) + 1
        text += f"; {own.label} is number {rank} with {_against(first, own, stage)}"
    elif len(ranked) > 1:
        text += f"; next is {ranked[1].label} with {_against(first, ranked[1], stage)}"
    for row in block.ranked(stage):
        if row.is_control:
            verb = "better" if (row.mean(stage) or 0) < (first.mean(stage) or 0) else "not better"
            text += f"; {row.label}: {row.mean(stage):.2f}, {verb} than the best"
    return text + "."


def _devices(block: BlockTable) -> list[str]:
    """Who was measured on which device; nothing where all were on one."""
    measured: dict[str, list[Result | None]] = {"dense": [block.dense, block.dense_final]}
    for row in block.rows:
        seeded = [result for stage in row.stages.values() for result in stage.results]
        measured[row.label] = [*seeded, row.final]
    found: dict[str, list[str]] = {}
    for label, results in measured.items():
        names = [str(r.environment.get("device", "not recorded")) for r in results if r is not None]
        for name in dict.fromkeys(names):
            found.setdefault(name, []).append(label)
    if len(found) < 2:
        return []
    each = "; ".join(f"on {name}: {', '.join(labels)}" for name, labels in found.items())
    return [f"- several devices, seconds compare only within one; {each}."]


def _against(best: Row, other: Row, stage: Stage) -> str:
    """Another row's figure, and its ratio to the best with a paired interval."""
    text = f"{other.mean(stage):.2f}"
    one, two = best.stages[stage].results[0], other.stages[stage].results[0]
    if one.perplexity is None or two.perplexity is None:
        return text
    ratio = paired_ratio(one.perplexity, two.perplexity)
    if ratio.low is None or ratio.high is None:
        return f"{text} ({ratio.value:.3f} times as much, one window, not conclusive)"
    mark = "" if ratio.conclusive else ", not conclusive"
    return f"{text} ({ratio.value:.3f} times as much, {ratio.low:.3f} to {ratio.high:.3f}{mark})"


def _notes(comparison: Comparison) -> list[str]:
    """How it was measured, on what, and how to repeat it."""
    lines = ["## How", ""]
    lines += [
        "- compensated: cut, the means of removed units left as biases; refit: least squares after "
        "that; recovered: trained after that, equal tokens for every method",
        "- tokens: calibration tokens that scoring reads; seconds: scoring, cut, refit and "
        "recovery, a pass that several methods share counted for each; >: a killed run's are lost",
        "- removed: share of the decoder's parameters; of which: share of the units of each kind",
        "- mean ± standard deviation (seeds): other seeds draw other rows; / dense: the furthest "
        "figure of the row, its stage in brackets, over the dense model's on its windows: only "
        "equal stages compare",
        "- (low to high): 95 % interval of the first seed, paired by windows; not conclusive: it "
        "holds 1",
    ]
    if any(block.in_domain for block in comparison.blocks):
        lines.append("- in-domain: calibration used the corpus that is measured on")
    for block in comparison.blocks:
        for label, result in (("", block.dense), (", final", block.dense_final)):
            if result is not None and result.perplexity is not None:
                found = result.perplexity
                lines.append(
                    f"- {block.name}{label}: {found.num_windows} windows of {found.window}, "
                    f"{found.num_tokens} scored tokens, float32"
                )
    lines += [f"- measured with {machine}" for machine in _machines(comparison)]
    if comparison.command:
        lines += ["", "```", comparison.command, "```"]
    return lines


def _machines(comparison: Comparison) -> list[str]:
    """Every machine and set of versions that figures come from, with the days."""
    days: dict[str, set[str]] = {}
    for block in comparison.blocks:
        results = [block.dense, block.dense_final, *(row.final for row in block.rows)]
        for row in block.rows:
            results += [r for seeded in row.stages.values() for r in seeded.results]
        for result in results:
            if result is not None:
                found = dict(result.environment)
                day = str(found.pop("date", ""))
                words = "; ".join(f"{key} {value}" for key, value in found.items())
                days.setdefault(words, set()).add(day)
    return [f"{words}; {' and '.join(sorted(days[words]))}" for words in sorted(days)]
