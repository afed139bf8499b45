"""Sequential Attention over any units: the selected set grows phase by phase.

Yasuda et al. 2023 (arXiv 2209.14881). Every phase trains the logits of the units that are not yet
selected, together with whatever else the caller trains; then the best of them join the selected
set, whose gates stay at 1, and the logits begin anew. Nothing of transformers is in here.

`llmprune.sequential_attention` goes the other way, from all units down, in the variants
`plus_plus`, `capped` and `magnitude`. Here are the two that start from none, by the gates of the
unselected:

* `softmax` - the paper's algorithm. Softmax over the unselected alone: a selected unit's logit has
  no part in it, not even in the shift that keeps the exponentials finite.
* `linear` - the gate is the logit itself, with a penalty on the unselected only. For least squares
  and a penalty just below the threshold this is orthogonal matching pursuit, exactly; groups of
  any sizes included (`llmprune.least_squares` has both sides).

Weights that learn along need an L2 pull on those of the unselected alone: `penalty` for linear
gates, weight decay for softmax. Without one nothing takes the work from the twin of a unit that was
selected, which then comes next.

A phase's training comes before its pick: `select` is called at a phase's end, and nothing else
changes the selected set. The code that came with the paper picks at the start of the next phase,
so that its first unit is random and its last training unused.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

Gate = Literal["softmax", "linear"]
Total = Literal["one", "unselected"]

# Only breaks ties: well above float32's resolution at 1, well below what one Adam step moves.
NOISE = 1e-6


class ForwardAttention(nn.Module):
    """A logit per unit and the set selected so far.

    Attributes:
        logits: Shape (num_units,), float32; those of selected units have no effect.
        selected: Bool, shape (num_units,), True = selected for good.
        order: The selected units, first pick first.
    """

    logits: nn.Parameter
    selected: Tensor
    costs: Tensor

    def __init__(
        self,
        num_units: int,
        num_kept: int,
        *,
        num_per_phase: int = 1,
        gate: Gate = "softmax",
        total: Total = "one",
        costs: Tensor | None = None,
        budget: float | None = None,
        prior: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Nothing is selected yet.

        Args:
            num_units: How many there are.
            num_kept: How many are selected in the end; with a `budget`, at most.
            num_per_phase: Picks per phase; fewer in the last one where it does not divide.
            gate: What the gates of the unselected are made of.
            total: What the gates of the unselected sum to while their logits are equal: `one` as
                in the paper, or their number, so that every gate is 1 and a pretrained model
                starts as it is.
            costs: Shape (num_units,), positive. Softmax gates then share out cost instead of
                number (the sum of cost times gate is fixed), and the penalty of a linear gate is
                weighted by the cost's square root: picks go by gain per cost. Default: all 1.
            budget: Cost that the selected units may have together, up to the rounding of `costs`.
                Picks go by score; one that no longer fits is passed over for the next that does.
            prior: Logits that softmax gates start every phase from, shape (num_units,): the choice
                of the unit that is expected to help where training says nothing. Default: all 0.
            generator: Of the noise that breaks ties; by default one of its own, seed 0.

        Raises:
            ValueError: A number out of its range, or a prior for linear gates.
        """
        super().__init__()
        if not 1 <= num_kept <= num_units:
            raise ValueError(f"num_kept must be between 1 and {num_units} units, got {num_kept}")
        if num_per_phase < 1:
            raise ValueError(f"num_per_phase must be at least 1, got {num_per_phase}")
        if prior is not None and (gate == "linear" or prior.shape != (num_units,)):
            raise ValueError(
                f"prior must be {num_units} logits of softmax gates, got {tuple(prior.shape)} for "
                f"gate={gate!r}"
            )
        costs = torch.ones(num_units) if costs is None else costs.detach().clone()
        if costs.shape != (num_units,) or not (costs > 0).all():
            raise ValueError(f"costs must be {num_units} positive numbers, got {costs.tolist()}")
        # not a buffer, which `to` would round: sums of costs are taken in float64, and what the
        # costs lost to rounding before they came here must not cost a unit
        self._prices: list[float] = costs.double().tolist()
        rounding = torch.finfo(costs.dtype).eps if costs.is_floating_point() else 0.0
        self._most = math.inf if budget is None else budget * (1 + max(1e-9, rounding))
        if self._most < min(self._prices):
            raise ValueError(
                f"budget must pay for the cheapest unit, {min(self._prices)}, got {budget}"
            )
        self.num_units = num_units
        self.num_kept = num_kept
        self.num_per_phase = num_per_phase
        self.gate = gate
        self.total = total
        self.order: list[int] = []
        self._generator = generator or torch.Generator().manual_seed(0)
        self._prior = torch.zeros(num_units) if prior is None else prior.detach().clone()
        self.register_buffer("costs", costs.to(torch.get_default_dtype()))
        self.register_buffer("selected", torch.zeros(num_units, dtype=torch.bool))
        self.logits = nn.Parameter(torch.zeros(num_units))
        self._draw_logits()

    @property
    def num_phases(self) -> int:
        """Phases of the whole run; with a budget, the most that it can take."""
        sums = accumulate(sorted(self._prices))
        affordable = sum(cost <= self._most for cost in sums)
        return math.ceil(min(self.num_kept, affordable) / self.num_per_phase)

    @property
    def is_done(self) -> bool:
        """Whether no further unit may be selected."""
        taken = set(self.order)
        prices = (self._prices[unit] for unit in range(self.num_units) if unit not in taken)
        return len(taken) == self.num_kept or min(prices) > self._left()

    def gates(self) -> Tensor:
        """Shape (num_units,), differentiable: 1 for the selected, the others as `gate` says."""
        free = ~self.selected
        if self.gate == "linear" or not free.any():
            return torch.where(self.selected, 1.0, self.logits)
        logits, costs = self.logits[free], self.costs[free]
        weights = (logits - logits.detach().max()).exp()
        # divided as one number, equal logits give exactly 1: both sums are then the same
        scale = costs.sum() / (costs * weights).sum()
        if self.total == "one":
            scale = scale / len(costs)
        return torch.ones_like(self.logits).index_put((free,), weights * scale)

    def penalty(self, squared_norms: Tensor, strength: float | Tensor) -> Tensor:
        """What linear gates and the weights behind them pay; a scalar.

        strength / 2 times the sum over the unselected of omega (w^2 + ||b||^2), with w the gate, b
        the unit's weights and omega the square root of its cost. Minimised over w and b for a
        fixed product it is strength times omega ||w b||: the group LASSO (arXiv 2209.14881).

        Args:
            squared_norms: ||b||^2 of every unit, shape (num_units,).
            strength: The threshold is the largest ||gradient|| / omega among the unselected.

        Raises:
            ValueError: The gates are not linear.
        """
        if self.gate != "linear":
            raise ValueError(f"only linear gates have a penalty, got gate={self.gate!r}")
        each = self.costs.sqrt() * (self.logits.square() + squared_norms)
        return strength / 2 * each.masked_fill(self.selected, 0.0).sum()

    @torch.no_grad()
    def select(self) -> Tensor:
        """End a phase: the best unselected units join the selected, and logits are drawn anew.

        Best is the largest logit, of linear gates the largest absolute one (its square is the norm
        of the gated weights at the penalty's minimum); ties go to low indices. The caller forgets
        the optimizer's state of the logits.

        Returns:
            The picked units, best first, int64, shape (at most `num_per_phase`,).

        Raises:
            ValueError: `is_done` already, or the logits are not finite.
        """
        if self.is_done:
            raise ValueError(f"select: all {len(self.order)} picks are made; check is_done first")
        scores = self.logits.abs() if self.gate == "linear" else self.logits
        if not scores[~self.selected].isfinite().all():
            raise ValueError("select: logits must be finite; lower their learning rate")
        taken, left = set(self.order), self._left()
        room = min(self.num_per_phase, self.num_kept - len(self.order))
        picked: list[int] = []
        for unit in torch.sort(scores, descending=True, stable=True).indices.tolist():
            if unit not in taken and self._prices[unit] <= left and len(picked) < room:
                left -= self._prices[unit]
                picked.append(unit)
        self.selected[picked] = True
        self.order += picked
        self._draw_logits()
        return torch.tensor(picked, device=self.logits.device)

    def _left(self) -> float:
        """What is left of the budget."""
        return self._most - math.fsum(self._prices[unit] for unit in self.order)

    @torch.no_grad()
    def _draw_logits(self) -> None:
        noise = torch.randn(self.num_units, generator=self._generator)
        start = self._prior
        if self.gate == "linear":
            even = 1.0 if self.total == "unselected" else 1 / max(1, int((~self.selected).sum()))
            start = torch.full_like(start, even)
        self.logits.copy_(start + NOISE * noise)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors on the CPU."""
        position = torch.full((self.num_units,), -1)
        position[self.order] = torch.arange(len(self.order))
        return {
            "logits": self.logits.detach().cpu().clone(),
            "position": position,
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave; the picks that follow are those of the run it came from."""
        self.logits.copy_(state["logits"])
        position = state["position"]
        self.order = [unit for unit in position.argsort().tolist() if position[unit] >= 0]
        self.selected.copy_(position >= 0)
        self._generator.set_state(state["generator"])
