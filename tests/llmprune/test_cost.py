from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmprune import cost
from llmprune.cost import CountedCost, measure_cost, total_cost
from llmprune.recipe import UNIT_KINDS
from llmprune.surgery import cut
from llmprune.units import map_units
from tests.llmprune.tiny import FAMILIES, plan_for, tiny_model

LENGTH = 16
# sublayers alone too: several kinds may leave no layer that lacks just one of them
REMOVED = ((), ("attention_sublayers",), ("mlp_sublayers",), UNIT_KINDS)


def count(model):
    """Parameters of a model, all and those inside decoder layers."""
    layers = ("transformer.h.", "model.layers.")
    inside = sum(p.numel() for n, p in model.named_parameters() if n.startswith(layers))
    return sum(p.numel() for p in model.parameters()), inside


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    ratio=st.sampled_from([1, 2, 3]),
    tied=st.booleans(),
    kinds=st.sets(st.sampled_from(UNIT_KINDS)),
    differ=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cost_equals_the_parameters_of_the_cut_model(family, ratio, tied, kinds, differ, seed):
    model = tiny_model(family, ratio=ratio, tied=tied, biased=seed % 2 == 0)
    unit_map = map_units(model)
    dense = measure_cost(unit_map)
    assert (dense.parameters, dense.decoder_parameters) == count(model)
    plan = plan_for(model, kinds, differ=differ, seed=seed)
    found = measure_cost(unit_map, plan.widths(unit_map))
    pruned = cut(model, plan, form="per_layer")
    assert (found.parameters, found.decoder_parameters) == count(pruned)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_a_forward_pass(family, tied, monkeypatch):
    monkeypatch.setattr(cost, "FLOPS_CONTEXT", LENGTH)
    model = tiny_model(family, ratio=3, tied=tied, dtype=torch.float32)
    unit_map = map_units(model)
    for kinds in REMOVED:
        plan = plan_for(model, kinds, differ=True)
        pruned = cut(model, plan, form="per_layer")
        pruned.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pruned(torch.ones(1, LENGTH, dtype=torch.int64), use_cache=False)
        expected = measure_cost(unit_map, plan.widths(unit_map)).flops * LENGTH
        assert counter.get_total_flops() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_are_those_of_a_16_bit_cache(family):
    model = tiny_model(family, ratio=3, dtype=torch.bfloat16)
    unit_map = map_units(model)
    for kinds in REMOVED:
        plan = plan_for(model, kinds, differ=True)
        pruned = cut(model, plan, form="per_layer")
        with torch.no_grad():
            cache = pruned(torch.ones(1, LENGTH, dtype=torch.int64)).past_key_values
        layers = [layer for layer in cache.layers if layer.is_initialized]
        taken = sum(t.numel() * 2 for layer in layers for t in (layer.keys, layer.values))
        assert measure_cost(unit_map, plan.widths(unit_map)).kv_bytes * LENGTH == taken


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    ratio=st.sampled_from([1, 2, 3]),
    tied=st.booleans(),
    kinds=st.sets(st.sampled_from(UNIT_KINDS)),
    of=st.sampled_from(["parameters", "decoder_parameters", "flops", "kv_bytes"]),
    seed=st.integers(0, 1000),
)
def test_the_sum_over_sublayers_is_the_cost(family, ratio, tied, kinds, of, seed):
    model = tiny_model(family, ratio=ratio, tied=tied, biased=seed % 2 == 0)
    unit_map = map_units(model)
    widths = plan_for(model, kinds, differ=True, seed=seed).widths(unit_map)
    summed = total_cost(CountedCost(unit_map, of), widths)
    assert summed == getattr(measure_cost(unit_map, widths), of)
