"""Sequential Attention++ over any groups of units: logits, phases, who survives.

Nothing of transformers is in here. A problem gives the sizes of its groups and how many units each
keeps; `SequentialAttention` holds a logit per unit and says at every step what each unit's gate is.
It starts from all units and takes some away; `llmprune.forward_selection` has the two variants that
start from none and add: `softmax`, Sequential Attention as published, and `linear`, the form that
theory speaks of. The three here share schedule, masks and bookkeeping:

* `plus_plus` - SequentialAttention++ as published (Yasuda et al. 2024, arXiv 2402.17902): attention
  A = n softmax(L) over the units that are alive, clipped to [density, 1 / density], times a 0/1
  mask that a sparsification phase shrinks. What the paper leaves open is fixed here: masked logits
  leave the softmax and n counts the living, so the mean of A over the living stays 1.
* `capped` - the default for language models: gates min(1, exp(T L - tau)) that sum to the shrinking
  budget. At full budget they are exactly 1 whatever the logits are (the paper's A scales units
  before anything is removed); units at 1 are Sequential Attention's selected set, the others share
  what is left by a softmax. The temperature T rises until nothing is soft.
* `magnitude` - the control: masks move as in `plus_plus`, but by scores that are handed in, and
  no logit learns.

The budget of a sparsification phase falls along the published curve (`gradual`) or is final from
the first step (`at_once`). By the paper's own ablation about three quarters of its gain over plain
alternation of dense and sparse phases come with the gradual curve; with capped gates, which are
soft by themselves at first, it is the other way round (docs/sequential-attention.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmprune.capped_softmax import capped_softmax, fill

PhaseKind = Literal["dense", "sparsify", "sparse"]
Variant = Literal["capped", "plus_plus", "magnitude"]
Curve = Literal["gradual", "at_once"]

# The curve of the budget in a sparsification phase: fast first, slow at the end (the paper's c).
CURVATURE = 4.0


def sparsity_at(progress: float, final: float) -> float:
    """Share removed at `progress` in [0, 1] of a sparsification phase (arXiv 2402.17902)."""
    return final * (1 - math.exp(-CURVATURE * progress)) / (1 - math.exp(-CURVATURE))


@dataclass(frozen=True)
class Phase:
    """`num_steps` steps of one kind."""

    kind: PhaseKind
    num_steps: int


@dataclass(frozen=True)
class Moment:
    """Where a step is: the phase, its kind, progress in (0, 1] at the step's end."""

    phase: int
    kind: PhaseKind
    progress: float
    begins_phase: bool


@dataclass(frozen=True)
class Schedule:
    """The phases of one run, in order."""

    phases: tuple[Phase, ...]

    @staticmethod
    def of_cycles(
        num_steps: int, *, dense: float, sparsify: float, sparse: float, cycles: int = 1
    ) -> Schedule:
        """`cycles` times dense, sparsify, sparse, each taking its share of the steps.

        Steps are shared out so that they add up to `num_steps`; a phase whose share rounds to no
        step is left out.
        """
        shares: list[tuple[PhaseKind, float]] = [
            ("dense", dense),
            ("sparsify", sparsify),
            ("sparse", sparse),
        ]
        phases, end, taken = [], 0.0, 0
        for _ in range(cycles):
            for kind, share in shares:
                end += share * num_steps / cycles
                count = round(end) - taken
                taken += count
                if count:
                    phases.append(Phase(kind, count))
        return Schedule(tuple(phases))

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    def at(self, step: int) -> Moment:
        """Where step `step` (from 0) is.

        Raises:
            IndexError: The schedule has no such step.
        """
        first = 0
        for index, phase in enumerate(self.phases):
            if first <= step < first + phase.num_steps:
                progress = (step - first + 1) / phase.num_steps
                return Moment(index, phase.kind, progress, begins_phase=step == first)
            first += phase.num_steps
        raise IndexError(f"the schedule has steps 0 to {first - 1}, got {step}")


