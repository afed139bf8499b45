"""evaluate_quality: perplexity and lm-eval tasks of one model, or of two on the same documents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.errors import InputError
from llmprune.recipe import PerplexityTask, Recipe
from llmprune.texts import read_texts, text_name
from llmprune_eval.data_files import MissingRowsError, all_missing
from llmprune_eval.documents import encode_documents
from llmprune_eval.evaluation import different_texts
from llmprune_eval.figures import Outcome, judge, measured_figures, task_figures, text_figures
from llmprune_eval.perplexity import measure_perplexity
from llmprune_eval.quality_report import ModelLine, QualityReport
from llmprune_eval.report import environment
from llmprune_eval.subjects import Subject
from llmprune_eval.suite import BATCH_SIZE, Suite
from llmprune_eval.task_scores import TaskScores

if TYPE_CHECKING:
    from llmprune.sources import LoadedModel
    from llmprune_eval.harness import PreparedTask

# task, done, of how many
OnProgress = Callable[[str, int, int], None]
INSTALL = 'pip install "llmprune[eval]"'


@dataclass(frozen=True)
class Extent:
    """What is measured: texts for perplexity, lm-eval tasks, and where their rows lie.

    `data` is a folder of local files; None takes every data set from the Hub.
    """

    texts: tuple[PerplexityTask, ...] = ()
    suite: Suite | None = None
    data: Path | None = None


@dataclass(frozen=True)
class _Work:
    """What is to be done for each model."""

    texts: tuple[PerplexityTask, ...]
    tasks: tuple[PreparedTask, ...]
    batch_size: int
    device: str
    out: Path
    on_progress: OnProgress

    def scores_file(self, subject: Subject, task: PreparedTask) -> Path:
        return self.out / subject.label / f"{task.name}.json"


def evaluate_quality(
    subjects: tuple[Subject, ...],
    extent: Extent,
    out: Path,
    *,
    recipe: Recipe | None = None,
    on_progress: OnProgress,
) -> QualityReport:
    """Measure one model, or the dense and the pruned one, one after the other.

    Scores and lm-eval's own files go to `out`/LABEL; a task that is stored there of the same
    model, rows, limit, shots and version is not run again.

    Args:
        subjects: From `subjects_of`.
        extent: What to measure.
        out: Folder of results; made where it isn't there.
        recipe: Of the run; its calibration text marks what is in-domain, and its published figures
            are compared with the dense model's.
        on_progress: Called with a task's name as it proceeds.

    Raises:
        InputError: A model, text, task or data file can't be had; lm-eval is not installed.
    """
    suite, texts = extent.suite, different_texts(extent.texts)
    fingerprints = {subject.label: subject.fingerprint() for subject in subjects}
    found: dict[str, Outcome] = {}
    with ExitStack() as stack:
        tasks = () if suite is None else _prepare(suite, extent.data, stack)
        batch_size = BATCH_SIZE if suite is None else suite.batch_size
        machine = _environment(with_harness=suite is not None)
        work = _Work(texts, tasks, batch_size, str(machine["device"]), out, on_progress)
        _check_data(subjects, fingerprints, work)
        for subject in subjects:
            found[subject.label] = _measure(subject, fingerprints[subject.label], work)
    text_rows = tuple(text_figures(i, task, found, recipe) for i, task in enumerate(texts))
    task_rows = tuple(
        task_figures(name, task, found) for name, task in (suite.tasks if suite else {}).items()
    )
    warnings, notes = judge(recipe, suite, measured_figures(text_rows, task_rows, texts))
    return QualityReport(
        environment=machine,
        models={label: outcome.line for label, outcome in found.items()},
        warnings=tuple(warnings),
        texts=text_rows,
        tasks=task_rows,
        notes=tuple(notes),
    )


def _prepare(suite: Suite, data: Path | None, stack: ExitStack) -> tuple[PreparedTask, ...]:
    """Every task's YAML and rows, so that what is wrong with them shows before a model is read."""
    try:
        from llmprune_eval.harness import PreparedTask
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise InputError(f"tasks need lm-eval, which is not installed; {INSTALL}") from error
    prepared: list[PreparedTask] = []
    missing: list[MissingRowsError] = []
    for name, task in suite.tasks.items():
        try:
            prepared.append(stack.enter_context(PreparedTask(name, task, data)))
        except MissingRowsError as error:
            missing.append(error)
    if missing:
        raise all_missing(missing, [task.name for task in prepared])
    return tuple(prepared)


def _check_data(subjects: tuple[Subject, ...], fingerprints: dict[str, str], work: _Work) -> None:
    """Ask the Hub for the data of every task that will be run."""
    for task in work.tasks:
        for subject in subjects:
            key = task.key(fingerprints[subject.label], work.device)
            if TaskScores.read_if_same(work.scores_file(subject, task), key) is None:
                task.check_data()
                break


def _measure(subject: Subject, fingerprint: str, work: _Work) -> Outcome:
    work.on_progress(f"load {subject.label}", 0, 1)
    loaded = subject.load()
    work.on_progress(f"load {subject.label}", 1, 1)
    encoded = [encode_documents(read_texts(task), loaded.tokenizer) for task in work.texts]
    perplexities = tuple(
        measure_perplexity(
            loaded.model,
            token_ids,
            window=task.window,
            max_windows=task.max_windows,
            documents=documents,
            on_window=partial(work.on_progress, f"{text_name(task)}, {subject.label}"),
        )
        for task, (token_ids, documents) in zip(work.texts, encoded, strict=True)
    )
    scores = {task.name: _score(subject, fingerprint, loaded, task, work) for task in work.tasks}
    line = ModelLine(
        name=subject.name,
        fingerprint=fingerprint,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
    )
    return Outcome(line, tuple(ids for ids, _ in encoded), perplexities, scores)


def _score(
    subject: Subject, fingerprint: str, loaded: LoadedModel, task: PreparedTask, work: _Work
) -> TaskScores:
    """A task's scores, stored or run now."""
    from llmprune_eval.harness import run_task, save_results, scores_of

    key, file = task.key(fingerprint, work.device), work.scores_file(subject, task)
    stored = TaskScores.read_if_same(file, key)
    if stored is not None:
        return stored
    results = run_task(
        task,
        loaded.model,
        loaded.tokenizer,
        batch_size=task.task.batch_size or work.batch_size,
        on_request=partial(work.on_progress, f"{task.name}, {subject.label}"),
    )
    scores = scores_of(results, key)
    make_folder(file.parent)
    save_results(results, file.parent, task.name)
    scores.save(file)
    return scores


def make_folder(path: Path) -> None:
    """Make a folder of results.

    Raises:
        InputError: It can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: results can't be written there ({error.strerror}); choose another --out"
        ) from error


def _environment(*, with_harness: bool) -> dict[str, str | int]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {k: v for k, v in environment(device, torch.float32).items() if k != "dtype"}
    if not with_harness:
        return found
    from llmprune_eval.harness import VERSION

    return {**found, "lm-eval": VERSION}
