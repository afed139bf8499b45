"""From what models gave to the rows of a report: paired, and held against published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune.errors import InputError
from llmprune.recipe import PerplexityTask, Recipe
from llmprune.texts import corpus_of, resolve_text, text_name
from llmprune_eval.paired import Difference, compare_documents
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.perplexity_intervals import nll_stderr, paired_ratio
from llmprune_eval.published import Measured, Published, check_published, unmeasured
from llmprune_eval.quality_report import (
    Figure,
    MetricFigures,
    ModelLine,
    TaskFigures,
    TextFigures,
)
from llmprune_eval.suite import Suite, SuiteTask
from llmprune_eval.task_scores import MetricScores, TaskScores


@dataclass(frozen=True)
class Outcome:
    """What one model gave: for each text its tokens and perplexity, for each task its scores."""

    line: ModelLine
    tokens: tuple[Tensor, ...]
    perplexities: tuple[Perplexity, ...]
    scores: dict[str, TaskScores]


def text_figures(
    index: int, task: PerplexityTask, found: Mapping[str, Outcome], recipe: Recipe | None
) -> TextFigures:
    """The row of text number `index`; models are paired where their tokens are the same."""
    outcomes = list(found.values())
    perplexities = [outcome.perplexities[index] for outcome in outcomes]
    same = all(outcome.tokens[index].equal(outcomes[0].tokens[index]) for outcome in outcomes)
    in_domain = recipe is not None and (
        corpus_of(task) == corpus_of(resolve_text(recipe.calibration))
    )
    return TextFigures(
        name=text_name(task),
        in_domain=in_domain,
        perplexities=dict(zip(found, perplexities, strict=True)),
        same_tokens=same,
        ratio=paired_ratio(*perplexities) if same and len(perplexities) == 2 else None,
    )


def task_figures(name: str, task: SuiteTask, found: Mapping[str, Outcome]) -> TaskFigures:
    """The row of a task, all its metrics paired.

    Raises:
        InputError: The task has no metric `task.metric`, or the models got different documents.
    """
    scores = {label: outcome.scores[name] for label, outcome in found.items()}
    first = next(iter(scores.values()))
    if task.metric is not None and task.metric not in first.metrics:
        raise InputError(
            f"{name}: metric must be one of {', '.join(first.metrics)}, got {task.metric}"
        )
    if len({one.fingerprint for one in scores.values()}) > 1:
        raise InputError(
            f"{name}: both models must get the same documents, got different ones; delete the "
            "stored scores and evaluate anew"
        )
    sizes = list(first.subtasks.values())
    metrics = {}
    for metric in first.metrics:
        both = {label: one.metrics[metric] for label, one in scores.items()}
        metrics[metric] = MetricFigures(
            figures={label: Figure(value=m.value, stderr=m.stderr) for label, m in both.items()},
            difference=_paired(*both.values(), sizes=sizes) if len(both) == 2 else None,
        )
    return TaskFigures(
        name=name,
        headline=first.headline(task.metric),
        num_documents=sum(sizes),
        num_subtasks=len(sizes),
        limit=task.limit,
        num_fewshot=first.num_fewshot,
        data=first.key.data,
        metrics=metrics,
    )


def _paired(dense: MetricScores, pruned: MetricScores, *, sizes: list[int]) -> Difference | None:
    if dense.aggregation is None or pruned.aggregation is None:
        return None
    return compare_documents(
        dense.documents,
        pruned.documents,
        aggregation=dense.aggregation,
        subtask_sizes=sizes,
        equal_subtasks=dense.equal_subtasks,
    )


def measured_figures(
    texts: tuple[TextFigures, ...],
    tasks: tuple[TaskFigures, ...],
    sources: tuple[PerplexityTask, ...],
) -> dict[str, dict[str, Measured]]:
    """The first model's figures, {task or text: {metric: figure}}."""
    found: dict[str, dict[str, Measured]] = {}
    for text, source in zip(texts, sources, strict=True):
        first = next(iter(text.perplexities.values()))
        error = nll_stderr(first)
        stderr = None if error is None else first.value * error
        is_part = source.max_windows is not None
        found[text.name] = {"perplexity": Measured(first.value, stderr, is_part)}
    for task in tasks:
        figures = {m: next(iter(both.figures.values())) for m, both in task.metrics.items()}
        found[task.name] = {
            metric: Measured(figure.value, figure.stderr, task.limit is not None)
            for metric, figure in figures.items()
        }
    return found


def judge(
    recipe: Recipe | None, suite: Suite | None, measured: dict[str, dict[str, Measured]]
) -> tuple[list[str], list[str]]:
    """Warnings about published figures that were missed; a note about those not measured."""
    sources: list[tuple[Published, float]] = []
    if recipe is not None:
        sources.append((recipe.evaluation.published, recipe.evaluation.published_tolerance))
    if suite is not None:
        sources.append((suite.published, suite.published_tolerance))
    warnings, notes = [], []
    for published, tolerance in sources:
        warnings += check_published(published, measured, tolerance)
        absent = unmeasured(published, measured)
        if absent:
            notes.append(f"published figures of {', '.join(absent)}: not measured here")
    return warnings, notes
