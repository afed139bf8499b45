"""Whether scores are more than noise: two seeds must agree on who matters.

At a converged model with every gate at 1 the gradient of a logit is zero in expectation, and Adam
turns its noise into a random walk of a convincing size. What two runs that differ in their data
agree on can't be that; what they do not agree on should not decide who is pruned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_correlation(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Spearman correlation of two sets of scores, inside the pools.

    Args:
        first: Scores of one seed: per pool of units that compete one tensor, shape (num_units,).
        second: Those of the other seed, alike in shape.

    Returns:
        Mean over the pools, weighted by their units, in [-1, 1]. Equal scores share a rank; a pool
        where all scores are equal tells nothing and counts as 0.

    Raises:
        ValueError: The shapes differ.
    """
    return _correlation(_standard_ranks(first), _standard_ranks(second))


def shuffled_null(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    num_shuffles: int = 1000,
    quantile: float = 0.95,
    seed: int = 0,
) -> float:
    """The rank correlation that chance reaches: a quantile over shuffles inside the pools.

    Args:
        first: As in `rank_correlation`.
        second: As in `rank_correlation`; the one that is shuffled.
        num_shuffles: How many.
        quantile: In (0, 1); one-sided.
        seed: Of the shuffles.
    """
    generator = torch.Generator().manual_seed(seed)
    mine, others = _standard_ranks(first), _standard_ranks(second)
    chance = []
    for _ in range(num_shuffles):
        shuffled = [ranks[torch.randperm(len(ranks), generator=generator)] for ranks in others]
        chance.append(_correlation(mine, shuffled))
    return float(torch.tensor(chance, dtype=torch.float64).quantile(quantile))


def is_signal(
    first: Sequence[Tensor], second: Sequence[Tensor], *, num_shuffles: int = 1000, seed: int = 0
) -> bool:
    """Whether two seeds agree more than 95 of 100 shuffles do; if not, do not prune by them.

    Args:
        first: As in `rank_correlation`.
        second: As in `rank_correlation`.
        num_shuffles: Of the null.
        seed: Of the shuffles.
    """
    bound = shuffled_null(first, second, num_shuffles=num_shuffles, seed=seed)
    return rank_correlation(first, second) > bound


def _standard_ranks(pools: Sequence[Tensor]) -> list[Tensor]:
    """Ranks of every pool, ties at their mean, moved and scaled to mean 0 and norm 1 (or all 0)."""
    standard = []
    for scores in pools:
        values = scores.detach().cpu().double()
        _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
        ranks = ranks - ranks.mean()
        standard.append(ranks / ranks.norm() if len(counts) > 1 else torch.zeros_like(ranks))
    return standard


def _correlation(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    shapes = [[len(ranks) for ranks in pools] for pools in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the two sets of pools must be alike, got sizes {shapes}")
    weighted = [len(a) * float(a @ b) for a, b in zip(first, second, strict=True)]
    return sum(weighted) / max(1, sum(shapes[0]))
