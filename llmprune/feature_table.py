"""The table that gated networks learn from: what competes in it, what each column tells alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# More candidates than this per row, and chance alone makes some of them fit: the table is wide.
# Then so many per row compete.
CANDIDATES_PER_ROW, COMPETING_PER_ROW = 8, 2
# Of the ridge on a column's weight where it is fitted alone: a standard normal prior.
LONE_RIDGE, NEWTON_STEPS, LARGEST_STEP = 1.0, 8, 2.0
# A column that explains nothing starts so far below one that explains all, not infinitely far.
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Table:
    """What the networks learn from.

    Attributes:
        inputs: Standardised columns, shape (rows, columns), float32.
        targets: Class numbers, shape (rows,), int64; or real targets, shape (rows,), float32.
        owner: The candidate that each column belongs to, shape (columns,), int64.
    """

    inputs: Tensor
    targets: Tensor
    owner: Tensor

    @staticmethod
    def of(inputs: Tensor, targets: Tensor, groups: Sequence[Tensor]) -> Table:
        """The table of these groups' columns; what is in no group is left out."""
        sizes = torch.tensor([len(group) for group in groups])
        owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        return Table(inputs[:, torch.cat(list(groups))], targets, owner)

    @property
    def num_outputs(self) -> int:
        """Classes, or 1 for a real target."""
        return 1 if self.targets.is_floating_point() else int(self.targets.max()) + 1

    @property
    def indicators(self) -> Tensor:
        """The targets as columns, float32: real ones as they are, 0 and 1 for each class."""
        if self.targets.is_floating_point():
            return self.targets[:, None]
        return functional.one_hot(self.targets).float()


def screen(table: Table, costs: Tensor, budget: float, num_kept: int) -> Tensor:
    """Candidates that may compete, ascending: all, unless there are more than 8 per row.

    Then the 2 per row (twice `num_kept`, if that is more) with the largest linear effect per cost
    that the budget can pay for: squared norm of their columns' products with the targets (sure
    independence screening, Fan and Lv 2008, arXiv math/0612857).
    """
    num_rows = len(table.inputs)
    num_left = max(COMPETING_PER_ROW * num_rows, 2 * num_kept)
    if not is_wide(len(costs), num_rows) or len(costs) <= num_left:
        return torch.arange(len(costs))
    targets = table.indicators
    products = table.inputs.T @ (targets - targets.mean(0))
    effects = torch.zeros(len(costs)).index_add(0, table.owner, products.square().sum(1))
    effects = (effects / costs).masked_fill(costs > budget, -1.0)
    return effects.sort(descending=True, stable=True).indices[:num_left].sort().values


def is_wide(num_candidates: int, num_rows: int) -> bool:
    """Whether there are more than 8 candidates per row, so that some fit by chance."""
    return num_candidates > CANDIDATES_PER_ROW * num_rows


def explained_alone(table: Table) -> Tensor:
    """How much of the targets each column explains by itself, between 0 and 1, shape (columns,).

    Real targets: the squared correlation. Classes: Cox and Snell's equivalent of it,
    1 - exp(-2 gain), with the gain in mean log-likelihood of a logistic regression of each class
    against the others, averaged over the classes. Unlike the linear effect, it does not take it as
    noise that one class has its values far out, and apart from each other.
    """
    inputs, targets = table.inputs, table.indicators
    if table.targets.is_floating_point():
        moments = inputs.square().sum(0) * (targets - targets.mean()).square().sum()
        products = (inputs.T @ (targets - targets.mean()))[:, 0]
        return products.square() / moments.clamp_min(torch.finfo(torch.float32).tiny)
    shares = torch.stack([logistic_gain(inputs, target) for target in targets.T])
    return (1 - (-2 * shares).exp()).mean(0)


def logistic_gain(inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean log-likelihood that each column gains over none, in nats, shape (columns,).

    Newton's steps on weight and offset of every column at once, with a standard normal prior on
    the weight, so that a column which separates the rows has a finite one.

    Args:
        inputs: Standardised columns, shape (rows, columns).
        targets: 0 or 1, float, shape (rows,).
    """
    # of a single class nothing is to be explained, and no offset is finite
    share = targets.mean().clamp(0.5 / len(targets), 1 - 0.5 / len(targets))
    weights = torch.zeros(inputs.shape[1])
    offsets = torch.full_like(weights, float(torch.logit(share)))
    for _ in range(NEWTON_STEPS):
        guesses = torch.sigmoid(inputs * weights + offsets)
        errors = targets[:, None] - guesses
        # where all guesses are certain there is no curvature left
        curvature = guesses * (1 - guesses) + 1e-6
        pull = (errors * inputs).sum(0) - LONE_RIDGE * weights
        plain, mixed = curvature.sum(0), (curvature * inputs).sum(0)
        steep = (curvature * inputs.square()).sum(0) + LONE_RIDGE
        area = plain * steep - mixed.square()
        # far from the optimum a full step can overshoot
        shift = (steep * errors.sum(0) - mixed * pull) / area
        turn = (plain * pull - mixed * errors.sum(0)) / area
        offsets = offsets + shift.clamp(-LARGEST_STEP, LARGEST_STEP)
        weights = weights + turn.clamp(-LARGEST_STEP, LARGEST_STEP)
    margins = inputs * weights + offsets
    likelihood = (targets[:, None] * margins - functional.softplus(margins)).mean(0)
    alone = share * share.log() + (1 - share) * (1 - share).log()
    gain = likelihood - LONE_RIDGE / 2 * weights.square() / len(inputs) - alone
    return gain.clamp_min(0)


def prior_logits(table: Table, costs: Tensor) -> Tensor:
    """Where logits start in a wide table: log of what a candidate explains alone, per cost.

    Largest 0, shape (candidates,). On tens of rows the network's own evidence is weak, and it moves
    the logits by about 1 only; in tables with more rows it has to find everything by itself.
    """
    shares = torch.zeros(len(costs)).index_add(0, table.owner, explained_alone(table))
    values = (shares.clamp_min(LEAST_SHARE) / costs).log().float()
    return values - values.max()
