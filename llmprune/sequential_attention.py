"""Sequential Attention++ over any groups of units: logits, phases, who survives.

Nothing of transformers is in here. A problem gives the sizes of its groups and how many units each
keeps; `SequentialAttention` holds a logit per unit and says at every step what each unit's gate is.
Two variants share schedule, masks and bookkeeping:

* `plus_plus` - SequentialAttention++ as published (Yasuda et al. 2024, arXiv 2402.17902): attention
  A = n softmax(L) over the units that are alive, clipped to [density, 1 / density], times a 0/1
  mask that a sparsification phase shrinks. What the paper leaves open is fixed here: masked logits
  leave the softmax and n counts the living, so the mean of A over the living stays 1.
* `capped` - the default for language models: gates min(1, exp(T L - tau)) that sum to the shrinking
  budget. At full budget they are exactly 1 whatever the logits are (the paper's A scales units
  before anything is removed); units at 1 are Sequential Attention's selected set, the others share
  what is left by a softmax. The temperature T rises until nothing is soft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

PhaseKind = Literal["dense", "sparsify", "sparse"]
Variant = Literal["capped", "plus_plus"]

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
    """Units that compete with one another: how many there are and how many stay."""

    num_units: int
    num_kept: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_kept <= self.num_units:
            raise ValueError(
                f"a group must keep between 1 and {self.num_units} units, got {self.num_kept}"
            )

    def budget_at(self, progress: float) -> float:
        """Units allowed at `progress` of a sparsification phase; a real number."""
        final = 1 - self.num_kept / self.num_units
        return self.num_units * (1 - sparsity_at(progress, final))


def capped_softmax(logits: Tensor, budget: float) -> Tensor:
    """Gates min(1, exp(logits - tau)) with tau such that they sum to `budget`.

    Water-filling: the m largest logits saturate at 1, where m is the smallest count for which the
    softmax of the rest, scaled to budget - m, stays below 1. The gradient flows through the rest.

    Args:
        logits: Shape (n,), float.
        budget: In (0, n]; at n the result is exactly 1 everywhere.

    Returns:
        Gates in (0, 1], shape (n,), summing to `budget`.
    """
    num_units = logits.shape[0]
    if budget >= num_units:
        # keeps the graph: a logit that has no say yet has gradient zero, not none
        return torch.ones_like(logits) + 0.0 * logits
    ordered, order = logits.detach().double().sort(descending=True)
    tail = torch.logcumsumexp(ordered.flip(0), 0).flip(0)
    saturated = torch.arange(num_units, dtype=torch.float64, device=logits.device)
    left = (budget - saturated).clamp(min=torch.finfo(torch.float64).tiny)
    fits = (ordered - tail + left.log() <= 0) & (saturated < budget)
    count = int(fits.int().argmax())
    free = order[count:]
    gates = torch.ones_like(logits)
    return gates.index_put((free,), (budget - count) * torch.softmax(logits[free], 0))


def attention(logits: Tensor, keep_mask: Tensor, density: float) -> Tensor:
    """SequentialAttention++'s A over the living units: n softmax, clipped to [density, 1/density].

    Args:
        logits: Shape (n,).
        keep_mask: Bool, shape (n,); at least one True.
        density: Share of the units that the group keeps in the end.

    Returns:
        Shape (n,), zero where `keep_mask` is False, mean 1 over the rest before clipping.
    """
    masked = logits.masked_fill(~keep_mask, -torch.inf)
    weights = keep_mask.sum() * torch.softmax(masked, 0)
    return weights.clamp(density, 1 / density) * keep_mask


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
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.schedule = schedule
        self.variant = variant
        self.temperature = temperature
        starts = priors or [torch.zeros(group.num_units) for group in self.groups]
        self.logits = nn.ParameterList(nn.Parameter(start.float().clone()) for start in starts)
        sizes = [group.num_units for group in self.groups]
        self.keep_masks = [torch.ones(size, dtype=torch.bool) for size in sizes]
        self.dropped_at = [torch.full((size,), -1) for size in sizes]

    def gates(self, step: int) -> list[Tensor]:
        """Gates of step `step`, one tensor per group, differentiable in the logits.

        Also moves the masks to where the schedule has them at this step, so steps must come in
        order; calling twice for one step changes nothing more.
        """
        moment = self.schedule.at(step)
        return [self._gate(index, step, moment) for index in range(len(self.groups))]

    def _gate(self, index: int, step: int, moment: Moment) -> Tensor:
        group, logits = self.groups[index], self.logits[index]
        if self.variant == "plus_plus":
            self._move_mask(index, step, moment)
            mask = self.keep_masks[index].to(logits.device)
            return attention(logits, mask, group.num_kept / group.num_units)
        if moment.kind == "dense":
            return capped_softmax(logits, group.num_units)
        if moment.kind == "sparsify":
            temperature = self._temperature_at(moment.progress)
            return capped_softmax(temperature * logits, group.budget_at(moment.progress))
        return _top(logits, group.num_kept).to(logits) + 0.0 * logits

    def _temperature_at(self, progress: float) -> float:
        first, last = self.temperature
        return first * (last / first) ** progress

    def _move_mask(self, index: int, step: int, moment: Moment) -> None:
        """Dense: all live again. Sparsify: the lowest logits among the living leave."""
        group, mask = self.groups[index], self.keep_masks[index]
        if moment.kind == "dense":
            mask.fill_(True)
            self.dropped_at[index].fill_(-1)
        if moment.kind == "sparsify":
            # the last step's budget is num_kept up to rounding errors, which must not add a unit
            allowed = math.ceil(group.budget_at(moment.progress) - 1e-9)
            alive = self.logits[index].detach().cpu().masked_fill(~mask, -torch.inf)
            keep_mask = _top(alive, min(allowed, int(mask.sum())))
            self.dropped_at[index][mask & ~keep_mask] = step
            self.keep_masks[index] = mask & keep_mask

    def survivors(self) -> list[Tensor]:
        """Who stays: one bool tensor per group, `num_kept` True in each; ties to low indices."""
        chosen = []
        for group, logits, mask in zip(self.groups, self.logits, self.keep_masks, strict=True):
            alive = logits.detach().cpu().masked_fill(~mask, -torch.inf)
            chosen.append(_top(alive, group.num_kept))
        return chosen

    def scales(self) -> list[Tensor]:
        """The gate that each survivor ends with (1 in the capped variant), shape (num_units,)."""
        survivors = self.survivors()
        if self.variant == "capped":
            return [keep_mask.float() for keep_mask in survivors]
        return [
            attention(logits.detach().cpu(), keep_mask, group.num_kept / group.num_units)
            for group, logits, keep_mask in zip(self.groups, self.logits, survivors, strict=True)
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
        with torch.no_grad():
            for index, logits in enumerate(self.logits):
                logits.copy_(state[f"logits.{index}"])
                self.keep_masks[index] = state[f"keep_mask.{index}"].clone()
                self.dropped_at[index] = state[f"dropped_at.{index}"].clone()


def _top(values: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` largest; of equal values the one with the lower index first."""
    order = torch.sort(values.detach(), descending=True, stable=True).indices
    keep_mask = torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    keep_mask[order[:count]] = True
    return keep_mask
