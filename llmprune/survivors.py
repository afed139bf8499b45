"""Who stays where importances decide: options of every layer, their choice, and the kept units.

An importance is what the loss rises by when a unit goes: not negative, additive, and comparable
between kinds and layers. A layer or sublayer that goes costs its own importance instead of its
units'; a KV group that goes instead of its heads'. What is chosen is in llmprune/allocation.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmprune.allocation import (
    Branch,
    Choice,
    Floats,
    LayerOptions,
    Problem,
    Stay,
    allocate,
    nearest_cost,
)
from llmprune.cost import CostLimit
from llmprune.errors import InputError
from llmprune.recipe import KindRule, UnitKind
from llmprune.units import (
    BRANCH_KINDS,
    LayerWidths,
    UnitGroup,
    UnitMap,
    Widths,
    query_heads_per_group,
)

# Hidden sizes tried in a round, and rounds (each narrows the range to a quarter).
HIDDEN_LEVELS = 9
HIDDEN_ROUNDS = 4

Size = tuple[int, int]


@dataclass(frozen=True)
class Allowance:
    """What each kind may keep and what all may cost.

    Attributes:
        allowed: Counts of each named kind, ascending (heads: per KV group); one for a fixed kind.
        rules: Of the named kinds.
        limit: On the cost of the whole shape.
        tied: Whether all layers take the same counts.
        tensor_parallel_size: What counts of pruned heads, KV groups and MLP channels divide by.
    """

    allowed: Mapping[UnitKind, Sequence[int]]
    rules: Mapping[UnitKind, KindRule]
    limit: CostLimit
    tied: bool
    tensor_parallel_size: int = 1

    @property
    def shared(self) -> list[UnitKind]:
        """The kinds that divide the budget."""
        return [kind for kind, rule in self.rules.items() if rule.sparsity is None]


@dataclass(frozen=True)
class Survivors:
    """The outcome.

    Attributes:
        kept: Group name -> ascending indices that stay, of every named kind.
        widths: The shape that is left.
        loss: Importance lost.
    """

    kept: Mapping[str, tuple[int, ...]]
    widths: Widths
    loss: float


def find_survivors(
    unit_map: UnitMap, importances: Mapping[str, Tensor], allowance: Allowance
) -> Survivors:
    """The units to keep so that the least importance is lost for what the limit allows.

    The hidden size multiplies everything else, so a few of them are tried, ever closer to the best.

    Args:
        unit_map: Of the dense model.
        importances: Group name -> importance of every unit, of all groups of the named kinds.
        allowance: Counts that are allowed, and the limit.

    Raises:
        InputError: Importances are missing or negative, or the limit can't be met.
    """
    values = {
        group.name: _importance(importances, group)
        for kind in allowance.allowed
        for group in unit_map.of_kind(kind)
    }
    hidden = list(allowance.allowed.get("hidden_channels", (unit_map.dense.hidden_size,)))
    tried: dict[int, _Trial] = {}
    low, high = 0, len(hidden) - 1
    for _ in range(HIDDEN_ROUNDS):
        grid = np.unique(np.linspace(low, high, HIDDEN_LEVELS).round().astype(int)).tolist()
        for place in grid:
            if place not in tried:
                tried[place] = _Trial(unit_map, values, allowance, hidden[place])
        places = sorted(tried)
        best = min(places, key=lambda place: tried[place].rank)
        if tried[best].rank == (False, 0.0):
            break
        at = places.index(best)
        low, high = places[max(0, at - 1)], places[min(len(places) - 1, at + 1)]
    trial = tried[best]
    if trial.choices is None:
        if trial.nearest is None:
            raise InputError(
                "prune: must allow some count of every kind, the rules of heads and kv_groups "
                "together allow none; lower multiple_of, min_kept or tensor_parallel_size"
            )
        raise allowance.limit.refusal(allowance.shared, trial.nearest)
    return trial.survivors()


class _Trial:
    """The best choice at one hidden size."""

    def __init__(
        self,
        unit_map: UnitMap,
        values: Mapping[str, Floats],
        allowance: Allowance,
        hidden_size: int,
    ) -> None:
        self.unit_map = unit_map
        self.values = values
        self.allowance = allowance
        self.hidden_size = hidden_size
        self.rest = allowance.limit.cost.rest(hidden_size)
        self.sizes = [self._attention_sizes(index) for index in range(unit_map.num_layers)]
        self.choices: list[Choice] | None = None
        if all(self.sizes):
            self.problem = _joined(self._problem())
            wanted = allowance.limit.wanted - self.rest
            self.choices = allocate(self.problem, wanted, allowance.limit.tolerance)
            if self.choices is not None:
                self.loss = self.problem.loss(self.choices) + self._hidden_loss()

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorts the best trial first; among those that miss the limit, the nearest."""
        if self.choices is not None:
            return False, self.loss
        return True, np.inf if self.nearest is None else abs(
            self.nearest - self.allowance.limit.wanted
        )

    @cached_property
    def nearest(self) -> float | None:
        """The cost nearest to the limit; None where the rules allow nothing."""
        if not all(self.sizes):
            return None
        found = nearest_cost(self.problem, self.allowance.limit.wanted - self.rest)
        return None if found is None else found + self.rest

    def _problem(self) -> Problem:
        layers = []
        for index in range(self.unit_map.num_layers):
            attention, mlp = self._attention(index), self._mlp(index)
            layers.append(LayerOptions(attention, mlp, self._own("layers", index)))
        stay = tuple(self._stay(kind) for kind in ("layers", *BRANCH_KINDS))
        return Problem(tuple(layers), (stay[0], stay[1], stay[2]), self.allowance.tied)

    def _own(self, kind: UnitKind, index: int) -> float | None:
        """Importance of a layer or sublayer itself, where it may go."""
        return float(self.values[kind][index]) if kind in self.allowance.allowed else None

    def _stay(self, kind: UnitKind) -> Stay:
        total = self.unit_map.num_layers
        counts = self.allowance.allowed.get(kind)
        if counts is None:
            return Stay((total,)) if kind == "layers" else Stay(tuple(range(1, total + 1)))
        if kind != "layers" and self.allowance.rules[kind].sparsity is not None:
            # layers that go take their sublayers along
            return Stay(tuple(range(1, counts[0] + 1)), most_alone=total - counts[0])
        return Stay(tuple(counts), most_alone=total)

    def _attention_sizes(self, index: int) -> list[Size]:
        """KV groups and query heads a group that the rules allow together."""
        layer, allowed = self.unit_map.layer(index), self.allowance.allowed
        ratio, groups = query_heads_per_group(layer), layer.num_key_value_heads
        if ratio == 1:
            return [
                (count, 1) for count in allowed.get("heads", allowed.get("kv_groups", [groups]))
            ]
        rule = self.allowance.rules.get("heads", KindRule())
        split = self.allowance.tensor_parallel_size
        sizes = [
            (group_count, head_count)
            for group_count in allowed.get("kv_groups", [groups])
            for head_count in allowed.get("heads", [ratio])
        ]
        return [
            (group_count, head_count)
            for group_count, head_count in sizes
            if group_count * head_count >= (rule.min_kept or 1)
            and (group_count * head_count % rule.multiple_of == 0 or head_count == ratio)
            and ("heads" not in allowed or group_count * head_count % split == 0)
        ]

    def _attention(self, index: int) -> Branch:
        losses = [self._kept_groups(index, size)[1] for size in self.sizes[index]]
        price = self.allowance.limit.cost.attention
        costs = [price(index, g * h, g, self.hidden_size) for g, h in self.sizes[index]]
        alone = self._own("attention_sublayers", index)
        return Branch(np.array(losses), np.array(costs, dtype=float), alone)

    def _kept_groups(self, index: int, size: Size) -> tuple[NDArray[Any], float]:
        """The KV groups that stay, ascending, and the importance that goes with the others."""
        layer = self.unit_map.layer(index)
        groups, ratio = layer.num_key_value_heads, query_heads_per_group(layer)
        heads = self.values.get(f"layers.{index}.heads", np.zeros(groups * ratio))
        own = self.values.get(f"layers.{index}.kv_groups", np.zeros(groups))
        if ratio == 1 and "heads" in self.allowance.allowed:
            own, heads = heads, np.zeros(groups)
        lost = np.sort(heads.reshape(groups, ratio))[:, : ratio - size[1]].sum(axis=1)
        order = np.argsort(lost - own, kind="stable")
        kept, gone = order[: size[0]], order[size[0] :]
        return np.sort(kept), float(lost[kept].sum() + own[gone].sum())

    def _mlp_counts(self, index: int) -> Sequence[int]:
        dense = self.unit_map.layer(index).intermediate_size
        return self.allowance.allowed.get("mlp_channels", (dense,))

    def _mlp(self, index: int) -> Branch:
        counts = np.array(self._mlp_counts(index))
        dense = self.unit_map.layer(index).intermediate_size
        channels = self.values.get(f"layers.{index}.mlp_channels", np.zeros(dense))
        # importance of the n least important ones
        least = np.concatenate([[0.0], np.cumsum(np.sort(channels))])
        price = self.allowance.limit.cost.mlp
        costs = [price(index, int(count), self.hidden_size) for count in counts]
        alone = self._own("mlp_sublayers", index)
        return Branch(least[dense - counts], np.array(costs, dtype=float), alone)

    def _hidden_loss(self) -> float:
        if "hidden_channels" not in self.values:
            return 0.0
        ordered = np.sort(self.values["hidden_channels"])
        return float(ordered[: len(ordered) - self.hidden_size].sum())

    def survivors(self) -> Survivors:
        """The kept units of the choice."""
        assert self.choices is not None
        total = self.unit_map.num_layers
        choices = self.choices if len(self.choices) == total else self.choices * total
        kept: dict[str, tuple[int, ...]] = {}
        if "hidden_channels" in self.values:
            kept["hidden_channels"] = _best(self.values["hidden_channels"], self.hidden_size)
        staying = [index for index, choice in enumerate(choices) if choice is not None]
        if "layers" in self.values:
            kept["layers"] = tuple(staying)
        for place, kind in enumerate(BRANCH_KINDS):
            if kind in self.values:
                kept[kind] = tuple(i for i in staying if (choices[i] or (0, 0))[place] is not None)
        layers = [self._keep(index, choice, kept) for index, choice in enumerate(choices)]
        return Survivors(kept, Widths(self.hidden_size, tuple(layers)), self.loss)

    def _keep(
        self, index: int, choice: Choice, kept: dict[str, tuple[int, ...]]
    ) -> LayerWidths | None:
        """Add the units that a layer keeps to `kept`; its widths."""
        if choice is None:
            return None
        attention, mlp = choice
        layer = self.unit_map.layer(index)
        heads, groups = layer.num_attention_heads, layer.num_key_value_heads
        channels, ratio = layer.intermediate_size, query_heads_per_group(layer)
        if attention is not None:
            size = self.sizes[index][attention]
            heads, groups = size[0] * size[1], size[0]
            stays = self._kept_groups(index, size)[0].tolist()
            if f"layers.{index}.kv_groups" in self.values:
                kept[f"layers.{index}.kv_groups"] = tuple(stays)
            name = f"layers.{index}.heads"
            if name in self.values:
                parts = self.values[name].reshape(-1, ratio)
                kept[name] = tuple(
                    group * ratio + head for group in stays for head in _best(parts[group], size[1])
                )
        if mlp is not None:
            channels = self._mlp_counts(index)[mlp]
            name = f"layers.{index}.mlp_channels"
            if name in self.values:
                kept[name] = _best(self.values[name], channels)
        return LayerWidths(
            heads, groups, channels, attention=attention is not None, mlp=mlp is not None
        )


