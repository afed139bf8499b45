"""What `llmprune eval` found, in a run's report: paired differences of tasks, and its table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from llmprune_eval.markup import element
from llmprune_eval.page import absent, figure, legend, section, table
from llmprune_eval.pictures.differences import Paired, differences
from llmprune_eval.quality_report import columns_of, notes_of, table_rows

if TYPE_CHECKING:
    from llmprune_eval.markup import Markup
    from llmprune_eval.quality_report import QualityReport
    from llmprune_eval.run_record import RunRecord

_CAPTION = (
    "Both models on the same documents. Whisker: 95 % interval, from documents drawn anew in "
    "pairs; left of the dashed line the pruned model is worse."
)


def tasks_section(run: RunRecord) -> Markup:
    """The table of `llmprune eval`, and its tasks as a picture."""
    heading = "Evaluation on tasks"
    if run.evaluation is None:
        sentence = "This run was not evaluated on tasks; llmprune eval does so."
        return section(heading, absent(sentence))
    return section(heading, *_parts(run.evaluation))


def _parts(report: QualityReport) -> Iterator[Markup]:
    for warning in report.warnings:
        yield absent(f"Warning: {warning}.")
    paired = list(_paired(report))
    if paired:
        yield legend([("pruned", "the test decides"), ("undecided", "not conclusive")])
        yield figure(partial(differences, paired), _CAPTION)
    yield table("Figures of llmprune eval", columns_of(report), table_rows(report))
    yield element("ul", *(element("li", note) for note in notes_of(report)), class_="note")


def _paired(report: QualityReport) -> Iterator[Paired]:
    """Tasks that are compared document by document; ratios of perplexities are in the table."""
    for task in report.tasks:
        found = task.metrics[task.headline].difference
        if found is not None and found.kind == "difference":
            value, low, high = (100 * share for share in (found.value, found.low, found.high))
            yield Paired(task.name, value, low, high, found.conclusive)
