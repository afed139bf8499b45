"""The table of a BenchReport, for a terminal and as Markdown, and the notes below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmprune_eval.bench_report import (
    PHASES,
    BenchReport,
    Comparison,
    Phase,
    Point,
    Times,
    ratio_text,
)

if TYPE_CHECKING:
    from rich.table import Table


def render_table(report: BenchReport) -> Table:
    """The report as a rich table: a column a model, and one a comparison with the first."""
    from rich.table import Table

    label, *columns = columns_of(report)
    table = Table(label)
    for column in columns:
        table.add_column(column, justify="right")
    for row in _model_rows(report):
        table.add_row(row.label, *row.values, *row.ratios)
    for point in report.points:
        table.add_section()
        table.add_row(point.name)
        for row in _point_rows(point):
            table.add_row(row.label, *row.values, *row.ratios)
    return table


def to_markdown(report: BenchReport) -> str:
    """Warnings, the table and its notes as GitHub Markdown."""
    columns = columns_of(report)
    lines = [columns, ("---", *["---:"] * (len(columns) - 1))]
    # a point's name stands alone in its row
    lines += [row if any(row[1:]) else (f"**{row[0]}**", *row[1:]) for row in table_rows(report)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    warnings = [f"**WARNING: {warning}**\n" for warning in report.warnings]
    return "\n".join([*warnings, *table, "", *(f"- {note}" for note in notes_of(report))]) + "\n"


def columns_of(report: BenchReport) -> tuple[str, ...]:
    """The heads of the table: a column a model, and one a comparison with the first."""
    first, *others = report.models
    return ("", first, *others, *(f"{label} / {first}" for label in others))


def table_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """The rows of the table as text, each as wide as `columns_of`; a point's name is a row."""
    width = len(columns_of(report))
    rows = [(row.label, *row.values, *row.ratios) for row in _model_rows(report)]
    for point in report.points:
        rows.append((point.name,))
        rows += [(row.label.strip(), *row.values, *row.ratios) for row in _point_rows(point)]
    return [(*row, *[""] * (width - len(row))) for row in rows]


def notes_of(report: BenchReport) -> list[str]:
    """How it was measured, and on what."""
    names = [
        f"{label}: {facts.name}, {facts.form}, {facts.dtype}, attention {facts.attention}"
        for label, facts in report.models.items()
    ]
    rates = next(iter(report.models.values())).rates
    notes = [
        *names,
        f"batch x context tokens, then {report.new_tokens} steps; medians of {report.rounds} "
        "rounds (quartiles); ratios of times are paired by round, with a 95 % interval; peak "
        "memory is the model's share",
        f"roofline: {rates.flops_per_s / 1e9:.0f} GFLOP/s and {rates.bytes_per_s / 1e9:.1f} GB/s "
        "measured at the start (of the first model); the share of the median that it explains",
    ]
    if report.backend == "compile":
        notes.append(
            "compile: torch.compile with a KV cache of fixed size, on a GPU as CUDA graphs; peak "
            "memory is of eager"
        )
    for point in report.points:
        for label, model in point.models.items():
            notes += [f"{point.name}, {label}: {note}" for note in model.backends]
    environment = "; ".join(f"{key} {value}" for key, value in report.environment.items())
    return [*notes, environment]


class _Row(NamedTuple):
    label: str
    values: list[str]
    ratios: list[str]


def _model_rows(report: BenchReport) -> list[_Row]:
    facts = list(report.models.values())
    return [
        _counts(
            "parameters",
            [f"{f.parameters / 1e6:.2f} M" for f in facts],
            [f.parameters for f in facts],
        ),
        _counts(
            "weights on disk",
            [_mib(f.weight_bytes) for f in facts],
            [f.weight_bytes for f in facts],
        ),
        _counts(
            "load time",
            [f"{f.load_s.median:.2f} s" for f in facts],
            [f.load_s.median for f in facts],
        ),
    ]


def _point_rows(point: Point) -> list[_Row]:
    models = list(point.models.values())
    compared = list(point.comparisons.values())
    rows = []
    for phase, title in PHASES.items():
        phases: list[Phase] = [getattr(model, phase) for model in models]
        found: list[Comparison] = [getattr(comparison, phase) for comparison in compared]
        rows += [
            _Row(f"  {title}", [_times(p.ms) for p in phases], [_cell(c) for c in found]),
            _Row("    roofline", [_share(p) for p in phases], [f"{c.roofline:.3f}" for c in found]),
        ]
        if point.control is not None:
            control: Comparison = getattr(point.control, phase)
            rows.append(_Row("    against itself", [_cell(control)], []))
    speeds = [f"{model.decode_tokens_per_s:.1f}" for model in models]
    rows.append(_Row("  tokens a second", speeds, []))
    memory = [model.peak_memory for model in models]
    shares = [None if peak is None else peak.model_bytes for peak in memory]
    if None not in shares:
        known = [share for share in shares if share is not None]
        rows.append(_counts("  peak memory", [_mib(share) for share in known], known))
    return rows


def _counts(label: str, shown: list[str], values: Sequence[float]) -> _Row:
    first, *others = values
    return _Row(label, shown, [f"{other / first:.3f}" if first else "" for other in others])


def _times(times: Times) -> str:
    return f"{times.median:.1f} ms ({times.quartiles[0]:.1f} to {times.quartiles[1]:.1f})"


def _share(phase: Phase) -> str:
    return f"{phase.roofline_ms:.1f} ms, {phase.roofline_ms / phase.ms.median:.0%}"


def _cell(comparison: Comparison) -> str:
    ratio = comparison.ratio
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} {comparison.verdict}"
    return f"{ratio_text(ratio)} {comparison.verdict}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
