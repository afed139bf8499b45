from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.cost import measure_cost
from llmprune.errors import InputError
from llmprune.recipe import UNIT_KINDS, Budget, KindRule
from llmprune.scores import UnitScores
from llmprune.selection import choose, pools
from llmprune.surgery import cut
from llmprune.targets import Targets, find_targets, target_widths
from llmprune.units import map_units
from tests.llmprune.tiny import plan_for, tiny_model

quick = settings(max_examples=60, deadline=None, derandomize=True)
PER_LAYER = ("heads", "kv_groups", "mlp_channels")


@functools.cache
def unit_map_of(family="llama", ratio=3, layers=3, kv_groups=2):
    return map_units(tiny_model(family, ratio=ratio, layers=layers, kv_groups=kv_groups))


def random_scores(unit_map, kinds=UNIT_KINDS, seed=0, levels=None):
    """Normal scores; with `levels`, small integers, so that ties are many."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for group in unit_map.groups.values():
        if group.kind in kinds:
            size = (group.num_units,)
            if levels is None:
                scores[group.name] = torch.randn(size, generator=generator)
            else:
                scores[group.name] = torch.randint(levels, size, generator=generator).float()
    return UnitScores(scores)


def targets_for(unit_map, budget=None, **rules):
    rules = {
        kind: rule if isinstance(rule, KindRule) else KindRule(**rule)
        for kind, rule in rules.items()
    }
    return find_targets(unit_map, rules, budget)


# counts from sparsities


def test_a_kinds_own_sparsity_sets_its_count():
    unit_map = unit_map_of(layers=4)
    targets = targets_for(
        unit_map,
        mlp_channels={"sparsity": 0.25},
        hidden_channels={"sparsity": 0.5},
        layers={"sparsity": 0.25},
        heads={"sparsity": 1 / 3},
    )
    # heads are counted per KV group
    assert targets.counts == {"mlp_channels": 30, "hidden_channels": 24, "layers": 3, "heads": 2}


def test_heads_without_gqa_are_counted_per_layer():
    unit_map = unit_map_of("gpt2", ratio=3)
    assert targets_for(unit_map, heads={"sparsity": 0.5}).counts == {"heads": 3}


@pytest.mark.parametrize(
    ("multiple_of", "sparsity", "count"),
    [(1, 0.3, 28), (8, 0.3, 32), (8, 0.31, 24), (16, 0.5, 16), (16, 0.3, 32), (7, 0.5, 21)],
)
def test_counts_are_the_nearest_multiple(multiple_of, sparsity, count):
    rule = KindRule(sparsity=sparsity, multiple_of=multiple_of)
    assert targets_for(unit_map_of(), mlp_channels=rule).counts == {"mlp_channels": count}


def test_heads_are_aligned_over_the_whole_layer():
    # 14 heads in 2 groups: kept counts per layer are even anyway, multiples of 4 every other one
    unit_map = unit_map_of(ratio=7)
    rule = KindRule(sparsity=0.2, multiple_of=4)
    assert targets_for(unit_map, heads=rule).counts == {"heads": 6}


def test_a_multiple_that_fits_no_count_is_refused():
    with pytest.raises(InputError, match=r"prune\.mlp_channels\.multiple_of must fit into the 40"):
        targets_for(unit_map_of(), mlp_channels={"sparsity": 0.5, "multiple_of": 41})
    with pytest.raises(InputError, match=r"prune\.heads\.multiple_of must fit into the 6 units"):
        targets_for(unit_map_of(), heads={"sparsity": 0.5, "multiple_of": 4 * 7})


def test_a_sparsity_that_removes_nothing_is_refused_with_the_least_step():
    with pytest.raises(
        InputError, match=r"sparsity must remove something, got 0\.1 of 3: .*0\.333"
    ):
        targets_for(unit_map_of(), layers={"sparsity": 0.1})
    with pytest.raises(InputError, match="no other count is allowed"):
        targets_for(unit_map_of(), mlp_channels={"sparsity": 0.3, "multiple_of": 40})


def test_a_sparsity_of_nothing_keeps_all():
    assert targets_for(unit_map_of(), layers={"sparsity": 0.0}).counts == {"layers": 3}


def test_heads_and_kv_groups_are_not_both_pruned_without_gqa():
    rules = {"heads": {"sparsity": 0.5}, "kv_groups": {"sparsity": 0.5}}
    with pytest.raises(InputError, match="must name heads or kv_groups, not both"):
        targets_for(unit_map_of("gpt2"), **rules)
    with pytest.raises(InputError, match="must name heads or kv_groups, not both"):
        targets_for(unit_map_of(ratio=1), **rules)
    assert targets_for(unit_map_of(), **rules).counts == {"heads": 2, "kv_groups": 1}


# counts from a budget


def reached(unit_map, counts, of):
    dense = getattr(measure_cost(unit_map), of)
    return 1 - getattr(measure_cost(unit_map, target_widths(unit_map, counts)), of) / dense


@quick
@given(
    family=st.sampled_from(["llama", "gpt2", "phi3"]),
    kinds=st.sets(st.sampled_from(UNIT_KINDS), min_size=1),
    sparsity=st.floats(0.0, 0.95),
    of=st.sampled_from(["decoder_parameters", "parameters", "flops", "kv_bytes"]),
    multiple_of=st.sampled_from([1, 2, 4, 8]),
    tolerance=st.sampled_from([0.01, 0.1]),
)
def test_a_budget_is_met_within_its_tolerance_or_refused_with_the_nearest(
    family, kinds, sparsity, of, multiple_of, tolerance
):
    unit_map = unit_map_of(family, layers=4)
    if family == "gpt2":
        kinds -= {"kv_groups"}
    rules = {kind: KindRule() for kind in kinds}
    if "mlp_channels" in kinds:
        rules["mlp_channels"] = KindRule(multiple_of=multiple_of)
    if not kinds:
        return
    budget = Budget(sparsity=sparsity, of=of, tolerance=tolerance)
    refusal = (
        rf"sparsity {sparsity:g} of {of} must .* the nearest that .* can reach is [01]\.\d{{4}}"
    )
    try:
        targets = find_targets(unit_map, rules, budget)
    except InputError:
        with pytest.raises(InputError, match=refusal):
            find_targets(unit_map, rules, budget)
        return
    assert targets.counts.keys() == kinds
    assert abs(reached(unit_map, targets.counts, of) - sparsity) <= tolerance
    plan = choose(random_scores(unit_map), unit_map, targets)
    planned = measure_cost(unit_map, target_widths(unit_map, targets.counts))
    assert measure_cost(unit_map, plan.widths(unit_map)) == planned
    if "mlp_channels" in kinds:
        count = targets.counts["mlp_channels"]
        assert count % multiple_of == 0 or count == 40


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.7])
def test_a_budget_with_fine_units_is_met_closely(sparsity):
    unit_map = unit_map_of()
    rules = {kind: {} for kind in ("heads", "mlp_channels", "hidden_channels")}
    targets = targets_for(unit_map, Budget(sparsity=sparsity), **rules)
    assert reached(unit_map, targets.counts, "decoder_parameters") == pytest.approx(
        sparsity, abs=0.01
    )


def test_kinds_without_a_sparsity_take_the_same_share():
    unit_map = unit_map_of(ratio=7)
    rules = {kind: {} for kind in ("mlp_channels", "hidden_channels")}
    counts = targets_for(unit_map, Budget(sparsity=0.5), **rules).counts
    shares = [counts["mlp_channels"] / 40, counts["hidden_channels"] / (14 * 8)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
    assert shares[0] < 0.85


def test_a_kind_with_its_own_sparsity_counts_towards_the_budget():
    unit_map = unit_map_of()
    budget = Budget(sparsity=0.4)
    targets = targets_for(unit_map, budget, heads={"sparsity": 1 / 3}, mlp_channels={})
    assert targets.counts["heads"] == 2
    assert reached(unit_map, targets.counts, "decoder_parameters") == pytest.approx(0.4, abs=0.01)
    alone = targets_for(unit_map, budget, mlp_channels={})
    assert targets.counts["mlp_channels"] > alone.counts["mlp_channels"]


@quick
@given(st.floats(0.0, 0.45), st.sampled_from(["mlp_channels", "hidden_channels"]))
def test_one_kind_takes_the_count_that_is_nearest_to_the_budget(sparsity, kind):
    unit_map = unit_map_of()
    targets = targets_for(unit_map, Budget(sparsity=sparsity, tolerance=0.1), **{kind: {}})
    (group,) = unit_map.of_kind(kind)[:1]
    misses = [
        abs(reached(unit_map, {kind: count}, "decoder_parameters") - sparsity)
        for count in range(1, group.num_units + 1)
    ]
    found = abs(reached(unit_map, targets.counts, "decoder_parameters") - sparsity)
    assert found == pytest.approx(min(misses), abs=1e-12)


def test_an_unreachable_budget_is_refused_with_the_nearest_sparsity():
    unit_map = unit_map_of()
    with pytest.raises(InputError) as error:
        targets_for(unit_map, Budget(sparsity=0.9), mlp_channels={})
    least = reached(unit_map, {"mlp_channels": 1}, "decoder_parameters")
    assert f"the nearest that mlp_channels can reach is {least:.4f}" in str(error.value)


def test_a_budget_that_no_kind_can_change_is_refused():
    with pytest.raises(InputError, match=r"of kv_bytes .*mlp_channels can reach is 0\.0000"):
        targets_for(unit_map_of(), Budget(sparsity=0.5, of="kv_bytes"), mlp_channels={})


def test_an_alignment_too_coarse_for_the_budget_is_refused():
    with pytest.raises(InputError, match="lower multiple_of or raise tolerance"):
        targets_for(unit_map_of(), Budget(sparsity=0.1), mlp_channels={"multiple_of": 20})


def test_a_budget_of_nothing_keeps_all():
    counts = targets_for(unit_map_of(), Budget(sparsity=0.0), mlp_channels={}, layers={}).counts
    assert counts == {"mlp_channels": 40, "layers": 3}


# from scores to plans


def scopes(kinds, scope):
    return {kind: KindRule(sparsity=0.5, scope=scope) for kind in kinds}


def is_there(group, plan):
    around = "mlp_sublayers" if group.kind == "mlp_channels" else "attention_sublayers"
    outer = ("layers", around)
    return group.layer is None or all(group.layer in plan.kept.get(k, range(9)) for k in outer)


@quick
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    kinds=st.sets(st.sampled_from(UNIT_KINDS), min_size=1),
    sparsity=st.sampled_from([0.3, 0.5, 0.7]),
    multiple_of=st.sampled_from([1, 2, 8]),
    levels=st.sampled_from([None, 3]),
    seed=st.integers(0, 1000),
)
def test_choose_keeps_the_exact_counts(family, kinds, sparsity, multiple_of, levels, seed):
    unit_map = unit_map_of(family, layers=4)
    if family == "gpt2":
        kinds -= {"kv_groups"}
    rules = {kind: KindRule(sparsity=sparsity) for kind in kinds}
    if "mlp_channels" in kinds:
        rules["mlp_channels"] = KindRule(sparsity=sparsity, multiple_of=multiple_of)
    targets = find_targets(unit_map, rules, None)
    plan = choose(random_scores(unit_map, seed=seed, levels=levels), unit_map, targets)
    plan.validate(unit_map)
    counts = dict(targets.counts)
    for kind in kinds & {"attention_sublayers", "mlp_sublayers"}:
        # a layer takes its sublayers along
        counts[kind] = min(counts[kind], counts.get("layers", 4))
    for kind, count in counts.items():
        for group in unit_map.of_kind(kind):
            if is_there(group, plan):
                times = 2 if kind == "heads" and family != "gpt2" else 1
                assert len(plan.kept[group.name]) == count * times
            else:
                assert group.name not in plan.kept
    found = measure_cost(unit_map, plan.widths(unit_map))
    assert found == measure_cost(unit_map, target_widths(unit_map, targets.counts))


def test_the_best_scores_stay():
    unit_map = unit_map_of()
    scores = random_scores(unit_map)
    targets = targets_for(unit_map, mlp_channels={"sparsity": 0.4}, layers={"sparsity": 0.33})
    plan = choose(scores, unit_map, targets)
    for name, kept in plan.kept.items():
        values = scores.scores[name]
        gone = [unit for unit in range(len(values)) if unit not in kept]
        assert min(values[list(kept)]) > max(values[gone])


def test_heads_compete_inside_their_kv_group():
    unit_map = unit_map_of()
    scores = random_scores(unit_map)
    scores.scores["layers.0.heads"][:] = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    plan = choose(scores, unit_map, targets_for(unit_map, heads={"sparsity": 2 / 3}))
    assert plan.kept["layers.0.heads"] == (0, 4)


def test_ties_go_to_low_indices():
    unit_map = unit_map_of()
    equal = UnitScores({g.name: torch.zeros(g.num_units) for g in unit_map.groups.values()})
    for scope in ("layer", "model"):
        rules = scopes(("heads", "mlp_channels", "hidden_channels", "layers"), scope)
        plan = choose(equal, unit_map, find_targets(unit_map, rules, None))
        assert plan.kept["hidden_channels"] == tuple(range(24))
        assert plan.kept["layers"] == tuple(range(len(plan.kept["layers"])))
        assert plan.kept["layers.0.mlp_channels"][:20] == tuple(range(20))
        assert plan.kept["layers.0.heads"][:2] == (0, 1)


def test_who_left_earlier_goes_first_whatever_the_score():
    unit_map = unit_map_of()
    name = "layers.0.mlp_channels"
    scores = random_scores(unit_map)
    left = torch.full((40,), 5)
    left[[3, 7, 11, 13]] = -1
    left[20:30] = 9
    scores.scores[name][[3, 7]] = -100.0
    both = dataclasses.replace(scores, dropped_at={name: left})
    ranks = both.order([name])[name]
    assert set(ranks.argsort(descending=True)[:4].tolist()) == {3, 7, 11, 13}
    assert set(ranks.argsort(descending=True)[4:14].tolist()) == set(range(20, 30))


def test_ranks_are_a_permutation_over_the_pool():
    unit_map = unit_map_of()
    names = [group.name for group in unit_map.of_kind("mlp_channels")]
    ranks = random_scores(unit_map, levels=4).order(names)
    assert sorted(torch.cat(list(ranks.values())).tolist()) == list(range(120))


def test_missing_scores_are_refused_by_group():
    unit_map = unit_map_of()
    targets = targets_for(unit_map, mlp_channels={"sparsity": 0.5})
    with pytest.raises(InputError, match=r"must hold 40 scores for layers\.0\.mlp_channels"):
        choose(random_scores(unit_map, ("heads",)), unit_map, targets)


def test_scales_go_with_the_units_that_stay():
    unit_map = unit_map_of()
    scores = random_scores(unit_map, ("mlp_channels",))
    scale = {name: torch.arange(40) / 40 for name in scores.scores}
    plan = choose(
        dataclasses.replace(scores, scale=scale),
        unit_map,
        targets_for(unit_map, mlp_channels={"sparsity": 0.5}),
    )
    for name, kept in plan.kept.items():
        assert plan.scale[name] == pytest.approx([unit / 40 for unit in kept])


# scope: model


@quick
@given(
    ratio=st.sampled_from([1, 2, 3, 7]),
    kind=st.sampled_from(PER_LAYER),
    sparsity=st.sampled_from([0.3, 0.5, 0.7]),
    with_layers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_across_layers_the_total_is_exact_and_every_layer_keeps_some(
    ratio, kind, sparsity, with_layers, seed
):
    unit_map = unit_map_of(ratio=ratio, layers=4)
    rules = {kind: KindRule(sparsity=sparsity, scope="model")}
    if with_layers:
        rules["layers"] = KindRule(sparsity=0.25)
    try:
        targets = find_targets(unit_map, rules, None)
    except InputError:
        return
    plan = choose(random_scores(unit_map, seed=seed), unit_map, targets)
    plan.validate(unit_map)
    widths = plan.widths(unit_map).kept_layers
    names = [name for name in plan.kept if name.endswith(kind)]
    assert len(names) == len(widths) == (3 if with_layers else 4)
    times = 2 if kind == "heads" and ratio > 1 else 1
    assert sum(len(plan.kept[name]) for name in names) == targets.counts[kind] * times * len(names)
    assert all(plan.kept[name] for name in names)
    found = measure_cost(unit_map, plan.widths(unit_map))
    assert found == measure_cost(unit_map, target_widths(unit_map, targets.counts))


def test_across_layers_the_layer_with_the_better_scores_keeps_more():
    unit_map = unit_map_of()
    scores = random_scores(unit_map)
    scores.scores["layers.1.mlp_channels"] += 100
    plan = choose(
        scores, unit_map, find_targets(unit_map, scopes(("mlp_channels",), "model"), None)
    )
    assert [len(plan.kept[f"layers.{i}.mlp_channels"]) for i in range(3)].index(40) == 1
    everything = torch.cat([scores.scores[f"layers.{i}.mlp_channels"] for i in range(3)])
    floor = torch.sort(everything, descending=True).values[60]
    for i in range(3):
        kept = list(plan.kept[f"layers.{i}.mlp_channels"])
        if len(kept) > 1:
            assert float(scores.scores[f"layers.{i}.mlp_channels"][kept].min()) >= float(floor)


def test_across_layers_a_layer_of_the_worst_keeps_its_best_unit():
    unit_map = unit_map_of()
    scores = random_scores(unit_map)
    scores.scores["layers.2.mlp_channels"] -= 100
    plan = choose(
        scores, unit_map, find_targets(unit_map, scopes(("mlp_channels",), "model"), None)
    )
    best = int(scores.scores["layers.2.mlp_channels"].argmax())
    assert plan.kept["layers.2.mlp_channels"] == (best,)


@quick
@given(
    ratio=st.sampled_from([2, 3, 6]),
    multiple_of=st.sampled_from([1, 2, 3, 4, 6]),
    seed=st.integers(0, 1000),
)
def test_across_layers_heads_stay_aligned_and_equal_in_kv_groups(ratio, multiple_of, seed):
    unit_map = unit_map_of(ratio=ratio, layers=4)
    rules = {"heads": KindRule(sparsity=0.5, multiple_of=multiple_of, scope="model")}
    try:
        targets = find_targets(unit_map, rules, None)
    except InputError:
        return
    plan = choose(random_scores(unit_map, seed=seed), unit_map, targets)
    plan.validate(unit_map)
    for layer in plan.widths(unit_map).kept_layers:
        count = layer.num_attention_heads
        assert count % multiple_of == 0 or count == 2 * ratio


@quick
@given(
    multiple_of=st.sampled_from([1, 4, 7, 8, 16]),
    sparsity=st.sampled_from([0.2, 0.4, 0.6]),
    levels=st.sampled_from([None, 2]),
    seed=st.integers(0, 1000),
)
def test_across_layers_channels_stay_aligned_and_no_better_one_goes(
    multiple_of, sparsity, levels, seed
):
    unit_map = unit_map_of(layers=4)
    rules = {"mlp_channels": KindRule(sparsity=sparsity, multiple_of=multiple_of, scope="model")}
    targets = find_targets(unit_map, rules, None)
    scores = random_scores(unit_map, seed=seed, levels=levels)
    plan = choose(scores, unit_map, targets)
    total = 0
    for i in range(4):
        name = f"layers.{i}.mlp_channels"
        kept = list(plan.kept[name])
        total += len(kept)
        assert len(kept) % multiple_of == 0 or len(kept) == 40
        gone = [unit for unit in range(40) if unit not in kept]
        if gone:
            assert scores.scores[name][kept].min() >= scores.scores[name][gone].max()
    wanted = targets.counts["mlp_channels"] * 4
    assert total == wanted if 40 % multiple_of == 0 else wanted - multiple_of < total <= wanted


def test_across_layers_channels_of_a_removed_mlp_do_not_count():
    unit_map = unit_map_of()
    rules = scopes(("mlp_channels",), "model") | {"mlp_sublayers": KindRule(sparsity=0.33)}
    targets = find_targets(unit_map, rules, None)
    scores = random_scores(unit_map)
    scores.scores["mlp_sublayers"][:] = torch.tensor([1.0, 0.0, 2.0])
    scores.scores["layers.1.mlp_channels"] += 100
    plan = choose(scores, unit_map, targets)
    widths = plan.widths(unit_map).kept_layers
    assert sum(layer.intermediate_size for layer in widths if layer.mlp) == 40
    planned = measure_cost(unit_map, target_widths(unit_map, targets.counts))
    assert measure_cost(unit_map, plan.widths(unit_map)) == planned


def test_across_layers_heads_of_a_removed_attention_do_not_count():
    unit_map = unit_map_of()
    rules = {"heads": KindRule(sparsity=1 / 3, scope="model")}
    rules |= {"attention_sublayers": KindRule(sparsity=0.33)}
    targets = find_targets(unit_map, rules, None)
    scores = random_scores(unit_map)
    scores.scores["attention_sublayers"][:] = torch.tensor([1.0, 0.0, 2.0])
    scores.scores["layers.1.heads"] += 100
    plan = choose(scores, unit_map, targets)
    planned = measure_cost(unit_map, target_widths(unit_map, targets.counts))
    assert measure_cost(unit_map, plan.widths(unit_map)) == planned


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_met_by_layers_and_sublayers_together_is_met_by_the_plan(seed):
    unit_map = unit_map_of(layers=4)
    rules = {kind: KindRule(sparsity=0.25) for kind in ("layers", "attention_sublayers")}
    targets = find_targets(unit_map, rules, None)
    plan = choose(random_scores(unit_map, seed=seed), unit_map, targets)
    planned = measure_cost(unit_map, target_widths(unit_map, targets.counts))
    assert measure_cost(unit_map, plan.widths(unit_map)) == planned


def test_sublayers_of_removed_layers_are_no_longer_chosen():
    unit_map = unit_map_of(layers=4)
    rules = {"layers": KindRule(sparsity=0.5), "attention_sublayers": KindRule(sparsity=0.25)}
    rules |= {"mlp_sublayers": KindRule(sparsity=0.75)}
    scores = random_scores(unit_map)
    scores.scores["layers"][:] = torch.tensor([1.0, 3.0, 0.0, 2.0])
    scores.scores["mlp_sublayers"][:] = torch.tensor([9.0, 1.0, 8.0, 2.0])
    plan = choose(scores, unit_map, find_targets(unit_map, rules, None))
    assert plan.kept["layers"] == plan.kept["attention_sublayers"] == (1, 3)
    assert plan.kept["mlp_sublayers"] == (3,)


@pytest.mark.parametrize("seed", range(5))
def test_heads_and_kv_groups_both_across_layers_meet_the_planned_cost(seed):
    unit_map = unit_map_of(layers=4, ratio=6, kv_groups=4)
    targets = find_targets(unit_map, scopes(("heads", "kv_groups"), "model"), None)
    plan = choose(random_scores(unit_map, seed=seed), unit_map, targets)
    plan.validate(unit_map)
    groups = [layer.num_key_value_heads for layer in plan.widths(unit_map).kept_layers]
    assert len(set(groups)) > 1
    found = measure_cost(unit_map, plan.widths(unit_map))
    planned = measure_cost(unit_map, target_widths(unit_map, targets.counts))
    assert found.kv_bytes == planned.kv_bytes
    # short of the total by less than one head in each of a layer's KV groups, read and written
    assert 0 <= planned.parameters - found.parameters < 4 * 2 * 8 * 192


def test_across_layers_a_layer_is_full_once_a_bundle_did_not_fit():
    unit_map = unit_map_of()
    rules = {"mlp_channels": KindRule(sparsity=0.2, multiple_of=16, scope="model")}
    targets = find_targets(unit_map, rules, None)
    assert targets.counts == {"mlp_channels": 32}
    scores = random_scores(unit_map)
    # bundles of 16, 16, 8 a layer; best first: 0, 0, 0, 1, then 8 are left and 2 wants 16
    for layer, (first, second, third) in enumerate([(9, 8, 7), (9, 6, 0), (9, 5, 4)]):
        values = torch.tensor([first] * 16 + [second] * 16 + [third] * 8)
        scores.scores[f"layers.{layer}.mlp_channels"][:] = values
    plan = choose(scores, unit_map, targets)
    widths = plan.widths(unit_map).kept_layers
    assert [layer.intermediate_size for layer in widths] == [40, 40, 16]


# pools


def test_every_unit_of_a_kind_is_in_one_pool():
    for scope in ("layer", "model"):
        unit_map = unit_map_of()
        rules = {kind: KindRule(sparsity=0.4, scope=scope) for kind in UNIT_KINDS}
        targets = find_targets(unit_map, rules, None)
        found = [
            (name, unit)
            for pool in pools(unit_map, targets)
            for name, start, stop in pool.members
            for unit in range(start, stop)
        ]
        everything = [(g.name, u) for g in unit_map.groups.values() for u in range(g.num_units)]
        assert sorted(found) == sorted(everything)
        assert all(1 <= pool.num_kept <= pool.num_units for pool in pools(unit_map, targets))


def test_pools_keep_as_many_as_the_plan():
    unit_map = unit_map_of()
    for kind in UNIT_KINDS:
        for scope in ("layer", "model"):
            targets = find_targets(unit_map, scopes((kind,), scope), None)
            plan = choose(random_scores(unit_map), unit_map, targets)
            kept = sum(len(units) for units in plan.kept.values())
            assert sum(pool.num_kept for pool in pools(unit_map, targets)) == kept


def test_across_layers_one_pool_holds_them_all():
    unit_map = unit_map_of()
    targets = find_targets(unit_map, scopes(("mlp_channels",), "model"), None)
    (pool,) = pools(unit_map, targets)
    assert (pool.num_units, pool.num_kept) == (120, 60)
    targets = find_targets(unit_map, scopes(("heads",), "layer"), None)
    assert [(pool.num_units, pool.num_kept) for pool in pools(unit_map, targets)] == [(3, 2)] * 6


def test_kinds_that_the_layers_have_different_numbers_of_are_refused():
    model = tiny_model("llama", ratio=3)
    pruned = cut(model, plan_for(model, ("mlp_channels",), differ=True), form="per_layer")
    unit_map = map_units(pruned)
    with pytest.raises(InputError, match=r"prune\.mlp_channels: must be equally many.*24 to 26"):
        targets_for(unit_map, mlp_channels={"sparsity": 0.5})
    assert targets_for(unit_map, layers={"sparsity": 0.3}).counts == {"layers": 2}


# files


def test_scores_round_trip_to_the_byte():
    unit_map = unit_map_of()
    scores = random_scores(unit_map)
    left = {"layers": torch.tensor([-1, 3, -1])}
    scale = {"layers": torch.tensor([0.1, 1 / 3, 2.5])}
    whole = dataclasses.replace(scores, dropped_at=left, scale=scale)
    text = whole.to_json()
    again = UnitScores.from_json(text)
    assert again.to_json() == text
    assert all(torch.equal(again.scores[n], value) for n, value in scores.scores.items())
    assert torch.equal(again.dropped_at["layers"], left["layers"])
    assert torch.equal(again.scale["layers"], scale["layers"])
    targets = find_targets(unit_map, {k: KindRule(sparsity=0.4) for k in UNIT_KINDS}, None)
    assert choose(again, unit_map, targets) == choose(whole, unit_map, targets)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "llmprune-scores/1"}',
        '{"format": "llmprune-scores/9", "scores": {}, "dropped_at": {}, "scale": {}}',
        '{"format": "llmprune-scores/1", "scores": [], "dropped_at": {}, "scale": {}}',
        '{"format": "llmprune-scores/1", "scores": {"a": "x"}, "dropped_at": {}, "scale": {}}',
        '{"format": "llmprune-scores/1", "scores": {"a": [[1], [1, 2]]}, "dropped_at": {}, '
        '"scale": {}}',
    ],
)
def test_what_are_no_scores_is_refused(text):
    with pytest.raises(InputError, match=r"^here\.json: "):
        UnitScores.from_json(text, name="here.json")


def test_targets_know_who_competes_across_layers():
    rules = {kind: KindRule(sparsity=0.4, scope="model") for kind in UNIT_KINDS}
    assert Targets({}, rules).across == {"heads", "kv_groups", "mlp_channels"}
    rules["heads"] = KindRule(sparsity=0.4)
    assert Targets({}, rules).across == {"kv_groups", "mlp_channels"}
