from __future__ import annotations

import pytest
import torch

from llmprune.compensation import UnitMeans, compensated_biases, left_without
from llmprune.errors import InputError
from llmprune.gates import attach_gates
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.surgery import cut
from llmprune.units import map_units
from tests.llmprune.tiny import FAMILIES, logits, plan_for, tiny_model, tokens, use_double_norms

MIXES = {kind: (kind,) for kind in UNIT_KINDS} | {
    "widths": ("heads", "mlp_channels", "hidden_channels"),
    "groups": ("heads", "kv_groups", "layers"),
    "all": UNIT_KINDS,
}
STOCK_WITH_BIAS = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "gpt2": "gpt2"}


@pytest.fixture(autouse=True)
def _double_norms(monkeypatch):
    use_double_norms(monkeypatch)


def means_of(model):
    """What every write projection reads, averaged over some tokens."""
    unit_map = map_units(model)
    architecture, found, handles = unit_map.architecture, {}, []
    for layer in range(unit_map.num_layers):
        for branch in ("attention", "mlp"):
            name = f"{architecture.layers}.{layer}.{getattr(architecture, branch).write}"

            def hook(module, args, place=(layer, branch)):
                found[place] = args[0].double().flatten(0, -2).mean(0)

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return UnitMeans(found)


def gated_logits(model, plan, means):
    gates = attach_gates(model, map_units(model), UNIT_KINDS, means)
    gates.set_plan(plan)
    try:
        return logits(model)
    finally:
        gates.detach()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_equals_gated_model_with_means(family, mix, scaled):
    model = tiny_model(family)
    means, plan = means_of(model), plan_for(model, MIXES[mix], scaled=scaled)
    expected = gated_logits(model, plan, means)
    pruned = cut(model, plan, form="per_layer", means=means)
    assert float((logits(pruned) - expected).abs().max()) < 1e-10
    if mix not in ("hidden_channels",):
        without = logits(cut(model, plan, form="per_layer"))
        assert float((without - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("mix", ["heads", "mlp_channels", "groups"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_uniform_form_is_a_stock_class_with_biases(family, mix):
    model = tiny_model(family)
    # Mistral's default is a window, which no class with biases has
    model.config.sliding_window = None
    means, plan = means_of(model), plan_for(model, MIXES[mix])
    pruned = cut(model, plan, form="uniform", means=means)
    assert pruned.config.model_type == STOCK_WITH_BIAS[family]
    assert type(pruned).__module__.startswith("transformers.")
    assert float((logits(pruned) - gated_logits(model, plan, means)).abs().max()) < 1e-10


def test_gpt2_keeps_its_own_class():
    model = tiny_model("gpt2")
    means, plan = means_of(model), plan_for(model, ("mlp_channels",))
    pruned = cut(model, plan, form="uniform", means=means)
    assert pruned.config.model_type == "gpt2"
    assert float((logits(pruned) - gated_logits(model, plan, means)).abs().max()) < 1e-10


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_uniform_form_refuses_a_family_without_such_biases(family):
    model = tiny_model(family)
    with pytest.raises(InputError, match=r"no stock class computes .* per_layer"):
        cut(model, plan_for(model, ("heads",)), form="uniform", means=means_of(model))


def test_a_sliding_window_is_not_lost_silently():
    model = tiny_model("mistral")
    model.config.sliding_window = 8
    with pytest.raises(InputError, match="sliding_window"):
        cut(model, plan_for(model, ("heads",)), form="uniform", means=means_of(model))


def test_mean_output_of_a_sublayer_survives_the_cut():
    """For the tokens that the means come from, a write projection keeps its mean output."""
    model = tiny_model("llama")
    means, plan = means_of(model), plan_for(model, ("mlp_channels",))
    kept = torch.tensor(plan.kept["layers.0.mlp_channels"])
    pruned = cut(model, plan, means=means)
    dense_write, write = model.model.layers[0].mlp.down_proj, pruned.model.layers[0].mlp.down_proj
    mean = means.read[0, "mlp"]
    expected = dense_write.weight @ mean
    found = write.weight @ mean[kept] + write.bias
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_gate_at_one_changes_nothing_and_half_a_gate_is_half_way_to_the_mean():
    model = tiny_model("llama")
    means, unit_map = means_of(model), map_units(model)
    dense = logits(model)
    gates = attach_gates(model, unit_map, ("mlp_channels",), means)
    gates.set({"layers.2.mlp_channels": torch.ones(40, dtype=torch.float64)})
    assert torch.equal(logits(model), dense)
    read = []
    write = model.model.layers[2].mlp.down_proj
    handle = write.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    gates.set({"layers.2.mlp_channels": torch.full((40,), 0.5, dtype=torch.float64)})
    logits(model)
    gates.set({"layers.2.mlp_channels": torch.ones(40, dtype=torch.float64)})
    logits(model)
    handle.remove()
    half, whole = read
    assert torch.allclose(half, 0.5 * whole + 0.5 * means.read[2, "mlp"], atol=1e-12)


def test_a_removed_first_sublayer_leaves_no_mean():
    model = tiny_model("llama")
    unit_map = map_units(model)
    plan = PrunePlan(model=unit_map.signature(), kept={"layers": (1, 2)})
    assert left_without(unit_map, plan) == {(0, "attention"), (0, "mlp")}
    biases = compensated_biases(model, unit_map, plan, means_of(model))
    assert set(biases) == {(i, branch) for i in (1, 2) for branch in ("attention", "mlp")}
    assert all(float(bias.abs().max()) == 0 for bias in biases.values())


def test_means_of_removed_layers_go_to_the_last_projection_before_them():
    model = tiny_model("llama")
    unit_map, means = map_units(model), means_of(model)
    plan = PrunePlan(model=unit_map.signature(), kept={"layers": (0,)})
    bias = compensated_biases(model, unit_map, plan, means)[0, "mlp"]
    expected = sum(
        layer.self_attn.o_proj.weight @ means.read[i, "attention"]
        + layer.mlp.down_proj.weight @ means.read[i, "mlp"]
        for i, layer in enumerate(model.model.layers)
        if i > 0
    )
    assert torch.allclose(bias, expected, atol=1e-12)


def test_means_round_trip_and_a_damaged_file_is_refused(tmp_path):
    means = means_of(tiny_model("llama"))
    file = tmp_path / "means.safetensors"
    means.save(file)
    loaded = UnitMeans.load(file)
    assert set(loaded.read) == set(means.read)
    assert all(torch.equal(loaded.read[place], means.read[place]) for place in means.read)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="delete it"):
        UnitMeans.load(file)
