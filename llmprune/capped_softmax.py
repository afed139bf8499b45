"""Gates between 0 and 1 that add up to a budget, and the filling of a budget with whole units."""

from __future__ import annotations

import torch
from torch import Tensor


def capped_softmax(logits: Tensor, budget: float, costs: Tensor | None = None) -> Tensor:
    """Gates min(1, exp(logits - tau)) with tau such that gates times costs sum to `budget`.

    Water-filling: the m largest logits saturate at 1, where m is the smallest count for which the
    rest, sharing what is left of the budget by a softmax, stay below 1. The gradient flows through
    the rest.

    Args:
        logits: Shape (..., n), float; every row has a budget of its own.
        budget: In (0, sum of costs]; at the sum the result is exactly 1 everywhere.
        costs: Shape (n,), positive; default 1.

    Returns:
        Gates in (0, 1], of the shape of `logits`.
    """
    num_units = logits.shape[-1]
    costs = torch.ones(num_units) if costs is None else costs
    costs = costs.to(logits.device, torch.float64)
    if budget >= float(costs.sum()):
        # keeps the graph: a logit that has no say yet has gradient zero, not none
        return torch.ones_like(logits) + 0.0 * logits
    ordered, order = logits.detach().double().sort(-1, descending=True)
    paid = costs[order]
    tail = torch.logcumsumexp((ordered + paid.log()).flip(-1), -1).flip(-1)
    spent = paid.cumsum(-1) - paid
    left = (budget - spent).clamp(min=torch.finfo(torch.float64).tiny)
    fits = (ordered - tail + left.log() <= 0) & (spent < budget)
    # true of the last unit that gets anything, whatever the rounding
    fits.scatter_(-1, (spent < budget).sum(-1, keepdim=True) - 1, True)
    count = fits.int().argmax(-1, keepdim=True)
    is_free = order.argsort(-1) >= count
    price = costs.to(logits)
    shares = (logits + price.log()).masked_fill(~is_free, -torch.inf).softmax(-1) / price
    rest = (budget - spent.gather(-1, count)).to(logits)
    return torch.where(is_free, rest * shares, 1.0)


def fill(values: Tensor, budget: float, costs: Tensor | None = None) -> Tensor:
    """Choose whole units for a budget: largest value first, passing over what no longer fits.

    Args:
        values: Shape (n,), without costs also (..., n), each row with the budget for itself; of
            equal ones the lower index comes first. Minus infinity: never.
        budget: What the chosen may cost together.
        costs: Shape (n,), positive; default 1.

    Returns:
        Bool, of the shape of `values`, True = chosen.
    """
    chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    order = torch.sort(values.detach(), dim=-1, descending=True, stable=True).indices
    if costs is None:
        chosen.scatter_(-1, order[..., : int(budget)], True)
        return chosen & (values.detach() > -torch.inf)
    order = order[values.detach()[order] > -torch.inf].cpu()
    prices = costs.tolist()
    # sums of costs carry rounding errors, which must not cost a unit
    left = budget * (1 + 1e-9)
    paid = []
    for unit in order.tolist():
        if prices[unit] <= left:
            left -= prices[unit]
            paid.append(unit)
    # at once: on a GPU each write to a tensor is a launch
    chosen[torch.tensor(paid, dtype=torch.int64, device=chosen.device)] = True
    return chosen
