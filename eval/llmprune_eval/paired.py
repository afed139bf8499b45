"""Two models on the same documents: paired bootstrap of the difference, exact McNemar test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from llmprune.errors import InputError

# Resamples: a bound of a 95 % interval is then off by about 0.03 of the standard error.
RESAMPLES = 10_000
LEVEL = 0.05
# Resamples at a time: 5,000 documents that all differ are then 20 MB.
_CHUNK = 500

# How documents make a task's figure: their mean, or exp(-mean) of log-likelihoods (a perplexity).
Aggregation = Literal["mean", "perplexity"]


class Difference(BaseModel):
    """The pruned model's figure against the dense one's, from the same documents.

    `value` is pruned minus dense for a mean and pruned / dense for a perplexity; `low` and `high`
    bound it with 95 %. Where documents are right or wrong, `only_dense` and `only_pruned` count
    those that one model alone gets right, and `p_value` is McNemar's, exact and two-sided.
    `conclusive`: the test (without one, the interval) excludes that both models are equal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["difference", "ratio"]
    value: float
    low: float
    high: float
    num_documents: Annotated[int, Field(ge=1)]
    only_dense: int | None = None
    only_pruned: int | None = None
    p_value: float | None = None
    conclusive: bool


def compare_documents(
    dense: Sequence[float],
    pruned: Sequence[float],
    *,
    aggregation: Aggregation = "mean",
    subtask_sizes: Sequence[int] | None = None,
    equal_subtasks: bool = False,
    seed: int = 0,
) -> Difference:
    """Test whether two models differ on the documents that both were given.

    Args:
        dense: A number for each document, by the dense model.
        pruned: The same documents in the same order, by the pruned model.
        aggregation: What lm-eval makes of the numbers.
        subtask_sizes: Documents of each subtask, in order; resampling keeps them. None: one task.
        equal_subtasks: Every subtask counts the same, instead of every document.
        seed: Of the resampling.

    Raises:
        InputError: The two have different numbers of documents, or none.
    """
    if len(dense) != len(pruned) or not len(dense):
        raise InputError(
            "a paired test needs the same documents from both models, at least one; got "
            f"{len(dense)} and {len(pruned)}; evaluate both anew"
        )
    sizes = [len(dense)] if subtask_sizes is None else list(subtask_sizes)
    differences = np.asarray(pruned, np.float64) - np.asarray(dense, np.float64)
    parts = np.split(differences, np.cumsum(sizes)[:-1])
    shares = [1 / len(sizes) if equal_subtasks else size / len(dense) for size in sizes]
    value = math.fsum(s * float(part.mean()) for s, part in zip(shares, parts, strict=True))
    rng = np.random.default_rng(seed)
    means = sum(s * _resampled_means(part, rng) for s, part in zip(shares, parts, strict=True))
    low, high = (float(bound) for bound in np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2]))
    if aggregation == "perplexity":
        # of log-likelihoods: the larger the mean, the smaller the perplexity
        value, low, high = math.exp(-value), math.exp(-high), math.exp(-low)
    neutral = 1.0 if aggregation == "perplexity" else 0.0
    counts = _discordant(dense, pruned) if aggregation == "mean" else None
    p_value = None if counts is None else mcnemar(*counts)
    return Difference(
        kind="ratio" if aggregation == "perplexity" else "difference",
        value=value,
        low=low,
        high=high,
        num_documents=len(dense),
        only_dense=None if counts is None else counts[0],
        only_pruned=None if counts is None else counts[1],
        p_value=p_value,
        conclusive=not low <= neutral <= high if p_value is None else p_value < LEVEL,
    )


def mcnemar(only_dense: int, only_pruned: int) -> float:
    """McNemar's exact two-sided p-value: the discordant documents fall to either side by a coin.

    Args:
        only_dense: Documents that the dense model alone gets right.
        only_pruned: Documents that the pruned model alone gets right.
    """
    count = only_dense + only_pruned
    if count == 0:
        return 1.0
    # Integers, so that no p-value is off by rounding: the binomial coefficients of the tail.
    tail, term = 0, 1
    for k in range(min(only_dense, only_pruned) + 1):
        tail += term
        term = term * (count - k) // (k + 1)
    return min(1.0, tail / 2 ** (count - 1))


def _resampled_means(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `values` drawn with replacement, shape (RESAMPLES,).

    How often each different value is drawn is multinomial; of right and wrong answers there are
    three different differences, so that this is fast for any number of documents.
    """
    different, counts = np.unique(values, return_counts=True)
    if len(different) == 1:
        return np.full(RESAMPLES, different[0])
    means = []
    for start in range(0, RESAMPLES, _CHUNK):
        rows = min(_CHUNK, RESAMPLES - start)
        drawn = rng.multinomial(len(values), counts / len(values), size=rows)
        means.append(drawn @ different / len(values))
    return np.concatenate(means)


def _discordant(dense: Sequence[float], pruned: Sequence[float]) -> tuple[int, int] | None:
    """Documents that one model alone gets right; None where they aren't all right or wrong."""
    pairs = list(zip(dense, pruned, strict=True))
    if any(score not in (0, 1) for pair in pairs for score in pair):
        return None
    return sum(d > p for d, p in pairs), sum(p > d for d, p in pairs)
