"""Greedy selection on least squares, in closed form and by training gates.

Small problems with groups of any sizes: what the theory of Sequential Attention speaks of (Yasuda
et al. 2023, arXiv 2209.14881; its group form in Axiotis and Yasuda 2023, arXiv 2307.07405). It is
here so that the engine can be held against the theory, and for features of tables; the weights of
a language model are matched by `llmprune.matching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.forward_selection import ForwardAttention


@dataclass(frozen=True)
class LeastSquares:
    """The loss l(b) = ||X b - Y||^2 / 2 over disjoint groups of coefficients.

    Attributes:
        gram: X^T X, shape (n, n), float64.
        cross: X^T Y, shape (n, d), float64.
        energy: ||Y||^2.
        groups: Per group its indices in [0, n), int64; disjoint, any sizes.
    """

    gram: Tensor
    cross: Tensor
    energy: float
    groups: tuple[Tensor, ...]

    @staticmethod
    def of(inputs: Tensor, targets: Tensor, groups: Sequence[Sequence[int]]) -> LeastSquares:
        """The problem of inputs X (rows, n) and targets Y (rows,) or (rows, d).

        Raises:
            ValueError: An input is in no group or in two.
        """
        inputs, targets = inputs.double(), targets.double().reshape(len(inputs), -1)
        indices = sorted(index for group in groups for index in group)
        if indices != list(range(inputs.shape[1])):
            raise ValueError(
                f"groups must hold each of the {inputs.shape[1]} inputs once, "
                f"got {[list(group) for group in groups]}"
            )
        return LeastSquares(
            inputs.T @ inputs,
            inputs.T @ targets,
            float(targets.square().sum()),
            tuple(torch.tensor(list(group), dtype=torch.int64) for group in groups),
        )

    def loss(self, coefficients: Tensor) -> Tensor:
        """l(b) for b of shape (n, d); a scalar, differentiable."""
        quadratic = (coefficients * (self.gram @ coefficients - 2 * self.cross)).sum()
        return (quadratic + self.energy) / 2

    def refit(self, selected: Sequence[int]) -> Tensor:
        """The b, shape (n, d), that minimises l with every other group at zero."""
        coefficients = torch.zeros_like(self.cross)
        if selected:
            index = torch.cat([self.groups[group] for group in selected])
            # duplicated inputs make the Gram singular: then the smallest of the solutions
            inverse = torch.linalg.pinv(self.gram[index][:, index], hermitian=True)
            coefficients[index] = inverse @ self.cross[index]
        return coefficients

    @property
    def owner(self) -> Tensor:
        """The group that each input is in, shape (n,), int64."""
        sizes = torch.tensor([len(group) for group in self.groups])
        owner = torch.repeat_interleave(torch.arange(len(self.groups)), sizes)
        return owner[torch.cat(self.groups).argsort()]

    def squares(self, values: Tensor) -> Tensor:
        """Squared norm of every group's rows of `values` (n, d), shape (num_groups,)."""
        sums = torch.zeros(len(self.groups), dtype=values.dtype)
        return sums.index_add(0, self.owner, values.square().sum(1))

    def pull(self, selected: Sequence[int], costs: Tensor | None = None) -> Tensor:
        """||gradient|| / sqrt(cost) of every group after the refit, 0 for the selected.

        Shape (num_groups,). Its largest value is the penalty from which on the group LASSO on the
        unselected gives them nothing.
        """
        norms = self.squares(self.gram @ self.refit(selected) - self.cross).sqrt()
        if costs is not None:
            norms = norms / costs.double().sqrt()
        norms[list(selected)] = 0.0
        return norms


def group_omp(problem: LeastSquares, num_kept: int, costs: Tensor | None = None) -> list[int]:
    """Group orthogonal matching pursuit.

    Adds the group with the largest ||gradient|| / sqrt(cost), refits, and so on: the square of
    that is what the loss falls by per cost, up to a constant.

    Args:
        problem: The least squares.
        num_kept: Groups to select.
        costs: Shape (num_groups,), positive; default 1.

    Returns:
        The groups in order of selection.
    """
    order: list[int] = []
    while len(order) < num_kept:
        pull = problem.pull(order, costs)
        pull[order] = -1.0
        order.append(int(pull.argmax()))
    return order


def group_ompr(
    problem: LeastSquares, start: Sequence[int], num_swaps: int
) -> tuple[list[int], list[list[int]]]:
    """Group matching pursuit with replacement (arXiv 2307.07405).

    A swap adds the group with the largest gradient and drops the one among the selected with the
    smallest coefficients, then refits; it may raise the loss, so the best set seen is kept.

    Args:
        problem: The least squares.
        start: Groups to start from, such as those of `group_omp`.
        num_swaps: Swaps to try; stops at a set that was there before.

    Returns:
        The best set, and every set from the start on.
    """
    selected = list(start)
    seen = [selected]
    for _ in range(num_swaps):
        pull = problem.pull(selected)
        pull[selected] = -1.0
        sizes = problem.squares(problem.refit(selected))[selected]
        dropped = selected[int(sizes.argmin())]
        selected = [group for group in selected if group != dropped] + [int(pull.argmax())]
        if any(set(selected) == set(before) for before in seen):
            break
        seen.append(selected)
    best = min(seen, key=lambda groups: float(problem.loss(problem.refit(groups))))
    return best, seen


def minimise_gated(problem: LeastSquares, engine: ForwardAttention, strength: float) -> Tensor:
    """Train linear gates w and coefficients b on l(w b) plus the engine's penalty, to convergence.

    Args:
        problem: The least squares; one unit of the engine per group.
        engine: Float64, with linear gates; its logits are left at the minimum.
        strength: Of the penalty.

    Returns:
        The gated coefficients, shape (n, d).
    """
    coefficients = problem.refit(engine.order).requires_grad_()
    parameters = [engine.logits, coefficients]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        max_eval=2000,
        history_size=30,
        tolerance_grad=1e-7 * strength,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    owner = problem.owner

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(engine.gates()[owner, None] * coefficients)
        loss = loss + engine.penalty(problem.squares(coefficients), strength)
        loss.backward()
        return loss

    optimizer.step(step)
    return (engine.gates()[owner, None] * coefficients).detach()


def linear_sequential_attention(
    problem: LeastSquares,
    num_kept: int,
    *,
    costs: Tensor | None = None,
    epsilon: float = 0.02,
) -> list[int]:
    """Regularised Linear Sequential Attention: selection by training gates, nothing in closed form.

    Args:
        problem: The least squares.
        num_kept: Groups to select.
        costs: Shape (num_groups,), positive; default 1.
        epsilon: In (0, 1): the penalty is 1 - epsilon of the threshold at which the first group
            appears. With epsilon -> 0 the picks are those of `group_omp`; they are not otherwise.

    Returns:
        The groups in order of selection.
    """
    engine = ForwardAttention(len(problem.groups), num_kept, gate="linear", costs=costs).double()
    while not engine.is_done:
        strength = (1 - epsilon) * float(problem.pull(engine.order, costs).max())
        minimise_gated(problem, engine, strength)
        engine.select()
    return engine.order
