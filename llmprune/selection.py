"""From rules and a budget to counts, from scores to a PrunePlan; pure functions on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from llmprune.cost import Cost, measure_cost
from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import Budget, KindRule, UnitKind
from llmprune.scores import UnitScores
from llmprune.units import (
    BRANCH_KINDS,
    LayerWidths,
    UnitGroup,
    UnitMap,
    Widths,
    query_heads_per_group,
)

# Shares tried when kinds divide a budget; finer than one channel in 4,096.
SHARES = 4096
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
class Targets:
    """How many units of each kind stay: per layer (per model for kinds that are not per layer).

    Heads are counted per KV group. `across` names the kinds whose units compete across layers;
    for these the count is the mean over layers.
    """

    counts: Mapping[UnitKind, int]
    rules: Mapping[UnitKind, KindRule]

    @property
    def across(self) -> frozenset[UnitKind]:
        """Kinds whose layers may end with different widths."""
        per_layer: tuple[UnitKind, ...] = ("heads", "kv_groups", "mlp_channels")
        return frozenset(
            k for k, rule in self.rules.items() if k in per_layer and rule.scope == "model"
        )


@dataclass(frozen=True)
class Pool:
    """Units that compete: slices `[start, stop)` of unit groups, and how many of them stay."""

    members: tuple[tuple[str, int, int], ...]
    num_kept: int

    @property
    def num_units(self) -> int:
        """Units in the pool."""
        return sum(stop - start for _, start, stop in self.members)


def find_targets(
    unit_map: UnitMap, rules: Mapping[UnitKind, KindRule], budget: Budget | None
) -> Targets:
    """Counts that follow each kind's own sparsity, and share the budget among the other kinds.

    The kinds without a sparsity of their own take the same share; the finest of them makes up what
    the rounding of the others left.

    Raises:
        InputError: A `multiple_of` that no count fits, a sparsity that removes nothing, a budget
            that no choice meets, or a kind that the layers have different numbers of.
    """
    _refuse_aliases(unit_map, rules)
    _refuse_differing(unit_map, rules)
    allowed = {kind: _allowed_counts(unit_map, kind, rule) for kind, rule in rules.items()}
    fixed: dict[UnitKind, int] = {}
    for kind, rule in rules.items():
        if rule.sparsity is not None:
            fixed[kind] = _count_for(kind, rule.sparsity, allowed[kind])
    shared = [kind for kind, rule in rules.items() if rule.sparsity is None]
    if budget is None or not shared:
        return Targets(fixed, dict(rules))
    limit = _cost_of(measure_cost(unit_map), budget)
    wanted = limit * (1 - budget.sparsity)
    best = fixed | _share_out(unit_map, fixed, shared, allowed, wanted, budget)
    reached = _cost_of(measure_cost(unit_map, target_widths(unit_map, best)), budget)
    if abs(reached - wanted) > budget.tolerance * limit:
        raise InputError(
            f"budget: sparsity {budget.sparsity:g} of {budget.of} must be met within "
            f"{budget.tolerance:g}, the nearest that {', '.join(shared)} can reach is "
            f"{1 - reached / limit:.4f}; name more kinds, lower multiple_of or raise tolerance"
        )
    return Targets(best, dict(rules))


def target_widths(unit_map: UnitMap, counts: Mapping[UnitKind, int]) -> Widths:
    """The shape that counts leave (which layers go makes no difference to it: the last do)."""
    layers: list[LayerWidths | None] = []
    for index in range(unit_map.num_layers):
        dense = unit_map.layer(index)
        kv_heads = counts.get("kv_groups", dense.num_key_value_heads)
        heads = counts.get("heads", query_heads_per_group(dense))
        widths = LayerWidths(
            num_attention_heads=kv_heads * heads,
            num_key_value_heads=kv_heads,
            intermediate_size=counts.get("mlp_channels", dense.intermediate_size),
            attention=index < counts.get("attention_sublayers", unit_map.num_layers),
            mlp=index < counts.get("mlp_sublayers", unit_map.num_layers),
        )
        if query_heads_per_group(dense) == 1 and "heads" in counts:
            both = counts["heads"]
            widths = replace(widths, num_attention_heads=both, num_key_value_heads=both)
        layers.append(widths if index < counts.get("layers", unit_map.num_layers) else None)
    hidden = counts.get("hidden_channels", unit_map.dense.hidden_size)
    return Widths(hidden_size=hidden, layers=tuple(layers))


def pools(unit_map: UnitMap, targets: Targets) -> list[Pool]:
    """Who competes with whom, and how many win."""
    found = []
    for kind, count in targets.counts.items():
        members = [_competitions(unit_map, group) for group in unit_map.of_kind(kind)]
        if kind in targets.across:
            flat = tuple(part for parts in members for part in parts)
            found.append(Pool(flat, count * len(flat)))
        else:
            found += [Pool((part,), count) for parts in members for part in parts]
    return found


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
            for _, start, stop in _competitions(unit_map, group):
                best = ranks[group.name][start:stop].argsort(descending=True)[:count]
                units += (best + start).tolist()
            kept[group.name] = tuple(sorted(units))
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
    parts = [(start, stop) for _, start, stop in _competitions(unit_map, group)]
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


def _competitions(unit_map: UnitMap, group: UnitGroup) -> tuple[tuple[str, int, int], ...]:
    """Heads compete inside their KV group (GQA keeps equally many in each), all else as a whole."""
    if group.kind == "heads":
        assert group.layer is not None
        per_group = query_heads_per_group(unit_map.layer(group.layer))
        if per_group > 1:
            starts = range(0, group.num_units, per_group)
            return tuple((group.name, start, start + per_group) for start in starts)
    return ((group.name, 0, group.num_units),)


def _refuse_aliases(unit_map: UnitMap, rules: Mapping[UnitKind, KindRule]) -> None:
    if {"heads", "kv_groups"} <= set(rules) and query_heads_per_group(unit_map.layer(0)) == 1:
        raise InputError(
            "prune: must name heads or kv_groups, not both, for a model with one query head per "
            "key-value head: they are the same units"
        )


def _refuse_differing(unit_map: UnitMap, rules: Mapping[UnitKind, KindRule]) -> None:
    for kind in rules:
        groups = unit_map.of_kind(kind)
        sizes = {(group.num_units, len(_competitions(unit_map, group))) for group in groups}
        if len(sizes) > 1:
            raise InputError(
                f"prune.{kind}: must be equally many in every layer, got {min(sizes)[0]} to "
                f"{max(sizes)[0]}; prune the dense model instead, or other kinds"
            )


def _allowed_counts(unit_map: UnitMap, kind: UnitKind, rule: KindRule) -> list[int]:
    """Counts that a rule allows, ascending; heads per KV group."""
    group = unit_map.of_kind(kind)[0]
    num_units, times = group.num_units, 1
    if kind == "heads":
        per_group = query_heads_per_group(unit_map.layer(0))
        if per_group > 1:
            num_units, times = per_group, group.num_units // per_group
    counts = [n for n in range(1, num_units + 1) if n * times % rule.multiple_of == 0]
    if not counts:
        raise InputError(
            f"prune.{kind}.multiple_of must fit into the {num_units * times} units there are, "
            f"got {rule.multiple_of}"
        )
    return counts if counts[-1] == num_units else [*counts, num_units]


def _count_for(kind: UnitKind, sparsity: float, allowed: list[int]) -> int:
    count = _nearest(allowed, allowed[-1] * (1 - sparsity))
    if sparsity > 0 and count == allowed[-1]:
        least = 1 - allowed[-2] / allowed[-1] if len(allowed) > 1 else None
        hint = "no other count is allowed" if least is None else f"the least step is {least:.3f}"
        raise InputError(
            f"prune.{kind}.sparsity must remove something, got {sparsity:g} of {allowed[-1]}: "
            f"{hint}"
        )
    return count


def _nearest(allowed: list[int], wanted: float) -> int:
    return min(allowed, key=lambda count: (abs(count - wanted), -count))


def _cost_of(cost: Cost, budget: Budget) -> int:
    return int(getattr(cost, budget.of))


def _share_out(
    unit_map: UnitMap,
    fixed: Mapping[UnitKind, int],
    shared: list[UnitKind],
    allowed: Mapping[UnitKind, list[int]],
    wanted: float,
    budget: Budget,
) -> dict[UnitKind, int]:
    """Counts at the common share whose cost is nearest to `wanted`, refined in the finest kind."""

    def cost(counts: Mapping[UnitKind, int]) -> int:
        widths = target_widths(unit_map, {**fixed, **counts})
        return _cost_of(measure_cost(unit_map, widths), budget)

    def at(share: int) -> dict[UnitKind, int]:
        return {k: _nearest(allowed[k], allowed[k][-1] * (1 - share / SHARES)) for k in shared}

    low, high = 0, SHARES
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(at(middle)) > wanted else (low, middle)
    best: dict[UnitKind, int] | None = None
    finest = max(shared, key=lambda kind: len(allowed[kind]))
    for start in (at(low), at(high)):
        refined = _refine(start, finest, allowed[finest], cost, wanted)
        if best is None or abs(cost(refined) - wanted) < abs(cost(best) - wanted):
            best = refined
    assert best is not None
    return best


def _refine(
    counts: dict[UnitKind, int],
    kind: UnitKind,
    allowed: list[int],
    cost: Callable[[Mapping[UnitKind, int]], int],
    wanted: float,
) -> dict[UnitKind, int]:
    low, high = 0, len(allowed) - 1
    while low < high:
        middle = (low + high) // 2
        if cost({**counts, kind: allowed[middle]}) < wanted:
            low = middle + 1
        else:
            high = middle
    near = {allowed[max(0, low - 1)], allowed[low]}
    return min(({**counts, kind: n} for n in sorted(near)), key=lambda c: abs(cost(c) - wanted))
