"""Which inputs a projection can do without: matching pursuit on its own output, in closed form.

The target is X W, what the projection writes with all its inputs; units are `width` consecutive
inputs (1 for MLP channels, the head size for heads). Everything comes from the Gram matrix X^T X.
`forward_matching` is group OMP, what Sequential Attention does on least squares (Yasuda et al.
2023, arXiv 2209.14881); `backward_matching` removes. Both are one elimination, see `_Elimination`.

The ridge pulls the refitted weights towards the old ones, as in `llmprune.reconstruction`; here
the weights of removed inputs count as pulled to zero, as if X had a little noise of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["gradient", "decrease"]

# Columns of the elimination that wait to be applied to the whole matrix as one product.
BLOCK_SIZE = 64

# By how much of itself a score is moved to follow the order; float32 can still tell them apart.
STEP = 1e-6


@dataclass(frozen=True)
class MatchingPath:
    """What a matching found out about the units of one projection.

    Errors and scores are in units of the squared output, summed over the tokens and outputs that
    the Gram matrix sums over (the ridge counted in): comparable between the layers of a model where
    the tokens are the same. `energy` is at hand for those who rather compare shares.

    Attributes:
        order: Forward: the units picked, first pick first. Backward: the removed, first one first.
        errors: ||X B - X W||^2 after every step of `order`, B refitted; float64.
        scores: Shape (num_units,), float64, higher stays. A removed unit's is what its removal
            raised the error by, a picked one's what its pick lowered it by, the others' what the
            next step with them would; made to follow `order` strictly where the changes do not.
        kept: The units that stay, ascending, int64.
        error: With `kept`; differs from the last of `errors` only after swaps.
        energy: ||X W||^2, the error with nothing kept.
    """

    order: Tensor
    errors: Tensor
    scores: Tensor
    kept: Tensor
    error: float
    energy: float


def forward_matching(
    gram: Tensor,
    weights: Tensor,
    width: int,
    num_kept: int,
    ridge: float = 1e-3,
    *,
    rule: Rule = "gradient",
    num_swaps: int = 0,
) -> MatchingPath:
    """Pick the inputs of a projection from which X W can best be had, by group OMP.

    Args:
        gram: X^T X over the tokens, shape (n, n).
        weights: W, shape (n, d_out): the transpose of a Linear's weight.
        width: Consecutive inputs that make a unit.
        num_kept: Units to keep.
        ridge: Pull towards W, as a share of the mean diagonal of `gram`.
        rule: `gradient` picks the unit with the largest gradient, as matching pursuit does;
            `decrease` the one after whose refit the error is smallest (orthogonal least squares),
            which does not mind units of unequal scale.
        num_swaps: Swaps to try at the end, see `backward_matching`.

    Raises:
        ValueError: Shapes that do not fit together, or a Gram matrix that is singular even with
            the ridge.
    """
    pulled, weights = _prepare(gram, weights, width, num_kept, ridge)
    cross = pulled @ weights
    energy = float((weights * cross).sum())
    elimination = _Elimination(pulled, cross, width)
    order: list[int] = []
    changes: list[float] = []
    for _ in range(num_kept):
        gains = elimination.squares(-1.0) if rule == "gradient" else elimination.changes(-1.0)
        unit = int(gains.argmax())
        order.append(unit)
        changes.append(elimination.pivot(unit))
    path = _path(elimination, order, changes, energy=energy, forward=True)
    return _swap(path, pulled, weights, width, num_swaps)


def backward_matching(
    gram: Tensor,
    weights: Tensor,
    width: int,
    num_kept: int,
    ridge: float = 1e-3,
    *,
    num_per_step: int = 1,
    num_swaps: int = 0,
) -> MatchingPath:
    """Remove the inputs of a projection whose loss the others can best make up for.

    The group form of the optimal brain surgeon (Hassibi and Stork 1993): with H the inverse of the
    Gram matrix of what is left and B the refitted weights, removing unit i and refitting the rest
    raises the error by tr(B_i^T H_ii^-1 B_i). Time goes with n^3: 1,536 inputs down to 1,024 with
    576 outputs take seconds on one core.

    Args:
        gram: X^T X over the tokens, shape (n, n).
        weights: W, shape (n, d_out): the transpose of a Linear's weight.
        width: Consecutive inputs that make a unit.
        num_kept: Units to keep.
        ridge: Pull towards W, as a share of the mean diagonal of `gram`.
        num_per_step: Units removed before the others are ranked anew; 1 is the most careful.
        num_swaps: Swaps to try at the end: the unit joins whose pick lowers the error most, then
            the one leaves that is missed least, until that is the same unit. Each costs about as
            much as inverting the Gram matrix. A swap exchanges two scores.

    Raises:
        ValueError: Shapes that do not fit together, or a Gram matrix that is singular even with
            the ridge.
    """
    pulled, weights = _prepare(gram, weights, width, num_kept, ridge)
    energy = float((weights * (pulled @ weights)).sum())
    elimination = _Elimination(torch.cholesky_inverse(_cholesky(pulled)), weights, width)
    order: list[int] = []
    changes: list[float] = []
    num_removed = len(gram) // width - num_kept
    while len(order) < num_removed:
        count = min(num_per_step, num_removed - len(order))
        for unit in elimination.changes(math.inf).topk(count, largest=False).indices.tolist():
            order.append(unit)
            changes.append(elimination.pivot(unit))
    path = _path(elimination, order, changes, energy=energy, forward=False)
    return _swap(path, pulled, weights, width, num_swaps)


def refit_weights(gram: Tensor, weights: Tensor, kept: Tensor, ridge: float = 1e-3) -> Tensor:
    """Weights of the kept inputs with which the projection comes nearest to X W.

    Args:
        gram: X^T X, shape (n, n).
        weights: W, shape (n, d_out).
        kept: Inputs, not units; int64.
        ridge: Pull towards W, as a share of the mean diagonal of `gram`.

    Returns:
        Shape (len(kept), d_out), float64.
    """
    pulled, weights = _prepare(gram, weights, 1, max(1, len(kept)), ridge)
    return torch.cholesky_solve((pulled @ weights)[kept], _cholesky(pulled[kept][:, kept]))


class _Elimination:
    """Units leave a positive definite matrix M (n, n) and values V (n, d) by block pivots.

    Pivoting unit p makes M into M - M[:, p] M_pp^-1 M[p, :] and V into V - M[:, p] M_pp^-1 V_p.

    * M = G, V = G W: after pivoting the set S, V is minus the gradient at the refit on S.
    * M = G^-1, V = W: after pivoting the removed, V are the refitted weights of the rest and M is
      the inverse of their Gram matrix.

    Either way the error changes by tr(V_p^T M_pp^-1 V_p). The whole of M is touched only every
    BLOCK_SIZE columns; units that have left are then cut out.
    """

    def __init__(self, matrix: Tensor, values: Tensor, width: int) -> None:
        self.width = width
        self.num_units = len(matrix) // width
        self.matrix = matrix.clone()
        self.values = values.clone()
        self.blocks = _diagonal_blocks(matrix, width)
        # the units that M's rows belong to; where each unit is among them
        self.units = torch.arange(self.num_units, device=matrix.device)
        self.position = self.units.clone()
        self.alive = torch.ones_like(self.units, dtype=torch.bool)
        self._start_block()

    def _start_block(self) -> None:
        self.waiting = self.matrix.new_zeros(len(self.matrix), max(BLOCK_SIZE, self.width))
        self.num_waiting = 0

    def squares(self, absent: float) -> Tensor:
        """||V_p||^2 of every unit, shape (num_units,); `absent` for those that left."""
        return self._spread(_squares(self.values, self.width), absent)

    def changes(self, absent: float) -> Tensor:
        """What pivoting each unit would change, shape (num_units,); `absent` for those gone."""
        return self._spread(_changes(self.values, self.blocks), absent)

    def _spread(self, values: Tensor, absent: float) -> Tensor:
        spread = values.new_full((self.num_units,), absent)
        here = self.alive[self.units]
        spread[self.units[here]] = values[here]
        return spread

    def pivot(self, unit: int) -> float:
        """Let a unit leave; what that changes."""
        position = int(self.position[unit])
        rows = slice(position * self.width, (position + 1) * self.width)
        waiting = self.waiting[:, : self.num_waiting]
        columns = self.matrix[rows].T - waiting @ waiting[rows].T
        factor = _cholesky(self.blocks[position])
        step = torch.linalg.solve_triangular(factor, columns.T, upper=False).T
        lead = torch.linalg.solve_triangular(factor, self.values[rows], upper=False)
        self.values.addmm_(step, lead, alpha=-1)
        parts = step.reshape(-1, self.width, self.width)
        self.blocks.baddbmm_(parts, parts.mT, alpha=-1)
        # what rounding leaves of its own block has no Cholesky factor
        self.blocks[position] = torch.eye(self.width, device=parts.device)
        self.waiting[:, self.num_waiting : self.num_waiting + self.width] = step
        self.num_waiting += self.width
        self.alive[unit] = False
        if self.num_waiting + self.width > self.waiting.shape[1]:
            self._apply_block()
        return float(lead.square().sum())

    def _apply_block(self) -> None:
        here = self.alive[self.units]
        rows = here.repeat_interleave(self.width).nonzero().flatten()
        waiting = self.waiting[rows]
        self.matrix = torch.addmm(self.matrix[rows][:, rows], waiting, waiting.T, alpha=-1)
        self.values, self.blocks = self.values[rows], self.blocks[here]
        self.units = self.units[here]
        self.position[self.units] = torch.arange(len(self.units), device=self.units.device)
        self._start_block()


def _prepare(
    gram: Tensor, weights: Tensor, width: int, num_kept: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """The Gram matrix with the pull on its diagonal, and the weights, in float64."""
    size = len(gram)
    if gram.shape != (size, size) or len(weights) != size or size % width:
        raise ValueError(
            f"gram (n, n) and weights (n, d_out) must share n, a multiple of width {width}, "
            f"got {tuple(gram.shape)} and {tuple(weights.shape)}"
        )
    if not 1 <= num_kept <= size // width:
        raise ValueError(f"num_kept must be between 1 and {size // width} units, got {num_kept}")
    pulled = gram.to(torch.float64, copy=True)
    pulled.diagonal().add_(ridge * pulled.diagonal().mean())
    return pulled, weights.double().contiguous()


def _cholesky(matrices: Tensor) -> Tensor:
    """Factors of one matrix or of many, shape (..., m, m)."""
    factors, info = torch.linalg.cholesky_ex(matrices)
    if info.any():
        raise ValueError("gram must be positive definite with the ridge; raise the ridge")
    return factors


def _diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks (num_units, width, width) on the diagonal, a copy."""
    count = len(matrix) // width
    here = torch.arange(count, device=matrix.device)
    return matrix.view(count, width, count, width)[here, :, here].clone()


