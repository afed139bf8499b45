from __future__ import annotations

import json

import pytest

from llmprune.cost import total_cost
from llmprune.errors import InputError
from llmprune.latency import LatencyTable, measure_table, table_for
from llmprune.plan import PrunePlan
from llmprune.recipe import Budget, KindRule, Recipe
from llmprune.targets import find_targets, target_widths
from llmprune.units import LayerWidths, Widths, map_units
from llmprune_eval.speed import phase_ms
from tests.llmprune.tiny import FAMILIES, tiny_model

ALL = ("heads", "kv_groups", "mlp_channels")
OVERHEAD, HEAD = 3.0, 2.0


def pretended(model):
    """Milliseconds that a model with layers of these shapes would take, to the digit."""
    config = model.config
    ms = OVERHEAD + (HEAD if config.vocab_size > 64 else 0.0)
    for index in range(config.num_hidden_layers):
        own = config.per_layer_config[index] if config.is_heterogeneous else config
        skipped = getattr(own, "skip", None) or ()
        if "attention" not in skipped:
            ms += attention_ms(own.num_attention_heads, own.num_key_value_heads)
        if "mlp" not in skipped:
            ms += mlp_ms(own.intermediate_size)
    return ms


def attention_ms(heads, groups):
    return 0.5 + 0.25 * groups + 0.125 * heads


def mlp_ms(channels):
    return 0.2 + 0.01 * channels


class Clock:
    """Pretends to time; keeps what it was asked for."""

    def __init__(self, factor=1.0):
        self.factor = factor
        self.names = []

    def __call__(self, models, budget):
        self.names = list(models)
        return {
            name: pretended(model) * (self.factor if name == "dense" else 1.0)
            for name, model in models.items()
        }


def large_model():
    """As `tiny_model`, with a vocabulary above that of the timed models."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=200, **sizes, **heads))


def table_of(model, kinds=ALL, factor=1.0, **budget):
    clock = Clock(factor)
    unit_map = map_units(model)
    return measure_table(model, unit_map, Budget(latency=0.8, **budget), kinds, clock), unit_map


def test_the_dense_sum_is_what_the_dense_model_took():
    for factor in (1.0, 1.7):
        table, unit_map = table_of(large_model(), factor=factor)
        assert table.scale == pytest.approx(factor)
        assert total_cost(table, unit_map.dense) == pytest.approx(table.dense_ms)


def test_shapes_between_grid_points_are_interpolated():
    table, _ = table_of(large_model())
    for heads, groups, channels in [(6, 2, 128), (2, 1, 16), (4, 2, 61), (3, 1, 99)]:
        layers = [LayerWidths(heads, groups, channels)] * 2 + [None]
        expected = OVERHEAD + HEAD + 2 * (attention_ms(heads, groups) + mlp_ms(channels))
        assert total_cost(table, Widths(48, tuple(layers))) == pytest.approx(expected)
    alone = Widths(48, (LayerWidths(6, 2, 128, attention=False), None, None))
    assert total_cost(table, alone) == pytest.approx(OVERHEAD + HEAD + mlp_ms(128))


def test_only_what_may_go_is_timed_in_more_than_one_size():
    table, _ = table_of(large_model(), kinds=("mlp_channels",))
    assert (table.kv_groups, table.heads) == ((2,), (3,))
    assert len(table.channels) == 8
    table, _ = table_of(large_model(), kinds=("heads", "layers"))
    assert table.channels == (128,)
    assert table.heads == (1, 2, 3)


def test_more_work_never_takes_less_time():
    model = large_model()
    unit_map = map_units(model)

    def noisy(models, budget):
        found = Clock()(models, budget)
        return {
            n: ms + (5 if n in ("mlp 48", "attention (1, 2)") else 0) for n, ms in found.items()
        }

    table = measure_table(model, unit_map, Budget(latency=0.8), ALL, noisy)
    assert list(table.mlp_ms) == sorted(table.mlp_ms)
    assert all(list(row) == sorted(row) for row in table.attention_ms)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_timed_for_real(family, phase):
    model = tiny_model(family, ratio=3, layers=2).float()
    budget = Budget(latency=0.9, phase=phase, context=8)
    table = measure_table(model, map_units(model), budget, ALL, phase_ms)
    assert table.dense_ms > 0
    assert total_cost(table, map_units(model).dense) == pytest.approx(table.dense_ms)


# budgets


@pytest.mark.parametrize("allocation", ["equal", "importance"])
@pytest.mark.parametrize("goal", [{"latency": 0.8}, {"latency_ms": 12.0}])
def test_a_latency_budget_is_met_by_the_table(allocation, goal):
    table, unit_map = table_of(large_model())
    budget = Budget(**goal, allocation=allocation, tolerance=0.03)
    rules = {"mlp_channels": KindRule(multiple_of=4), "heads": KindRule()}
    targets = find_targets(unit_map, rules, budget, latency=table)
    reached = total_cost(table, target_widths(unit_map, targets.counts))
    wanted = goal.get("latency_ms", 0.8 * table.dense_ms)
    if allocation == "equal":
        assert abs(reached - wanted) <= 0.03 * table.dense_ms
        assert targets.counts["mlp_channels"] < 128


def test_a_latency_out_of_reach_is_refused_with_the_nearest():
    table, unit_map = table_of(large_model())
    for allocation in ("equal", "importance"):
        for goal, message in [
            ({"latency": 0.1}, r"latency 0\.1 of the dense model's must .* can reach is 0\.\d+"),
            ({"latency_ms": 0.5}, r"latency_ms 0\.5 \(dense: \d+\.\d+\) must .* reach is \d"),
        ]:
            budget = Budget(**goal, allocation=allocation)
            with pytest.raises(InputError, match=message):
                find_targets(unit_map, {"mlp_channels": KindRule()}, budget, latency=table)


# files


def recipe_with(**budget):
    return Recipe.parse(
        {
            "model": {"source": "none"},
            "prune": {"mlp_channels": {}},
            "budget": budget,
        }
    )


def test_a_table_round_trips_and_is_taken_up_where_it_fits(tmp_path):
    model = large_model()
    unit_map = map_units(model)
    file = tmp_path / "latency.json"
    clock = Clock()
    first = table_for(file, lambda: model, unit_map, recipe_with(latency=0.8), measure=clock)
    assert LatencyTable.read(file) == first
    clock.names.clear()
    again = table_for(file, lambda: model, unit_map, recipe_with(latency_ms=3.0), measure=clock)
    assert again == first
    assert not clock.names
    recipe = recipe_with(latency=0.8, context=64)
    other = table_for(file, lambda: model, unit_map, recipe, measure=clock)
    assert clock.names
    assert (other.context, LatencyTable.read(file).context) == (64, 64)
    assert (
        table_for(file, lambda: model, unit_map, recipe_with(sparsity=0.5), measure=clock) is None
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "llmprune-latency/1"}', "{"])
def test_what_is_no_table_is_refused(tmp_path, text):
    file = tmp_path / "latency.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"latency\.json: must be a latency table"):
        LatencyTable.read(file)


def test_a_promise_is_the_tables_sum():
    table, unit_map = table_of(large_model())
    kept = {f"layers.{i}.mlp_channels": tuple(range(64)) for i in range(3)}
    widths = PrunePlan(unit_map.signature(), kept).widths(unit_map)
    promise = table.promise(recipe_with(latency=0.8), widths)
    assert promise.dense_ms == table.dense_ms
    assert promise.pruned_ms == pytest.approx(table.dense_ms - 3 * 0.64)
    assert json.dumps(promise.pruned_ms)
