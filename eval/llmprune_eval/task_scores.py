"""TaskScores: one model on one lm-eval task, document by document, and its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llmprune.files import save_text
from llmprune_eval.paired import Aggregation


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskKey(_Part):
    """What two evaluations must share for one to stand for the other.

    `model` is a sha256 of weights, config, tokenizer and dtype; `data` of the rows, or Hub ids;
    `version` is lm-eval's; `device` the name of what computed it, as reports have it.
    """

    model: str
    task: str
    limit: int | None
    num_fewshot: int | None
    data: str
    version: str
    device: str


class MetricScores(_Part):
    """A metric of a task: lm-eval's figure and standard error, and each document's score.

    `documents` is in lm-eval's order, subtask after subtask; empty, with `aggregation` None, where
    the figure is not made of the documents in a way that a paired test knows. `equal_subtasks`:
    every subtask of a group counts the same, however many documents it has.
    """

    value: float
    stderr: float | None
    higher_is_better: bool
    aggregation: Aggregation | None
    equal_subtasks: bool = False
    documents: tuple[float, ...] = ()


class TaskScores(_Part):
    """Everything that is kept of one model on one task.

    `subtasks` gives the number of documents of each (of a task alone: itself). `fingerprint` is a
    sha256 of all documents, prompts and targets: two models' scores are paired where it is equal.
    """

    key: TaskKey
    num_fewshot: int
    subtasks: dict[str, int]
    fingerprint: str
    metrics: dict[str, MetricScores]

    def save(self, path: Path) -> None:
        """Write the JSON at once or not at all."""
        save_text(self.model_dump_json() + "\n", path)

    @staticmethod
    def read_if_same(path: Path, key: TaskKey) -> TaskScores | None:
        """What is stored under the same key; None where there is nothing, or of another version."""
        if not key.data or not path.is_file():
            return None
        try:
            stored = TaskScores.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError):
            return None
        return stored if stored.key == key else None

    def headline(self, metric: str | None) -> str:
        """The metric that tables show: the one asked for, else acc_norm, acc or the first."""
        wanted = (metric, "acc_norm", "acc") if metric is None else (metric,)
        return next((name for name in wanted if name in self.metrics), next(iter(self.metrics)))


def metric_scores(
    value: float,
    stderr: Any,
    documents: Sequence[Any],
    sizes: Sequence[int],
    *,
    higher_is_better: bool,
) -> MetricScores:
    """Find how lm-eval made a metric's figure of the documents' scores.

    Args:
        value: lm-eval's figure.
        stderr: Its standard error; lm-eval has a string where there is none.
        documents: A score for each document, as lm-eval logs it.
        sizes: Documents of each subtask, in order; their sum is the number of documents.
        higher_is_better: As lm-eval says.
    """
    found: dict[str, Any] = {
        "value": value,
        "stderr": stderr if isinstance(stderr, float) and math.isfinite(stderr) else None,
        "higher_is_better": higher_is_better,
        "aggregation": None,
    }
    are_numbers = all(isinstance(document, bool | int | float) for document in documents)
    if len(documents) != sum(sizes) or not are_numbers:
        return MetricScores(**found)
    scores = tuple(float(score) for score in documents)
    means, start = [], 0
    for size in sizes:
        means.append(math.fsum(scores[start : start + size]) / size)
        start += size
    mean, mean_of_means = math.fsum(scores) / len(scores), math.fsum(means) / len(means)
    found["documents"] = scores
    if _same(value, mean):
        return MetricScores(**{**found, "aggregation": "mean"})
    if _same(value, mean_of_means):
        return MetricScores(**{**found, "aggregation": "mean", "equal_subtasks": True})
    if len(sizes) == 1 and _same(value, math.exp(-mean)):
        return MetricScores(**{**found, "aggregation": "perplexity"})
    return MetricScores(**{**found, "documents": ()})


def _same(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-12)
