from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune.architectures import ARCHITECTURES
from llmprune.errors import InputError
from llmprune.gates import attach_gates
from llmprune.recipe import UNIT_KINDS
from llmprune.surgery import cut
from llmprune.units import map_units, unit_parameters
from tests.llmprune.tiny import FAMILIES, logits, plan_for, tiny_model


def scramble(model, group, unit, generator):
    """Put noise into all that goes with one unit."""
    with torch.no_grad():
        for name in group.whole[unit] if group.whole else ():
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
        for own in group.slices:
            parameter = model.get_parameter(own.parameter)
            part = parameter.narrow(own.dim, own.offset + unit * own.width, own.width)
            part.add_(torch.randn(part.shape, generator=generator).to(part))


def groups_of(unit_map, kind):
    return unit_map.of_kind(kind)[:2]


@pytest.mark.parametrize("kind", UNIT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_with_a_unit_is_not_used_once_its_gate_is_closed(family, kind):
    model = tiny_model(family, ratio=3, biased=True, tied=True)
    unit_map = map_units(model)
    gates = attach_gates(model, unit_map, (kind,))
    generator = torch.Generator().manual_seed(0)
    for group in groups_of(unit_map, kind):
        unit = group.num_units // 2
        value = torch.ones(group.num_units, dtype=torch.float64)
        value[unit] = 0
        gates.set({group.name: value})
        before = logits(model)
        scramble(model, group, unit, generator)
        if kind == "hidden_channels":
            # a tied embedding's column is read again by the head, where the norm gives zero
            torch.testing.assert_close(logits(model), before, atol=1e-12, rtol=0)
        else:
            assert torch.equal(logits(model), before), group.name
        other = (unit + 1) % group.num_units
        scramble(model, group, other, generator)
        assert float((logits(model) - before).abs().max()) > 1e-3, group.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [1, 3])
def test_every_weight_of_a_layer_belongs_to_units_of_it(family, ratio):
    model = tiny_model(family, ratio=ratio, biased=True)
    unit_map = map_units(model)
    covered = set()
    for kind in ("hidden_channels", "heads", "kv_groups", "mlp_channels"):
        for group in unit_map.of_kind(kind):
            for own in group.slices:
                length = model.get_parameter(own.parameter).shape[own.dim]
                assert own.offset + group.num_units * own.width <= length
                covered.add(own.parameter)
    names = {name for name, _ in model.named_parameters()}
    # norms over head_dim stay whole
    assert {name for name in names - covered if "q_norm" not in name and "k_norm" not in name} == (
        set()
    )


@pytest.mark.parametrize("kind", UNIT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_units_parameters_are_what_cutting_it_saves(family, kind):
    model = tiny_model(family, ratio=2, biased=True)
    unit_map = map_units(model)
    if kind == "heads" and family != "gpt2":
        # one head less in both KV groups
        removed = {f"layers.{layer}.heads": (0, 2) for layer in range(3)}
    else:
        removed = {group.name: (0,) for group in unit_map.of_kind(kind)}
    groups = [unit_map.groups[name] for name in removed]
    kept = {
        g.name: tuple(u for u in range(g.num_units) if u not in removed[g.name]) for g in groups
    }
    plan = plan_for(model, ())
    plan.kept.update(kept)
    before, after = (
        sum(p.numel() for p in m.parameters()) for m in (model, cut(model, plan, form="per_layer"))
    )
    expected = sum(len(removed[g.name]) * unit_parameters(unit_map, g) for g in groups)
    assert before - after == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_the_same_without_weights(family):
    model = tiny_model(family, tied=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert map_units(empty) == map_units(model)


def test_a_map_counts_the_units():
    unit_map = map_units(tiny_model("llama", ratio=3))
    counts = {kind: [g.num_units for g in unit_map.of_kind(kind)] for kind in UNIT_KINDS}
    assert counts == {
        "heads": [6] * 3,
        "kv_groups": [2] * 3,
        "mlp_channels": [40] * 3,
        "hidden_channels": [48],
        "attention_sublayers": [3],
        "mlp_sublayers": [3],
        "layers": [3],
    }
    assert list(unit_map.groups)[:4] == [
        "hidden_channels",
        "attention_sublayers",
        "mlp_sublayers",
        "layers",
    ]
    assert unit_map.groups["layers.2.heads"].layer == 2
    assert not unit_map.tied_head
    assert map_units(tiny_model("llama", tied=True)).tied_head


def test_a_head_takes_its_key_and_value_along_only_without_gqa():
    def names(ratio):
        group = map_units(tiny_model("llama", ratio=ratio)).groups["layers.0.heads"]
        return {own.parameter.split(".")[-2] for own in group.slices}

    assert names(1) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names(2) == {"q_proj", "o_proj"}


def test_gpt2_without_an_mlp_width_has_four_times_the_hidden_size():
    model = tiny_model("gpt2")
    data = model.config.to_dict() | {"n_inner": None}
    stock = type(model)(type(model.config)(**data))
    assert map_units(stock).layer(0).intermediate_size == 4 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_signature_tells_models_apart(family):
    one, other = tiny_model(family, ratio=2), tiny_model(family, ratio=3)
    assert map_units(one).signature() != map_units(other).signature()
    assert map_units(one).signature() == map_units(tiny_model(family, seed=4)).signature()
    assert map_units(one).signature() != map_units(tiny_model(family, layers=2)).signature()


def test_the_signature_of_differing_layers_lists_them():
    model = tiny_model("llama", ratio=3)
    pruned = cut(model, plan_for(model, ("mlp_channels",), differ=True), form="per_layer")
    assert map_units(pruned).signature()["intermediate_size"] == [26, 25, 24]


def test_an_unknown_parameter_is_refused_by_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match=r"got model\.layers\.1\.mlp\.extra; merge adapters"):
        map_units(model)


def test_a_shape_that_the_config_does_not_have_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 39, bias=False)
    with pytest.raises(InputError, match=r"up_proj\.weight must have shape \(40, 32\).*\(39, 32\)"):
        map_units(model)


def test_an_unsupported_model_type_is_refused_with_those_there_are():
    model = tiny_model("llama")
    model.config.model_type = "bloom"
    with pytest.raises(InputError, match=r"model_type must be one of gpt2, llama.*got 'bloom'"):
        map_units(model)


def test_a_model_that_lost_a_sublayer_is_refused():
    model = tiny_model("llama")
    pruned = cut(model, plan_for(model, ("mlp_sublayers",)), form="per_layer")
    with pytest.raises(InputError, match="has already lost its mlp; prune the dense model"):
        map_units(pruned)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_names_every_weight_and_its_axes(family):
    model = tiny_model(family, biased=True)
    unit_map = map_units(model)
    assert sum(math.prod(p.shape) for p in unit_map.parameters) == sum(
        p.numel() for p in model.parameters()
    )
    for parameter in unit_map.parameters:
        assert len(parameter.axes) == len(parameter.shape)
    assert ARCHITECTURES[family].family == family