def _joined(problem: Problem) -> Problem:
    """Tied layers of which none may go, as one; other problems as they are."""
    may_go = any(
        loss is not None
        for layer in problem.layers
        for loss in (layer.gone, layer.attention.gone, layer.mlp.gone)
    )
    if may_go or not problem.tied:
        return problem
    branches = [
        Branch(
            np.sum([branch.losses for branch in own], axis=0),
            np.sum([branch.costs for branch in own], axis=0),
        )
        for own in zip(*(layer.branches for layer in problem.layers), strict=True)
    ]
    return Problem((LayerOptions(branches[0], branches[1]),), (Stay((1,)),) * 3, tied=True)


def _best(values: Floats, count: int) -> tuple[int, ...]:
    """Ascending indices of the largest values; ties to low indices."""
    return tuple(sorted(np.argsort(-values, kind="stable")[:count].tolist()))


def _importance(importances: Mapping[str, Tensor], group: UnitGroup) -> Floats:
    found = importances.get(group.name)
    if found is None or len(found) != group.num_units:
        raise InputError(f"scores: must hold {group.num_units} scores for {group.name}")
    values = found.detach().double().cpu().numpy()
    if not np.isfinite(values).all() or values.min() < 0:
        raise InputError(
            f"scores: must be importances (finite, not negative) where budget.allocation is "
            f"importance, got {values.min():g} in {group.name}; calibrate with that allocation, or "
            "set budget.allocation: equal"
        )
    return values
