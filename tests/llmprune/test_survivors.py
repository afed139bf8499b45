from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.cost import CountedCost, measure_cost, total_cost
from llmprune.errors import InputError
from llmprune.recipe import UNIT_KINDS, Budget, KindRule
from llmprune.scores import UnitScores
from llmprune.selection import choose, pools
from llmprune.sequential_attention import Group
from llmprune.survivors import find_survivors
from llmprune.targets import find_targets, target_widths
from llmprune.units import map_units, query_heads_per_group, unit_parameters
from tests.llmprune.tiny import tiny_model

quick = settings(max_examples=20, deadline=None, derandomize=True)


@functools.cache
def unit_map_of(family="llama", ratio=2, layers=2, kv_groups=2):
    return map_units(tiny_model(family, ratio=ratio, layers=layers, kv_groups=kv_groups))


def importances_for(unit_map, seed=0):
    """Importances of every unit; what holds others is worth about as much as they are."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in unit_map.groups.values():
        scale = unit_parameters(unit_map, group) / 100
        draw = torch.rand(group.num_units, generator=generator, dtype=torch.float64)
        found[group.name] = scale * draw**2
    return found


def importance_budget(sparsity, **options):
    return Budget(sparsity=sparsity, allocation="importance", **options)


def targets_for(unit_map, sparsity, *, tied=False, importances=None, split=1, **rules):
    budget = importance_budget(sparsity, tolerance=0.03)
    rules = {kind: KindRule(**rule) for kind, rule in rules.items()}
    return find_targets(
        unit_map, rules, budget, tied=tied, importances=importances, tensor_parallel_size=split
    )


def plan_of(unit_map, importances, targets):
    plan = choose(UnitScores(importances), unit_map, targets)
    plan.validate(unit_map)
    return plan


def lost(unit_map, importances, plan):
    """Importance that a plan loses, every unit counted where it is lost first."""
    total = 0.0
    gone_layers = set()
    for kind in ("hidden_channels", "layers", "attention_sublayers", "mlp_sublayers"):
        if kind in plan.kept:
            gone = set(range(len(importances[kind]))) - set(plan.kept[kind])
            gone -= gone_layers if kind.endswith("sublayers") else set()
            total += sum(float(importances[kind][unit]) for unit in gone)
            gone_layers |= gone if kind == "layers" else set()
    for index in range(unit_map.num_layers):
        groups = plan.kept.get(f"layers.{index}.kv_groups")
        ratio = query_heads_per_group(unit_map.layer(index))
        for kind in ("heads", "kv_groups", "mlp_channels"):
            name = f"layers.{index}.{kind}"
            if name not in plan.kept:
                continue
            gone = set(range(len(importances[name]))) - set(plan.kept[name])
            if kind == "heads" and groups is not None:
                gone = {head for head in gone if head // ratio in groups}
            total += sum(float(importances[name][unit]) for unit in gone)
    return total


def subsets(units, counts):
    return [c for n in counts for c in itertools.combinations(range(units), n)]


def brute_force(unit_map, importances, kinds, of, wanted, tolerance):
    """The least loss of all plans whose cost is in the range; units of two layers, tiny counts."""
    from llmprune.plan import PrunePlan

    best = None
    per_layer = []
    for index in range(unit_map.num_layers):
        ways = [{}]
        if "kv_groups" in kinds:
            ways = [{f"layers.{index}.kv_groups": c} for c in subsets(2, (1, 2))]
        if "heads" in kinds:
            heads = []
            for way in ways:
                stays = way.get(f"layers.{index}.kv_groups", (0, 1))
                for count in (1, 2):
                    options = [itertools.combinations((2 * g, 2 * g + 1), count) for g in stays]
                    for parts in itertools.product(*options):
                        units = tuple(sorted(unit for part in parts for unit in part))
                        heads.append({**way, f"layers.{index}.heads": units})
            ways = heads
        if "mlp_channels" in kinds:
            order = importances[f"layers.{index}.mlp_channels"].argsort(descending=True).tolist()
            ways = [
                {**way, f"layers.{index}.mlp_channels": tuple(sorted(order[:count]))}
                for way in ways
                for count in (10, 20, 30, 40)
            ]
        per_layer.append(ways)
    outer = [{}]
    if "layers" in kinds:
        outer = [{"layers": c} for c in subsets(2, (1, 2))]
    if "attention_sublayers" in kinds:
        outer = [
            {**o, "attention_sublayers": c}
            for o in outer
            for c in subsets(2, (1, 2))
            if set(c) <= set(o.get("layers", c))
        ]
    for out in outer:
        for ways in itertools.product(*per_layer):
            kept = dict(out)
            for index, way in enumerate(ways):
                if index not in out.get("layers", (0, 1)):
                    continue
                attends = index in out.get("attention_sublayers", (0, 1))
                kept |= {k: v for k, v in way.items() if attends or k.endswith("mlp_channels")}
            plan = PrunePlan(unit_map.signature(), kept)
            cost = getattr(measure_cost(unit_map, plan.widths(unit_map)), of)
            if wanted - tolerance <= cost <= wanted:
                loss = lost(unit_map, importances, plan)
                best = loss if best is None else min(best, loss)
    return best


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kinds=st.sets(
        st.sampled_from(["heads", "kv_groups", "mlp_channels", "layers", "attention_sublayers"]),
        min_size=1,
        max_size=3,
    ),
    of=st.sampled_from(["decoder_parameters", "flops"]),
    sparsity=st.sampled_from([0.15, 0.3, 0.45]),
    seed=st.integers(0, 1000),
)
def test_the_plan_loses_the_least_that_brute_force_finds(kinds, of, sparsity, seed):
    unit_map = unit_map_of()
    importances = importances_for(unit_map, seed)
    rules = {kind: KindRule() for kind in UNIT_KINDS if kind in kinds}
    if "mlp_channels" in kinds:
        rules["mlp_channels"] = KindRule(multiple_of=10)
    dense = getattr(measure_cost(unit_map), of)
    budget = importance_budget(sparsity, of=of, tolerance=0.1)
    expected = brute_force(unit_map, importances, kinds, of, dense * (1 - sparsity), 0.1 * dense)
    if expected is None:
        return
    targets = find_targets(unit_map, rules, budget, tied=False)
    plan = plan_of(unit_map, importances, targets)
    assert lost(unit_map, importances, plan) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    reached = getattr(measure_cost(unit_map, plan.widths(unit_map)), of)
    assert dense * (1 - sparsity) - 0.1 * dense <= reached <= dense * (1 - sparsity)


@quick
@given(
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    ratio=st.sampled_from([1, 2, 3]),
    kinds=st.sets(st.sampled_from(UNIT_KINDS), min_size=1),
    of=st.sampled_from(["decoder_parameters", "parameters", "flops", "kv_bytes"]),
    sparsity=st.floats(0.0, 0.9),
    tied=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_plan_meets_its_budget_or_the_budget_is_refused(
    family, ratio, kinds, of, sparsity, tied, seed
):
    unit_map = unit_map_of(family, ratio, 3)
    if family == "gpt2" or ratio == 1:
        kinds -= {"kv_groups"}
    if tied:
        kinds -= {"attention_sublayers", "mlp_sublayers"}
    if not kinds:
        return
    rules = {kind: KindRule() for kind in UNIT_KINDS if kind in kinds}
    budget = importance_budget(sparsity, of=of, tolerance=0.05)
    importances = importances_for(unit_map, seed)
    try:
        targets = find_targets(unit_map, rules, budget, tied=tied)
    except InputError:
        with pytest.raises(InputError, match="the nearest that"):
            find_targets(unit_map, rules, budget, tied=tied)
        return
    if tied:
        targets = find_targets(unit_map, rules, budget, tied=True, importances=importances)
    plan = plan_of(unit_map, importances, targets)
    dense = getattr(measure_cost(unit_map), of)
    reached = getattr(measure_cost(unit_map, plan.widths(unit_map)), of)
    assert abs(reached - dense * (1 - sparsity)) <= 0.05 * dense + 1e-6
    if tied:
        assert plan.widths(unit_map).kept_layers[0] == plan.widths(unit_map).kept_layers[-1]
        planned = measure_cost(unit_map, target_widths(unit_map, targets.counts))
        assert planned == measure_cost(unit_map, plan.widths(unit_map))


def test_tied_layers_take_the_counts_that_lose_the_least_over_all_of_them():
    unit_map = unit_map_of()
    importances = importances_for(unit_map)
    # heads are worth nothing, so they go before any channel does
    for index in range(2):
        importances[f"layers.{index}.heads"][:] = 1e-6
    rules = {"heads": {}, "mlp_channels": {}}
    targets = targets_for(unit_map, 0.2, tied=True, importances=importances, **rules)
    assert targets.counts["heads"] == 1
    for index in range(2):
        importances[f"layers.{index}.heads"][:] = 1e6
    targets = targets_for(unit_map, 0.2, tied=True, importances=importances, **rules)
    assert targets.counts["heads"] == 2
    assert targets.allowance is None
    # without importances: equal shares
    assert targets_for(unit_map, 0.2, tied=True, **rules).counts["mlp_channels"] < 40


def test_a_layer_of_little_importance_loses_more_channels():
    unit_map = unit_map_of(layers=3)
    importances = importances_for(unit_map)
    importances["layers.1.mlp_channels"] *= 0.001
    targets = targets_for(unit_map, 0.2, mlp_channels={})
    widths = plan_of(unit_map, importances, targets).widths(unit_map).kept_layers
    sizes = [layer.intermediate_size for layer in widths]
    assert sizes[1] == 1
    assert min(sizes[0], sizes[2]) > 20


def test_floors_and_multiples_hold_in_every_layer():
    unit_map = unit_map_of(ratio=3, layers=3)
    importances = importances_for(unit_map)
    for name in list(importances):
        if name.startswith("layers.1."):
            importances[name] *= 1e-6
    rules = {
        "heads": {"min_kept": 4},
        "mlp_channels": {"multiple_of": 4, "min_kept": 10},
    }
    plan = plan_of(unit_map, importances, targets_for(unit_map, 0.3, **rules))
    widths = plan.widths(unit_map).kept_layers
    assert widths[1].num_attention_heads == 4
    assert widths[1].intermediate_size == 12
    assert all(layer.intermediate_size % 4 == 0 for layer in widths)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_multiples_of_the_tensor_parallel_size(tied):
    unit_map = unit_map_of(ratio=3, layers=3, kv_groups=4)
    importances = importances_for(unit_map)
    rules = {"heads": {}, "kv_groups": {}, "mlp_channels": {"multiple_of": 3}}
    targets = targets_for(
        unit_map, 0.4, tied=tied, split=2, importances=importances if tied else None, **rules
    )
    for layer in plan_of(unit_map, importances, targets).widths(unit_map).kept_layers:
        assert layer.num_key_value_heads % 2 == 0
        assert layer.num_attention_heads % 2 == 0
        assert layer.intermediate_size % 6 == 0 or layer.intermediate_size == 40


def test_whole_counts_that_can_not_be_split_are_not_allowed():
    unit_map = unit_map_of(ratio=3)
    with pytest.raises(InputError, match="tensor_parallel_size 3"):
        targets_for(unit_map, 0.2, split=3, kv_groups={})
    counts = find_targets(
        unit_map,
        {"mlp_channels": KindRule()},
        Budget(sparsity=0.1, tolerance=0.1),
        tensor_parallel_size=16,
    ).counts
    assert counts == {"mlp_channels": 32}
    with pytest.raises(InputError, match="min_kept 41"):
        targets_for(unit_map, 0.2, mlp_channels={"min_kept": 41})


def test_kinds_with_a_sparsity_of_their_own_stay_as_they_are():
    unit_map = unit_map_of(layers=4)
    importances = importances_for(unit_map)
    rules = {"mlp_channels": {}, "heads": {"sparsity": 0.5}, "layers": {"sparsity": 0.25}}
    rules["attention_sublayers"] = {"sparsity": 0.5}
    plan = plan_of(unit_map, importances, targets_for(unit_map, 0.6, **rules))
    assert len(plan.kept["layers"]) == 3
    assert 1 <= len(plan.kept["attention_sublayers"]) <= 2
    for layer in plan.widths(unit_map).kept_layers:
        assert layer.num_attention_heads == 2 or not layer.attention


def test_what_nothing_can_meet_is_refused_before_importances_are_known():
    unit_map = unit_map_of()
    for tied in (True, False):
        with pytest.raises(InputError, match=r"budget: sparsity 0\.9 of decoder_parameters must"):
            targets_for(unit_map, 0.9, tied=tied, mlp_channels={})


def test_negative_scores_are_no_importances():
    unit_map = unit_map_of()
    importances = importances_for(unit_map)
    importances["layers.1.mlp_channels"][3] = -0.5
    targets = targets_for(unit_map, 0.2, mlp_channels={})
    with pytest.raises(InputError, match=r"got -0\.5 in layers\.1\.mlp_channels; calibrate with"):
        choose(UnitScores(importances), unit_map, targets)
    del importances["layers.1.mlp_channels"]
    with pytest.raises(InputError, match="must hold 40 scores"):
        find_survivors(unit_map, importances, targets.allowance)


# pools


def test_units_of_all_layers_compete_for_parameters():
    unit_map = unit_map_of()
    rules = {"heads": {}, "mlp_channels": {}, "layers": {"sparsity": 0.5}}
    targets = targets_for(unit_map, 0.6, **rules)
    priced, layers = pools(unit_map, targets)
    assert layers.costs is None
    assert (layers.num_units, layers.num_kept) == (2, 1)
    assert priced.num_units == len(priced.costs) == 2 * (4 + 40)
    assert sum(priced.costs) == pytest.approx(priced.num_units)
    assert sum(stop - start for _, start, stop in priced.members) == priced.num_units
    head, channel = unit_map.groups["layers.0.heads"], unit_map.groups["layers.0.mlp_channels"]
    ratio = unit_parameters(unit_map, head) / unit_parameters(unit_map, channel)
    assert max(priced.costs) / min(priced.costs) == pytest.approx(ratio)
    group = Group.of_costs(priced.costs, priced.budget)
    share = targets.counts["mlp_channels"] * unit_parameters(unit_map, channel)
    share += 2 * targets.counts["heads"] * unit_parameters(unit_map, head)
    whole = 40 * unit_parameters(unit_map, channel) + 4 * unit_parameters(unit_map, head)
    assert group.density == pytest.approx(share / whole)


@pytest.mark.parametrize("cheap", ["layers", "hidden_channels", "mlp_channels"])
def test_gates_train_under_what_importances_of_before_let_expect(cheap):
    """No pressure on layers and residual channels that will not go; the rest makes it up."""
    unit_map = unit_map_of(layers=4)
    importances = importances_for(unit_map)
    for name in importances:
        importances[name] *= 1e-6 if unit_map.groups[name].kind == cheap else 1.0
    rules = {"layers": {}, "hidden_channels": {}, "mlp_channels": {}}
    targets = targets_for(unit_map, 0.3, importances=importances, **rules)
    plan = plan_of(unit_map, importances, targets)
    assert targets.counts["layers"] == len(plan.kept["layers"])
    assert targets.counts["hidden_channels"] == len(plan.kept["hidden_channels"])
    whole = {"layers": 4, "hidden_channels": unit_map.dense.hidden_size, "mlp_channels": 40}
    assert {kind for kind, count in targets.counts.items() if count < whole[kind]} >= {cheap}
    if cheap == "mlp_channels":
        assert targets.counts["layers"] == 4
        assert targets.counts["hidden_channels"] == unit_map.dense.hidden_size
    cost = CountedCost(unit_map, "decoder_parameters")
    reached = total_cost(cost, target_widths(unit_map, targets.counts))
    assert reached == pytest.approx(0.7 * total_cost(cost, unit_map.dense), rel=0.05)


def test_kinds_of_a_layer_alone_train_under_equal_shares_whatever_importances_say():
    unit_map = unit_map_of()
    rules = {"heads": {}, "mlp_channels": {}}
    known = targets_for(unit_map, 0.3, importances=importances_for(unit_map), **rules)
    assert known.counts == targets_for(unit_map, 0.3, **rules).counts
