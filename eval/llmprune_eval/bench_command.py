"""The body of `llmprune bench`: which models, where results go, what is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from llmprune.display import progress_bars
from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.run_folder import RECIPE_FILE
from llmprune_eval.bench import BenchSettings, bench
from llmprune_eval.bench_report import BenchReport
from llmprune_eval.bench_table import notes_of, render_table
from llmprune_eval.results_of_run import on_the_page
from llmprune_eval.subjects import Dtype, Subject, subjects_of


def run_bench(
    source: str,
    settings: BenchSettings,
    *,
    against: str | None,
    dtype: Dtype | None,
    out: Path | None,
    console: Console | None,
) -> BenchReport:
    """Measure, save, and print the table and what to beware of.

    Args:
        source: A run folder, or any model.
        settings: What is measured.
        against: The model to compare with, in place of the recipe's dense one.
        dtype: Of all weights; None for the stored one.
        out: The file of results; None for bench.json in the folder of the run or model.
        console: Where the table goes; None prints the JSON instead.

    Raises:
        InputError: As `bench`, or the file can't be written.
    """
    subjects = bench_subjects(source, against, dtype)
    file = out or results_file(source, subjects[-1])
    loud = Console(stderr=True)
    with progress_bars(loud if console is None else console) as on_progress:
        report = bench(subjects, settings, on_progress)
    save_report(report, file)
    if console is None:
        print(report.to_json(), end="")
    else:
        console.print(render_table(report))
        for note in notes_of(report):
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        console.print(f"wrote {file}", soft_wrap=True)
        if out is None and (Path(source) / RECIPE_FILE).is_file():
            console.print(on_the_page(source), soft_wrap=True)
    for warning in report.warnings:
        loud.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)
    return report


def bench_subjects(source: str, against: str | None, dtype: Dtype | None) -> tuple[Subject, ...]:
    """The models that `llmprune bench` compares, first the one to compare with.

    Without `against` they are called dense and pruned, or model where there is one; with it against
    and model.

    Raises:
        InputError: There is no such model, or the run has none yet.
    """
    subjects, _ = subjects_of(source, against, dtype)
    if against is None:
        return subjects
    return tuple(
        replace(subject, label=label)
        for subject, label in zip(subjects, ("against", "model"), strict=True)
    )


def read_counts(name: str, text: str) -> tuple[int, ...]:
    """Counts with commas between them.

    Raises:
        InputError: One is no whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--{name} must be counts with commas, as 1,8, got {text!r}") from None


def results_file(source: str, subject: Subject) -> Path:
    """Where results go by default: bench.json in the folder of the run or model, else in runs/."""
    path = Path(source)
    if path.is_dir():
        return path / "bench.json"
    return Path("runs") / "bench" / f"{subject.name.replace('/', '--').replace(':', '-')}.json"


def save_report(report: BenchReport, file: Path) -> None:
    """Write a report as JSON.

    Raises:
        InputError: The place can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{file}: can't be written ({error.strerror}); choose --out") from error
    save_text(report.to_json(), file)
