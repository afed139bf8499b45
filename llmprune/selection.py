"""Who competes with whom, and from scores to a PrunePlan; pure functions on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import UnitKind
from llmprune.scores import UnitScores
from llmprune.survivors import find_survivors
from llmprune.targets import Targets, competitions
from llmprune.units import BRANCH_KINDS, UnitGroup, UnitMap, unit_parameters

# The order in which kinds are chosen: what holds others comes before them.
CHOICE_ORDER: tuple[UnitKind, ...] = (
    "layers",
    "attention_sublayers",
    "mlp_sublayers",
    "kv_groups",
    "heads",
    "mlp_channels",
    "hidden_channels",
)


@dataclass(frozen=True)
class Pool:
    """Units that compete: slices `[start, stop)` of unit groups, and how many of them stay.

    With `costs` (one per unit, mean 1) as many stay as a `budget` in the same measure pays for;
    `num_kept` is then an estimate. With `num_rows` above 1 they compete within equal rows, each of
    which keeps its share of `num_kept`.
    """

    members: tuple[tuple[str, int, int], ...]
    num_kept: int
    costs: tuple[float, ...] | None = None
    budget: float | None = None
    num_rows: int = 1

    @property
    def num_units(self) -> int:
        """Units in the pool."""
        return sum(stop - start for _, start, stop in self.members)


def pools(unit_map: UnitMap, targets: Targets) -> list[Pool]:
    """Who competes with whom, and how many win.

    Where importances decide about every layer on its own, all heads, KV groups and MLP channels
    are in one pool, and compete for its parameters.
    """
    found = [] if targets.allowance is None else [_priced_pool(unit_map, targets)]
    for kind, count in targets.counts.items():
        if targets.allowance is not None and kind in targets.across:
            continue
        members = [competitions(unit_map, group) for group in unit_map.of_kind(kind)]
        if kind in targets.across:
            flat = tuple(part for parts in members for part in parts)
            found.append(Pool(flat, count * len(flat)))
        else:
            found += [Pool((part,), count) for parts in members for part in parts]
    return found


def _priced_pool(unit_map: UnitMap, targets: Targets) -> Pool:
    """Units of all layers and of every kind that is free in each: they compete for parameters."""
    members: list[tuple[str, int, int]] = []
    costs: list[float] = []
    budget = 0.0
    num_kept = 0
    for kind in (kind for kind in targets.counts if kind in targets.across):
        for group in unit_map.of_kind(kind):
            parts = competitions(unit_map, group)
            members += parts
            costs += [float(unit_parameters(unit_map, group))] * group.num_units
            num_kept += targets.counts[kind] * len(parts)
            budget += targets.counts[kind] * len(parts) * costs[-1]
    mean = math.fsum(costs) / len(costs)
    return Pool(tuple(members), num_kept, tuple(cost / mean for cost in costs), budget / mean)


def choose(unit_scores: UnitScores, unit_map: UnitMap, targets: Targets) -> PrunePlan:
    """The plan that keeps the best units in the counts that `targets` names.

    Raises:
        InputError: Scores are missing for a kind that is to be pruned.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for kind in targets.counts:
        for group in unit_map.of_kind(kind):
            if len(unit_scores.scores.get(group.name, ())) != group.num_units:
                raise InputError(f"scores: must hold {group.num_units} scores for {group.name}")
    if targets.allowance is not None:
        found = find_survivors(unit_map, unit_scores.scores, targets.allowance)
        return _plan(unit_scores, unit_map, found.kept)
    # what is inside a layer, a sublayer or a KV group is chosen after it
    for kind in sorted(targets.counts, key=CHOICE_ORDER.index):
        count = targets.counts[kind]
        groups = [group for group in unit_map.of_kind(kind) if _is_there(group, kept)]
        names = [group.name for group in groups]
        if kind in targets.across:
            ranks = unit_scores.order(names)
            multiple_of = targets.rules[kind].multiple_of
            parts = {group.name: _living_competitions(unit_map, group, kept) for group in groups}
            kept |= _choose_across(parts, ranks, count, multiple_of)
            continue
        for group in groups:
            ranks = unit_scores.order([group.name])
            if kind in BRANCH_KINDS and "layers" in kept:
                _rank_last(ranks[group.name], set(range(group.num_units)) - set(kept["layers"]))
                count = min(count, len(kept["layers"]))
            units: list[int] = []
            for _, start, stop in competitions(unit_map, group):
                best = ranks[group.name][start:stop].argsort(descending=True)[:count]
                units += (best + start).tolist()
            kept[group.name] = tuple(sorted(units))
    return _plan(unit_scores, unit_map, kept)


def _plan(
    unit_scores: UnitScores, unit_map: UnitMap, kept: Mapping[str, tuple[int, ...]]
) -> PrunePlan:
    scale = {
        name: tuple(unit_scores.scale[name][list(units)].tolist())
        for name, units in kept.items()
        if name in unit_scores.scale
    }
    return PrunePlan(model=unit_map.signature(), kept=kept, scale=scale)


def _is_there(group: UnitGroup, kept: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the layer of a group stays, and the sublayer that it is in."""
    if group.layer is None:
        return True
    around = "mlp_sublayers" if group.kind == "mlp_channels" else "attention_sublayers"
    return all(group.layer in kept[kind] for kind in ("layers", around) if kind in kept)


def _rank_last(ranks: Tensor, units: set[int]) -> None:
    """Put units below all others, in place."""
    ranks[sorted(units)] -= len(ranks)


def _living_competitions(
    unit_map: UnitMap, group: UnitGroup, kept: Mapping[str, tuple[int, ...]]
) -> list[tuple[int, int]]:
    """`(start, stop)` of every competition of a group but those in KV groups that went."""
    parts = [(start, stop) for _, start, stop in competitions(unit_map, group)]
    if group.kind != "heads" or len(parts) == 1:
        return parts
    kv_groups = kept.get(f"layers.{group.layer}.kv_groups", tuple(range(len(parts))))
    return [parts[index] for index in kv_groups]


def _choose_across(
    parts: Mapping[str, list[tuple[int, int]]],
    ranks: Mapping[str, Tensor],
    count: int,
    multiple_of: int,
) -> dict[str, tuple[int, ...]]:
    """Fill layers bundle by bundle, best first; every layer keeps at least its first bundle.

    A bundle is the next `multiple_of` best units of a layer (for heads: the next best of every KV
    group), so a layer's widths stay aligned and its KV groups equal. Where a bundle no longer fits
    its layer is full, so the total falls short of `count` a layer by less than a bundle.
    """
    bundles = []
    for name, own in parts.items():
        best = [(ranks[name][a:b].argsort(descending=True) + a).tolist() for a, b in own]
        step = math.lcm(multiple_of, len(best)) // len(best)
        for first in range(0, len(best[0]), step):
            units = [unit for part in best for unit in part[first : first + step]]
            mean = sum(int(ranks[name][unit]) for unit in units) / len(units)
            bundles.append((first > 0, -mean, name, units))
    budget = count * sum(len(own) for own in parts.values())
    chosen: dict[str, list[int]] = {name: [] for name in parts}
    full: set[str] = set()
    # ranks are distinct, so means tie only by chance; the sort is stable, by layer
    for is_extra, _, name, units in sorted(bundles, key=lambda bundle: bundle[:2]):
        if is_extra and (name in full or len(units) > budget):
            full.add(name)
            continue
        chosen[name] += units
        budget -= len(units)
    return {name: tuple(sorted(units)) for name, units in chosen.items()}
