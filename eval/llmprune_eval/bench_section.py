"""What `llmprune bench` found, in a run's report: bars with spread, a pair a point; its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llmprune_eval.bench_report import PHASES
from llmprune_eval.bench_table import columns_of, notes_of, table_rows
from llmprune_eval.markup import element
from llmprune_eval.page import absent, folded, paragraph, side_by_side, small_figure, table
from llmprune_eval.pictures.latency_bars import Bar, latency_bars

if TYPE_CHECKING:
    from llmprune_eval.bench_report import BenchReport, Point
    from llmprune_eval.markup import Markup

# Points whose pictures are shown at once; those of the others are folded.
_MOST_POINTS = 4


def bench_parts(report: BenchReport) -> Iterator[Markup]:
    """Warnings, bars of every point and phase, the table, and how it was measured."""
    yield element("h3", "Measured by llmprune bench")
    for warning in report.warnings:
        yield absent(f"Warning: {warning}.")
    cells = [cell for point in report.points for cell in _cells(point)]
    shown = len(PHASES) * _MOST_POINTS
    yield side_by_side(cells[:shown])
    if cells[shown:]:
        more = len(report.points) - _MOST_POINTS
        yield folded(f"{more} more points", side_by_side(cells[shown:]))
    yield paragraph(
        f"Bar: median of {report.rounds} rounds in which the models take turns; whisker: the "
        "middle half of the rounds. In the table, what a ratio of times decides, with its 95 % "
        "interval from pairs within a round.",
        class_="note",
    )
    rows = [(_heading(row), *row[1:]) for row in table_rows(report)]
    yield table("Latency, memory and load time", columns_of(report), rows)
    yield element("ul", *(element("li", note) for note in notes_of(report)), class_="note")


def _heading(row: Sequence[str]) -> str:
    """The first cell of a row; that of a point, which stands alone, is strong."""
    return row[0] if any(row[1:]) else element("strong", row[0])


def _cells(point: Point) -> Iterator[Markup]:
    """A picture a phase, the models in the order of the table."""
    first = next(iter(point.models))
    for phase, title in PHASES.items():
        name = f"{title}, {point.name}"
        bars = []
        for label, model in point.models.items():
            times = getattr(model, phase).ms
            class_ = "dense" if label == first else "pruned"
            bars.append(Bar(label, class_, times.median, *times.quartiles))
        yield small_figure(partial(latency_bars, name, bars), name)