@dataclass(frozen=True)
class Group:
    """Units that compete with one another: how many there are and how many stay.

    Attributes:
        num_units: How many there are.
        num_kept: How many stay; with costs, the most that may.
        costs: Cost per unit, positive, or None where all count alike.
        budget: With costs: what the units that stay may cost together.
        num_rows: Equal groups side by side, in one tensor: units compete within their row of
            `num_units / num_rows`, and every row keeps `num_kept / num_rows`. Without costs only.
    """

    num_units: int
    num_kept: int
    costs: tuple[float, ...] | None = None
    budget: float | None = None
    num_rows: int = 1

    def __post_init__(self) -> None:
        if self.num_units % self.num_rows or self.num_kept % self.num_rows:
            raise ValueError(
                f"rows of a group must be equal, got {self.num_units} units of which "
                f"{self.num_kept} stay in {self.num_rows} rows"
            )
        if self.num_rows > 1 and self.costs is not None:
            raise ValueError("a group of several rows takes no costs")
        if not 1 <= self.num_kept <= self.num_units:
            raise ValueError(
                f"a group must keep between 1 and {self.num_units} units, got {self.num_kept}"
            )
        if (self.costs is None) != (self.budget is None):
            raise ValueError("a group needs costs and a budget, or neither")

    @staticmethod
    def of_costs(costs: Sequence[float], budget: float) -> Group:
        """Units of unequal cost, of which those stay that a budget pays for.

        Raises:
            ValueError: A cost that is not positive, or a budget that pays for no unit or for more
                than all.
        """
        if not costs or min(costs) <= 0:
            raise ValueError(f"costs must be positive, got {list(costs)}")
        total = math.fsum(costs)
        if not min(costs) <= budget <= total * (1 + 1e-9):
            raise ValueError(f"budget must be between {min(costs)} and {total}, got {budget}")
        prices = torch.tensor(costs, dtype=torch.float64)
        most = fill(-prices, budget, prices)
        return Group(len(costs), int(most.sum()), tuple(costs), min(budget, total))

    @property
    def total(self) -> float:
        """Cost of all units; without costs, their number."""
        return self.num_units if self.costs is None else math.fsum(self.costs)

    @property
    def final(self) -> float:
        """Cost of what stays, at most; without costs, `num_kept`."""
        return self.num_kept if self.budget is None else self.budget

    @property
    def density(self) -> float:
        """Share of the cost that stays."""
        return self.final / self.total

    def budget_at(self, progress: float) -> float:
        """Units (with costs: cost) allowed to a row at `progress` of a sparsification phase."""
        return self.total * (1 - sparsity_at(progress, 1 - self.density)) / self.num_rows

    def in_rows(self, values: Tensor) -> Tensor:
        """A tensor of a value per unit, shape (num_units,), with rows as its last dimension."""
        return values if self.num_rows == 1 else values.unflatten(0, (self.num_rows, -1))


def attention(
    logits: Tensor, keep_mask: Tensor, density: float, costs: Tensor | None = None
) -> Tensor:
    """SequentialAttention++'s A over the living units: n softmax, clipped to [density, 1/density].

    With costs it is C e^L / sum(c e^L), C the cost of the living: 1 at equal logits like the
    paper's, exactly, but what is shared out is cost.

    Args:
        logits: Shape (..., n), every row a group.
        keep_mask: Bool, of the same shape; at least one True in a row.
        density: Share of the units (of the cost) that the group keeps in the end.
        costs: Shape (n,), positive; default 1.

    Returns:
        Of the same shape, zero where `keep_mask` is False, mean 1 (weighted by cost) over the rest
        of a row before clipping.
    """
    costs = torch.ones_like(logits) if costs is None else costs.to(logits)
    masked = logits.masked_fill(~keep_mask, -torch.inf)
    weights = (masked - masked.detach().amax(-1, keepdim=True)).exp()
    # divided as one number, equal logits give exactly 1: both sums are then the same
    scale = (costs * keep_mask).sum(-1, keepdim=True) / (costs * weights).sum(-1, keepdim=True)
    return (weights * scale).clamp(density, 1 / density) * keep_mask


