"""Between importances and the logits of pools: where logits start, and what they say in the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmprune.selection import Pool
from llmprune.sequential_attention import Group, SequentialAttention


def group_of(pool: Pool) -> Group:
    """The pool as the engine has it."""
    if pool.costs is None or pool.budget is None:
        return Group(pool.num_units, pool.num_kept, num_rows=pool.num_rows)
    return Group.of_costs(pool.costs, pool.budget)


def starting_logits(priors: dict[str, Tensor], pools: list[Pool]) -> list[Tensor]:
    """Logits to start from: the logarithm of the importance (per cost), mean 0 in every row."""
    starts = [_log_importance(priors, pool).view(pool.num_rows, -1) for pool in pools]
    return [(logits - logits.mean(1, keepdim=True)).float().flatten() for logits in starts]


def _log_importance(priors: dict[str, Tensor], pool: Pool) -> Tensor:
    """Logarithm of the importance of a pool's units (in one with costs: per cost), float64."""
    parts = [priors[name][start:stop] for name, start, stop in pool.members]
    values = torch.cat(parts).double()
    if pool.costs is not None:
        values = values / torch.tensor(pool.costs, dtype=torch.float64)
    floor = values.mean() * 1e-6 + torch.finfo(torch.float64).tiny
    return values.clamp(min=float(floor)).log()


def importances_of(
    engine: SequentialAttention, pools: list[Pool], priors: dict[str, Tensor] | None
) -> list[Tensor]:
    """What the logits say in the measure of the priors: cost * exp(logit + what was taken off)."""
    found = []
    for index, pool in enumerate(pools):
        logits = engine.logits[index].detach().double().cpu()
        if engine.variant == "plus_plus":
            logits = _below_who_stayed_longer(logits, engine.dropped_at[index])
        if priors:
            logits = logits + _log_importance(priors, pool).mean()
        prices = 1.0 if pool.costs is None else torch.tensor(pool.costs, dtype=torch.float64)
        found.append((prices * logits.exp()).float())
    return found


def _below_who_stayed_longer(logits: Tensor, dropped_at: Tensor) -> Tensor:
    """Logits lowered so that no unit is above one that left later, or never (-1)."""
    lowered = logits.clone()
    least = math.inf
    left = sorted({step for step in dropped_at.tolist() if step >= 0}, reverse=True)
    for step in [-1, *left]:
        mine = dropped_at == step
        lowered[mine] = lowered[mine].clamp(max=least)
        least = float(lowered[mine].min()) if mine.any() else least
    return lowered
