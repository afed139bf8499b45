"""Importances from gradients along a path on which every gate closes together, instead of at 1.

At a converged model the gradient of an open gate is zero in expectation, so a first-order score
taken there ranks noise. On the way down it is not. Integrated gradients (Sundararajan et al. 2017,
arXiv 1703.01365; along removal paths: Greedy PIG, arXiv 2311.06192) share the whole divergence that
the path causes out among the gates, interactions included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.baselines import fixed_weights
from llmprune.compensation import UnitMeans
from llmprune.gates import Gates, attach_gates
from llmprune.recipe import UnitKind
from llmprune.units import UnitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far every gate closes at the end of the path: about what a budget takes.
REACH = 0.25
# Points of the path, each in the middle of its part; rows take them in turns.
NUM_POINTS = 8


def integrated_scores(
    model: PreTrainedModel,
    unit_map: UnitMap,
    rows: Iterable[Tensor],
    kinds: Collection[UnitKind],
    *,
    means: UnitMeans | None = None,
    reach: float = REACH,
) -> dict[str, Tensor]:
    """How much a gate matters by `integrated_slopes`: their size, float64, across all kinds.

    Size and not sign, as in `taylor_scores`: a unit whose closing brings a half-closed model nearer
    to the dense one does something, one without any slope does not. Arguments are those of
    `integrated_slopes`.
    """
    slopes = integrated_slopes(model, unit_map, rows, kinds, means=means, reach=reach)
    return {name: slope.abs() for name, slope in slopes.items()}


def integrated_slopes(
    model: PreTrainedModel,
    unit_map: UnitMap,
    rows: Iterable[Tensor],
    kinds: Collection[UnitKind],
    *,
    means: UnitMeans | None = None,
    reach: float = REACH,
    num_points: int = NUM_POINTS,
) -> dict[str, Tensor]:
    """Mean gradient of a row's divergence from the dense model along the path, by group, float64.

    All gates of the kinds go from 1 to 1 - reach in a straight line; row i looks at the middle of
    part i mod num_points. The sum of all slopes times -reach is the mean divergence at the path's
    end (completeness), up to the error of the midpoint rule.

    Args:
        model: The dense model; its weights stay.
        unit_map: Its units.
        rows: Token rows, each of shape (1, length), int64.
        kinds: Kinds whose gates close.
        means: Mean activations that closed gates leave behind, or None for zeros.
        reach: Length of the path, in (0, 1].
        num_points: Points of the path.

    Raises:
        ValueError: A reach outside (0, 1].
    """
    if not 0 < reach <= 1:
        raise ValueError(f"reach must be in (0, 1], got {reach}")
    gates = attach_gates(model, unit_map, kinds, means)
    sizes = {name: unit_map.groups[name].num_units for name in gates.group_names}
    found = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    num_rows = 0
    try:
        with fixed_weights(model):
            for row in rows:
                level = 1 - reach * (num_rows % num_points + 0.5) / num_points
                slopes = _slopes_at(model, gates, row.to(model.device), level, sizes)
                for name, slope in slopes.items():
                    found[name] += slope.double().cpu()
                num_rows += 1
    finally:
        gates.detach()
    return {name: value / max(1, num_rows) for name, value in found.items()}


def _slopes_at(
    model: PreTrainedModel, gates: Gates, row: Tensor, level: float, sizes: dict[str, int]
) -> dict[str, Tensor]:
    """The gradient of a row's divergence with every gate at a level."""
    with torch.no_grad(), gates.opened():
        dense = model(input_ids=row, use_cache=False).logits.float().log_softmax(-1)
    values = {
        name: torch.full((size,), level, device=model.device, dtype=dense.dtype, requires_grad=True)
        for name, size in sizes.items()
    }
    gates.set(values)
    got = model(input_ids=row, use_cache=False).logits.float().log_softmax(-1)
    divergence = (dense.exp() * (dense - got)).sum()
    slopes = torch.autograd.grad(divergence, list(values.values()))
    return dict(zip(values, slopes, strict=True))
