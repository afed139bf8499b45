"""Ratio: a measured pruned / dense ratio with its 95 % interval, from paired measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95 % interval.

    `low` and `high` are None where one pair was measured. `conclusive` is False where the interval
    holds 1.0 or is not known: the two sides may be equal.
    """

    value: float
    low: float | None
    high: float | None
    conclusive: bool


def make_ratio(value: float, low: float | None, high: float | None) -> Ratio:
    """Build a Ratio; `conclusive` follows from the bounds."""
    if low is None or high is None:
        return Ratio(value, low, high, conclusive=False)
    return Ratio(value, low, high, conclusive=not low <= 1.0 <= high)


def student_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t for `degrees` >= 1 degrees of freedom."""
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    # Cornish-Fisher expansion about 1.96, off by less than 0.003 from 11 degrees on.
    return 1.960 + 2.372 / degrees + 2.823 / degrees**2


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """The median of paired ratios with a 95 % interval.

    From six pairs on the interval runs between two order statistics, so that one disturbed round
    can't move it. Fewer pairs have no such interval (the range of five covers 93.75 %); there it is
    Student's t on the logarithms, which then always holds the median.

    Args:
        ratios: Positive ratios, one per round, at least one.
    """
    ordered = sorted(ratios)
    middle = statistics.median(ordered)
    if len(ordered) < 2:
        return make_ratio(middle, None, None)
    if len(ordered) < 6:
        logs = [math.log(ratio) for ratio in ordered]
        centre = statistics.fmean(logs)
        half = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        return make_ratio(middle, math.exp(centre - half), math.exp(centre + half))
    rank = _order_rank(len(ordered))
    return make_ratio(middle, ordered[rank], ordered[-1 - rank])


def _order_rank(count: int) -> int:
    """The largest r such that values r and count-1-r enclose the median with at least 95 %."""
    rank, below = 0, 1
    while (below + math.comb(count, rank + 1)) * 2 <= 0.05 * 2**count:
        rank += 1
        below += math.comb(count, rank)
    return rank