def _squares(values: Tensor, width: int) -> Tensor:
    """Squared norm of each unit's rows, shape (num_units,)."""
    return torch.linalg.vector_norm(values, dim=1).square().view(-1, width).sum(1)


def _changes(values: Tensor, blocks: Tensor) -> Tensor:
    """tr(V_p^T M_pp^-1 V_p) of every unit, shape (num_units,)."""
    width = blocks.shape[1]
    if width == 1:
        return _squares(values, 1) / blocks.flatten()
    factors = _cholesky(blocks)
    parts = values.view(len(blocks), width, values.shape[1])
    return torch.linalg.solve_triangular(factors, parts, upper=False).square().sum((1, 2))


def _path(
    elimination: _Elimination,
    order: list[int],
    changes: list[float],
    *,
    energy: float,
    forward: bool,
) -> MatchingPath:
    index = torch.tensor(order, dtype=torch.int64)
    moves = torch.tensor(changes, dtype=torch.float64)
    errors = energy - moves.cumsum(0) if forward else moves.cumsum(0)
    scores = elimination.changes(0.0).cpu()
    bound = math.inf if forward else 0.0
    for unit, change in zip(order, changes, strict=True):
        scores[unit] = min(change, bound) if forward else max(change, bound)
        bound = float(scores[unit]) * (1 - STEP if forward else 1 + STEP)
    others = torch.ones(len(scores), dtype=torch.bool)
    others[index] = False
    limited = scores.clamp(max=bound) if forward else scores.clamp(min=bound)
    scores = torch.where(others, limited, scores)
    kept = (~others if forward else others).nonzero().flatten()
    error = float(errors[-1]) if order else 0.0
    return MatchingPath(index, errors, scores, kept, error, energy)


