"""From rules and a budget to counts: how many units of each kind stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.cost import CostLimit, CountedCost, ShapeCost, total_cost
from llmprune.errors import InputError
from llmprune.recipe import Budget, KindRule, Recipe, UnitKind
from llmprune.survivors import Allowance, Survivors, find_survivors
from llmprune.units import (
    LayerWidths,
    UnitGroup,
    UnitMap,
    Widths,
    query_heads_per_group,
)

PER_LAYER: tuple[UnitKind, ...] = ("heads", "kv_groups", "mlp_channels")
# Shares tried when kinds divide a budget; finer than one channel in 4,096.
SHARES = 4096


@dataclass(frozen=True)
class Targets:
    """How many units of each kind stay: per layer (per model for kinds that are not per layer).

    Heads are counted per KV group. `across` names the kinds whose units compete across layers;
    for these the count is the mean over layers. With an `allowance` the counts are an estimate:
    what stays is decided by importances.
    """

    counts: Mapping[UnitKind, int]
    rules: Mapping[UnitKind, KindRule]
    allowance: Allowance | None = None

    @property
    def across(self) -> frozenset[UnitKind]:
        """Kinds whose layers may end with different widths."""
        if self.allowance is not None:
            return frozenset(self.allowance.shared).intersection(PER_LAYER)
        return frozenset(
            k for k, rule in self.rules.items() if k in PER_LAYER and rule.scope == "model"
        )


def find_targets(
    unit_map: UnitMap,
    rules: Mapping[UnitKind, KindRule],
    budget: Budget | None,
    *,
    tied: bool = True,
    tensor_parallel_size: int = 1,
    importances: Mapping[str, Tensor] | None = None,
    latency: ShapeCost | None = None,
) -> Targets:
    """Counts that follow each kind's own sparsity, and share the budget among the other kinds.

    With `allocation: equal` the kinds without a sparsity of their own take the same share; the
    finest of them makes up what the rounding of the others left. With `importance` they take what
    loses the least importance: at once where layers are tied and importances are known, and
    otherwise when `choose` knows them; until then the counts are those of equal shares, or, where
    importances of before are known, what they let expect.

    Args:
        unit_map: Of the dense model.
        rules: Of the kinds that may go.
        budget: What they share.
        tied: Whether all layers take the same counts (`export.format: uniform`).
        tensor_parallel_size: What counts of heads, KV groups and MLP channels must divide by.
        importances: Group name -> importance of every unit.
        latency: Prices shapes in milliseconds; needed where the budget is a latency.

    Raises:
        InputError: A `multiple_of` that no count fits, a sparsity that removes nothing, a budget
            that no choice meets, or a kind that the layers have different numbers of.
    """
    _refuse_aliases(unit_map, rules)
    _refuse_differing(unit_map, rules)
    allowed = {
        kind: _allowed_counts(unit_map, kind, rule, tensor_parallel_size)
        for kind, rule in rules.items()
    }
    fixed: dict[UnitKind, int] = {}
    for kind, rule in rules.items():
        if rule.sparsity is not None:
            fixed[kind] = _count_for(kind, rule.sparsity, allowed[kind])
    shared = [kind for kind, rule in rules.items() if rule.sparsity is None]
    if budget is None or not shared:
        return Targets(fixed, dict(rules))
    limit = _limit(unit_map, budget, latency)
    best = fixed | _share_out(unit_map, fixed, shared, allowed, limit)
    if budget.allocation == "equal":
        reached = total_cost(limit.cost, target_widths(unit_map, best))
        if abs(reached - limit.wanted) > limit.tolerance:
            raise limit.refusal(shared, reached)
        return Targets(best, dict(rules))
    counts = {kind: [fixed[kind]] if kind in fixed else allowed[kind] for kind in rules}
    allowance = Allowance(counts, rules, limit, tied, tensor_parallel_size)
    if tied and importances is not None:
        found = find_survivors(unit_map, importances, allowance)
        return Targets(_counts_of(unit_map, found, rules), dict(rules))
    if importances is not None:
        return Targets(_expected(unit_map, importances, allowance, fixed), dict(rules), allowance)
    # what no importances can meet is refused before any are found
    nothing = {group.name: torch.zeros(group.num_units) for group in unit_map.groups.values()}
    find_survivors(unit_map, nothing, allowance)
    return Targets(best, dict(rules), None if tied else allowance)


def _expected(
    unit_map: UnitMap,
    importances: Mapping[str, Tensor],
    allowance: Allowance,
    fixed: Mapping[UnitKind, int],
) -> dict[UnitKind, int]:
    """Counts to train gates under, where importances of before will say what stays after it.

    Kinds that are not per layer give up what the program takes of them now: gates under a pressure
    that is not going to come would learn from a model that is not going to be. The kinds of a layer
    share the rest, so that the whole meets the budget.
    """
    found = find_survivors(unit_map, importances, allowance)
    counts = dict(fixed)
    for kind in allowance.shared:
        if kind not in PER_LAYER:
            is_hidden = kind == "hidden_channels"
            counts[kind] = found.widths.hidden_size if is_hidden else len(found.kept[kind])
    inner = [kind for kind in allowance.shared if kind in PER_LAYER]
    if not inner:
        return counts
    allowed = {kind: list(allowance.allowed[kind]) for kind in inner}
    return counts | _share_out(unit_map, counts, inner, allowed, allowance.limit)


def targets_of(
    unit_map: UnitMap,
    recipe: Recipe,
    *,
    importances: Mapping[str, Tensor] | None = None,
    latency: ShapeCost | None = None,
) -> Targets:
    """`find_targets` for a recipe."""
    return find_targets(
        unit_map,
        recipe.prune.rules(),
        recipe.budget,
        tied=recipe.export.format == "uniform",
        tensor_parallel_size=recipe.prune.tensor_parallel_size,
        importances=importances,
        latency=latency,
    )


def _limit(unit_map: UnitMap, budget: Budget, latency: ShapeCost | None) -> CostLimit:
    cost = CountedCost(unit_map, budget.of) if budget.sparsity is not None else latency
    assert cost is not None
    return CostLimit(cost, total_cost(cost, unit_map.dense), budget)


def _counts_of(
    unit_map: UnitMap, survivors: Survivors, kinds: Iterable[UnitKind]
) -> dict[UnitKind, int]:
    """The counts of a shape whose layers are equal, heads per KV group."""
    widths, kept = survivors.widths, survivors.kept
    layer = widths.kept_layers[0]
    is_grouped = query_heads_per_group(unit_map.layer(0)) > 1
    counts: dict[UnitKind, int] = {
        "heads": query_heads_per_group(layer) if is_grouped else layer.num_attention_heads,
        "kv_groups": layer.num_key_value_heads,
        "mlp_channels": layer.intermediate_size,
        "hidden_channels": widths.hidden_size,
    }
    return {kind: counts[kind] if kind in counts else len(kept[kind]) for kind in kinds}


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


def competitions(unit_map: UnitMap, group: UnitGroup) -> tuple[tuple[str, int, int], ...]:
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
        sizes = {(group.num_units, len(competitions(unit_map, group))) for group in groups}
        if len(sizes) > 1:
            raise InputError(
                f"prune.{kind}: must be equally many in every layer, got {min(sizes)[0]} to "
                f"{max(sizes)[0]}; prune the dense model instead, or other kinds"
            )


def _allowed_counts(
    unit_map: UnitMap, kind: UnitKind, rule: KindRule, tensor_parallel_size: int
) -> list[int]:
    """Counts that a rule allows, ascending; heads per KV group.

    All there are is allowed whatever `multiple_of` says, unless it can't be split.
    """
    group = unit_map.of_kind(kind)[0]
    num_units, times = group.num_units, 1
    if kind == "heads":
        per_group = query_heads_per_group(unit_map.layer(0))
        if per_group > 1:
            num_units, times = per_group, group.num_units // per_group
    split = tensor_parallel_size if kind in PER_LAYER else 1
    counts = [n for n in range(1, num_units + 1) if n * times % rule.multiple_of == 0]
    if not counts:
        raise InputError(
            f"prune.{kind}.multiple_of must fit into the {num_units * times} units there are, "
            f"got {rule.multiple_of}"
        )
    least = rule.min_kept or 1
    counts = counts if counts[-1] == num_units else [*counts, num_units]
    counts = [n for n in counts if n * times >= least and n * times % split == 0]
    if not counts:
        raise InputError(
            f"prune.{kind}: must allow some count of the {num_units * times} units there are, got "
            f"min_kept {least}, multiple_of {rule.multiple_of}, tensor_parallel_size {split}"
        )
    return counts


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


def _share_out(
    unit_map: UnitMap,
    fixed: Mapping[UnitKind, int],
    shared: list[UnitKind],
    allowed: Mapping[UnitKind, list[int]],
    limit: CostLimit,
) -> dict[UnitKind, int]:
    """Counts at the common share whose cost is nearest to the limit, refined in the finest kind."""
    wanted = limit.wanted

    def cost(counts: Mapping[UnitKind, int]) -> float:
        return total_cost(limit.cost, target_widths(unit_map, {**fixed, **counts}))

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
    cost: Callable[[Mapping[UnitKind, int]], float],
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