class SequentialAttention(nn.Module):
    """A logit per unit, the mask of the living, and the schedule that thins them out.

    Attributes:
        logits: One parameter per group, shape (num_units,), float32.
        keep_masks: One bool tensor per group, True = alive.
        dropped_at: Per group the step at which each unit left for good, int64, -1 while alive.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        schedule: Schedule,
        *,
        variant: Variant = "capped",
        priors: Sequence[Tensor] | None = None,
        temperature: tuple[float, float] = (1.0, 30.0),
        curve: Curve = "gradual",
    ) -> None:
        """All units are alive.

        Args:
            groups: Who competes with whom.
            schedule: The phases.
            variant: What gates are made of.
            priors: Where the logits start, one tensor per group; 0 by default.
            temperature: Of the capped variant, at the start and end of a sparsification phase.
            curve: How the budget falls in a sparsification phase: as the paper has it, or to its
                final value at the first step.
        """
        super().__init__()
        self.groups = tuple(groups)
        self.schedule = schedule
        self.variant = variant
        self.temperature = temperature
        self.curve = curve
        self.costs = [
            None if group.costs is None else torch.tensor(group.costs, dtype=torch.float64)
            for group in self.groups
        ]
        self._has_scores = priors is not None
        starts = priors or [torch.zeros(group.num_units) for group in self.groups]
        self.logits = nn.ParameterList(nn.Parameter(start.float().clone()) for start in starts)
        sizes = [group.num_units for group in self.groups]
        self.keep_masks = [torch.ones(size, dtype=torch.bool) for size in sizes]
        self.dropped_at = [torch.full((size,), -1) for size in sizes]
        if variant == "magnitude":
            self.logits.requires_grad_(False)

    @torch.no_grad()
    def set_scores(self, scores: Sequence[Tensor]) -> None:
        """Hand in what the `magnitude` variant ranks by; before every step, as weights move.

        Args:
            scores: One tensor per group, shape (num_units,), higher stays. They take the place of
                the logits, so that masks, survivors and state follow them.

        Raises:
            ValueError: Another variant, which learns its logits.
        """
        if self.variant != "magnitude":
            raise ValueError(f"only the magnitude variant takes scores, got {self.variant!r}")
        for logits, values in zip(self.logits, scores, strict=True):
            logits.copy_(values)
        self._has_scores = True

    def gates(self, step: int) -> list[Tensor]:
        """Gates of step `step`, one tensor per group, differentiable in the logits.

        Also moves the masks to where the schedule has them at this step, so steps must come in
        order; calling twice for one step changes nothing more.
        """
        if self.variant == "magnitude" and not self._has_scores:
            raise ValueError("the magnitude variant needs scores; call set_scores before gates")
        moment = self.schedule.at(step)
        return [self._gate(index, step, moment) for index in range(len(self.groups))]

    def _gate(self, index: int, step: int, moment: Moment) -> Tensor:
        group, logits, costs = self.groups[index], self.logits[index], self.costs[index]
        if self.variant != "capped":
            self._move_mask(index, step, moment)
            mask = self.keep_masks[index].to(logits.device)
            if self.variant == "magnitude":
                return mask.to(logits.dtype)
            rows, masks = group.in_rows(logits), group.in_rows(mask)
            return attention(rows, masks, group.density, costs).flatten()
        if moment.kind == "dense":
            return capped_softmax(logits, math.inf)
        if moment.kind == "sparsify":
            rows = self._temperature_at(moment.progress) * group.in_rows(logits)
            return capped_softmax(rows, self._budget_at(group, moment), costs).flatten()
        return self._fill(index, logits, group.final / group.num_rows).to(logits) + 0.0 * logits

    def settings_at(self, step: int) -> dict[str, float]:
        """`budget`, the share of the units that a step allows; `temperature` where there is one."""
        moment, sizes = self.schedule.at(step), [group.num_units for group in self.groups]
        shares = [1.0 if moment.kind == "dense" else group.density for group in self.groups]
        found = {}
        if moment.kind == "sparsify":
            shares = [self._budget_at(g, moment) * g.num_rows / g.total for g in self.groups]
            if self.variant == "capped":
                found["temperature"] = self._temperature_at(moment.progress)
        whole = math.fsum(share * size for share, size in zip(shares, sizes, strict=True))
        return {"budget": whole / sum(sizes), **found}

    def _temperature_at(self, progress: float) -> float:
        first, last = self.temperature
        return first * (last / first) ** progress

    def _budget_at(self, group: Group, moment: Moment) -> float:
        return group.budget_at(moment.progress if self.curve == "gradual" else 1.0)

    def _fill(self, index: int, values: Tensor, budget: float) -> Tensor:
        """Bool mask of the units with the largest values that the budget of a row pays for."""
        group, costs = self.groups[index], self.costs[index]
        if costs is None:
            # the last step's budget is num_kept up to rounding errors, which must not add a unit
            return fill(group.in_rows(values), math.ceil(budget - 1e-9)).flatten()
        # one that the final budget cannot pay for must not push out those that it can
        hopeless = (costs > group.final).to(values.device)
        return fill(values.masked_fill(hopeless, -torch.inf), budget, costs)

    def _move_mask(self, index: int, step: int, moment: Moment) -> None:
        """Dense: all live again. Sparsify: the lowest logits among the living leave."""
        mask = self.keep_masks[index]
        if moment.kind == "dense":
            mask.fill_(True)
            self.dropped_at[index].fill_(-1)
        if moment.kind == "sparsify":
            alive = self.logits[index].detach().cpu().masked_fill(~mask, -torch.inf)
            keep_mask = self._fill(index, alive, self._budget_at(self.groups[index], moment))
            self.dropped_at[index][mask & ~keep_mask] = step
            self.keep_masks[index] = keep_mask

    def survivors(self) -> list[Tensor]:
        """Who stays: one bool tensor per group, ties to low indices.

        `num_kept` are True in each; with costs, as many as its budget pays for.
        """
        chosen = []
        for index, (logits, mask) in enumerate(zip(self.logits, self.keep_masks, strict=True)):
            alive = logits.detach().cpu().masked_fill(~mask, -torch.inf)
            group = self.groups[index]
            chosen.append(self._fill(index, alive, group.final / group.num_rows))
        return chosen

    def scales(self) -> list[Tensor]:
        """The gate that each survivor ends with (1 but for `plus_plus`), shape (num_units,)."""
        survivors = self.survivors()
        if self.variant != "plus_plus":
            return [keep_mask.float() for keep_mask in survivors]
        return [
            attention(
                group.in_rows(logits.detach().cpu()),
                group.in_rows(keep_mask),
                group.density,
                costs,
            ).flatten()
            for group, logits, keep_mask, costs in zip(
                self.groups, self.logits, survivors, self.costs, strict=True
            )
        ]

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors (contiguous, on the CPU)."""
        state = {}
        for index, logits in enumerate(self.logits):
            state[f"logits.{index}"] = logits.detach().cpu().clone()
            state[f"keep_mask.{index}"] = self.keep_masks[index].clone()
            state[f"dropped_at.{index}"] = self.dropped_at[index].clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self._has_scores = True
        with torch.no_grad():
            for index, logits in enumerate(self.logits):
                logits.copy_(state[f"logits.{index}"])
                self.keep_masks[index] = state[f"keep_mask.{index}"].clone()
                self.dropped_at[index] = state[f"dropped_at.{index}"].clone()
