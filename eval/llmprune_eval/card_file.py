"""The Markdown card of a run, written anew from the files of its folder."""

from __future__ import annotations

from pathlib import Path

from llmprune.card import run_card
from llmprune.files import save_text
from llmprune_eval import bench_table, quality_report, report
from llmprune_eval.run_record import read_run

CARD = "README.md"


def write_card(folder: Path, out: Path | None = None) -> Path | None:
    """Write the card of a run folder: every table that the run has, how to load and repeat it.

    Args:
        folder: That prune wrote.
        out: The file; None for README.md in the folder.

    Returns:
        The file that was written; None where the run was not measured yet, and nothing is written.

    Raises:
        InputError: As `read_run`, or the disk is full.
    """
    run = read_run(folder)
    if run.report is None:
        return None
    quality, bench = run.evaluation, run.bench
    text = run_card(
        run.recipe,
        run.report.origin or run.recipe.model.source,
        run.report.samples,
        report.to_markdown(run.report),
        evaluation_table="" if quality is None else quality_report.to_markdown(quality),
        bench_table="" if bench is None else bench_table.to_markdown(bench),
    )
    file = folder / CARD if out is None else out
    file.parent.mkdir(parents=True, exist_ok=True)
    save_text(text, file)
    return file
