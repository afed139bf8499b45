"""How sure a perplexity is, and the ratio of two: documents drawn anew, or windows.

A window's tokens come from neighbouring sentences and its neighbours from the same article, so that
windows are no independent sample. Documents are, and a text's perplexity is a ratio over them:
their losses by their tokens, both summed. Drawing documents anew, with replacement, gives its
error; drawing them for two models at once gives that of their ratio (a paired bootstrap).
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from llmprune.errors import InputError
from llmprune_eval.intervals import Ratio, make_ratio, student_t
from llmprune_eval.paired import RESAMPLES
from llmprune_eval.perplexity import Perplexity, window_stderr

# Resamples at a time: of 5,000 documents then 20 MB.
_CHUNK = 500
_SEED = 0


def paired_ratio(dense: Perplexity, pruned: Perplexity) -> Ratio:
    """Perplexity of `pruned` over that of `dense`, with a 95 % interval.

    The interval comes from the differences of the two models' losses document by document, so what
    makes a document hard for both cancels. Without documents it comes from the differences window
    by window (Student's t), which takes windows as independent.

    Raises:
        InputError: The two were not measured on the same windows.
    """
    measured = [(p.window, p.num_windows, p.num_tokens) for p in (dense, pruned)]
    if measured[0] != measured[1]:
        raise InputError(
            "a paired ratio needs the same windows (window, windows, tokens) in both models, got "
            f"{measured[0]} and {measured[1]}; measure both on one text"
        )
    if dense.document_tokens and dense.document_tokens == pruned.document_tokens:
        pairs = zip(dense.document_nlls, pruned.document_nlls, strict=True)
        differences = tuple(p - d for d, p in pairs)
        value = math.exp(math.fsum(differences) / dense.num_tokens)
        return make_ratio(value, *_interval(differences, dense.document_tokens))
    weights = dense.window_weights()
    differences = tuple(p - d for d, p in zip(dense.window_nlls, pruned.window_nlls, strict=True))
    mean = math.fsum(w * d for w, d in zip(weights, differences, strict=True))
    stderr = window_stderr(differences, weights, mean)
    if stderr is None:
        return make_ratio(math.exp(mean), None, None)
    half = student_t(len(differences) - 1) * stderr
    return make_ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@lru_cache(maxsize=64)
def nll_stderr(perplexity: Perplexity) -> float | None:
    """Standard error of the mean NLL: over documents, where there are none over windows."""
    count = len(perplexity.document_tokens)
    if not count:
        return perplexity.nll_stderr
    means = _resampled_means(perplexity.document_nlls, perplexity.document_tokens)
    return float(means.std()) * math.sqrt(count / (count - 1))


def interval_note(perplexity: Perplexity) -> str:
    """What the intervals of a text come from, in words."""
    count, kind = len(perplexity.document_tokens), perplexity.document_kind
    if not count:
        return "intervals from windows, taken as independent"
    if kind != "blocks":
        return f"intervals from {count} {kind} drawn anew"
    length = math.ceil(perplexity.num_windows / count)
    windows = "one window" if length == 1 else f"{length} windows"
    return f"too few documents, so intervals from {count} blocks of {windows} drawn anew"


@lru_cache(maxsize=64)
def _interval(sums: tuple[float, ...], tokens: tuple[int, ...]) -> tuple[float, float]:
    """95 % bounds of exp(sum of `sums` / sum of `tokens`).

    The percentiles are taken further out than 2.5 and 97.5, so that of few documents the interval
    is as wide as Student's t asks (Hesterberg 2015, "expanded percentile"); drawn anew alone, ten
    would give one that covers nine times in ten.
    """
    count = len(tokens)
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_t(count - 1))
    low, high = np.quantile(_resampled_means(sums, tokens), [tail, 1 - tail])
    return math.exp(low), math.exp(high)


def _resampled_means(sums: tuple[float, ...], tokens: tuple[int, ...]) -> NDArray[np.float64]:
    """Sum of sums by sum of tokens, of documents drawn with replacement, shape (RESAMPLES,)."""
    rng = np.random.default_rng(_SEED)
    count, values, sizes = len(tokens), np.asarray(sums), np.asarray(tokens)
    means = []
    for start in range(0, RESAMPLES, _CHUNK):
        rows = min(_CHUNK, RESAMPLES - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=rows)
        means.append(drawn @ values / (drawn @ sizes))
    return np.concatenate(means)