def _swap(
    path: MatchingPath, pulled: Tensor, weights: Tensor, width: int, num_swaps: int
) -> MatchingPath:
    """Exchange units as long as the error falls, at most `num_swaps` times."""
    inputs = torch.arange(len(pulled), device=pulled.device).view(-1, width)
    num_units = len(inputs)
    cross = pulled @ weights
    scores, error = path.scores.clone(), path.error
    kept = torch.zeros(num_units, dtype=torch.bool)
    kept[path.kept] = True
    for _ in range(num_swaps if num_units > len(path.kept) else 0):
        inside, outside = inputs[kept].flatten(), inputs[~kept].flatten()
        factor = _cholesky(pulled[inside][:, inside])
        shared = torch.linalg.solve_triangular(factor, pulled[inside][:, outside], upper=False)
        fitted = torch.linalg.solve_triangular(factor, cross[inside], upper=False)
        residual = cross[outside] - shared.T @ fitted
        parts = shared.T.reshape(-1, width, len(inside))
        blocks = _diagonal_blocks(pulled, width)[~kept] - parts @ parts.mT
        gains = _changes(residual, blocks).cpu()
        joins = int((~kept).nonzero().flatten()[gains.argmax()])
        wider = kept.clone()
        wider[joins] = True
        inside = inputs[wider].flatten()
        inverse = torch.cholesky_inverse(_cholesky(pulled[inside][:, inside]))
        losses = _changes(inverse @ cross[inside], _diagonal_blocks(inverse, width)).cpu()
        leaves = int(wider.nonzero().flatten()[losses.argmin()])
        if leaves == joins:
            break
        error += float(losses.min() - gains.max())
        kept = wider
        kept[leaves] = False
        scores[[joins, leaves]] = scores[[leaves, joins]]
    return replace(path, kept=kept.nonzero().flatten(), scores=scores, error=error)
