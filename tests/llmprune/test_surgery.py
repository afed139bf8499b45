from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmprune import stock_logits
from llmprune.checkpoint import load_pruned, save_pruned
from llmprune.cut_config import check_form
from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.surgery import cut
from llmprune.units import map_units
from tests.llmprune.tiny import (
    FAMILIES,
    logits,
    masked_logits,
    plan_for,
    tiny_model,
    tokens,
    use_double_norms,
)

SUBLAYERS = ("attention_sublayers", "mlp_sublayers")
MIXES = {kind: (kind,) for kind in UNIT_KINDS} | {
    "widths": ("heads", "mlp_channels", "hidden_channels"),
    "groups": ("heads", "kv_groups", "layers"),
    "shallow": ("layers", "mlp_sublayers", "attention_sublayers"),
    "all": UNIT_KINDS,
}
# what a stock class can't hold: layers that lack a part, and GPT-2 with other widths
PER_LAYER_ONLY = {"attention_sublayers", "mlp_sublayers", "shallow", "all"}
GPT2_PER_LAYER_ONLY = PER_LAYER_ONLY | {"heads", "kv_groups", "hidden_channels"}
GPT2_PER_LAYER_ONLY |= {"widths", "groups"}


@pytest.fixture
def double_norms(monkeypatch):
    use_double_norms(monkeypatch)


def assert_cut_is_masked(model, plan, form):
    """In float64 to 1e-10 (where norms are float64 too), in float32 to 1e-4."""
    expected = masked_logits(model, plan)
    found = logits(cut(model, plan, form=form))
    assert float((found - expected).abs().max()) < 1e-10
    single = copy.deepcopy(model).float()
    expected = masked_logits(single, plan)
    found = logits(cut(single, plan, form=form))
    assert float((found - expected).abs().max()) < 1e-4


def forms_for(family, mix):
    only = GPT2_PER_LAYER_ONLY if family == "gpt2" else PER_LAYER_ONLY
    return ("per_layer",) if mix in only else ("uniform", "per_layer")


EVERY_CUT = [
    (family, mix, form) for family in FAMILIES for mix in MIXES for form in forms_for(family, mix)
]


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize(("family", "mix", "form"), EVERY_CUT)
def test_cut_model_equals_masked_model(family, mix, form):
    """T12: folded and sliced equals gated."""
    model = tiny_model(family)
    assert_cut_is_masked(model, plan_for(model, MIXES[mix]), form)
    assert_cut_is_masked(model, plan_for(model, MIXES[mix], scaled=True, seed=1), form)


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("ratio", [1, 3, 7])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_cut_model_equals_masked_model_at_every_gqa_ratio(family, ratio):
    model = tiny_model(family, ratio=ratio, layers=2)
    for mix in ("heads", "kv_groups", "widths", "groups"):
        for scaled in (False, True):
            plan = plan_for(model, MIXES[mix], scaled=scaled, seed=ratio)
            assert_cut_is_masked(model, plan, "uniform")
            assert_cut_is_masked(model, plan, "per_layer")


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_equals_masked_model_with_a_tied_head(family, scaled):
    model = tiny_model(family, tied=True)
    kinds = ("hidden_channels", "mlp_channels", "layers")
    plan = plan_for(model, kinds, scaled=scaled)
    pruned = cut(model, plan, form="per_layer")
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    assert_cut_is_masked(model, plan, "per_layer")
    if family != "gpt2":
        assert_cut_is_masked(model, plan, "uniform")


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cut_model_equals_masked_model_with_biases(family):
    model = tiny_model(family, biased=True)
    kinds = ("heads", "kv_groups", "mlp_channels", "layers")
    for scaled in (False, True):
        assert_cut_is_masked(model, plan_for(model, kinds, scaled=scaled), "uniform")
        assert_cut_is_masked(model, plan_for(model, UNIT_KINDS, scaled=scaled), "per_layer")


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_equals_masked_model_where_layers_differ(family):
    model = tiny_model(family, ratio=3, layers=4)
    for scaled in (False, True):
        plan = plan_for(model, UNIT_KINDS, scaled=scaled, differ=True, seed=5)
        assert_cut_is_masked(model, plan, "per_layer")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    ratio=st.sampled_from([1, 2, 3]),
    tied=st.booleans(),
    biased=st.booleans(),
    kinds=st.sets(st.sampled_from(UNIT_KINDS), min_size=1),
    scaled=st.booleans(),
    differ=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_plan_of_any_model_cuts_to_the_masked_model(
    family, ratio, tied, biased, kinds, scaled, differ, seed
):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_double_norms(monkeypatch)
        model = tiny_model(family, ratio=ratio, tied=tied, biased=biased, seed=seed)
        plan = plan_for(model, kinds, scaled=scaled, differ=differ, seed=seed)
        assert_cut_is_masked(model, plan, "per_layer")


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_whose_layers_differ_is_cut_again(family):
    model = tiny_model(family, ratio=3)
    kinds = ("heads", "kv_groups", "mlp_channels", "hidden_channels")
    once = cut(model, plan_for(model, kinds, differ=True), form="per_layer")
    assert len({map_units(once).layer(i) for i in range(3)}) > 1
    plan = plan_for(once, (*kinds, "layers"), scaled=True, seed=2)
    assert_cut_is_masked(once, plan, "per_layer")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_plan_gives_an_equal_model(family):
    model = tiny_model(family, dtype=torch.float32)
    plan = PrunePlan(model=map_units(model).signature(), kept={})
    assert torch.equal(logits(cut(model, plan)), logits(model))
    assert torch.equal(logits(cut(model, plan, form="per_layer")), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_left_as_it_was(family):
    model = tiny_model(family)
    before, config = logits(model), model.config.to_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = cut(model, plan_for(model, UNIT_KINDS, scaled=True), form="per_layer")
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7.0)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cut_keeps_the_dtype(dtype):
    model = tiny_model("llama", dtype=dtype)
    pruned = cut(model, plan_for(model, ("mlp_channels", "hidden_channels")))
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert pruned.config.dtype == dtype


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_the_config_has_the_new_counts(family):
    model = tiny_model(family, ratio=3)
    plan = plan_for(model, ("heads", "mlp_channels", "hidden_channels", "layers"))
    pruned = cut(model, plan)
    config = pruned.config
    assert config.hidden_size == len(plan.kept["hidden_channels"]) == 32
    assert config.num_hidden_layers == len(plan.kept["layers"]) == 2
    assert config.num_attention_heads == len(plan.kept["layers.0.heads"]) == 4
    assert config.num_key_value_heads == 2
    assert config.intermediate_size == len(plan.kept["layers.0.mlp_channels"]) == 26
    assert config.head_dim == 8
    assert config.rms_norm_eps == pytest.approx(0.03 * 48 / 32)
    attention = pruned.model.layers[0].self_attn
    assert attention.o_proj.weight.shape == (32, 4 * 8)
    assert not pruned.training
    assert type(pruned).__module__.startswith("transformers.")
    assert config.architectures == [type(pruned).__name__]


def test_a_gpt2_config_has_the_new_counts():
    model = tiny_model("gpt2")
    plan = plan_for(model, ("mlp_channels", "layers"))
    config = cut(model, plan).config
    assert (config.n_inner, config.n_layer, config.n_head, config.n_embd) == (26, 2, 4, 32)
    plan = plan_for(model, ("heads", "hidden_channels"))
    config = cut(model, plan, form="per_layer").config
    assert (config.n_head, config.n_embd, config.head_dim) == (2, 21, 8)
    assert config.layer_norm_epsilon == model.config.layer_norm_epsilon


@pytest.mark.parametrize("form", ["uniform", "per_layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_numbered_anew(family, form):
    model = tiny_model(family, layers=4)
    plan = PrunePlan(model=map_units(model).signature(), kept={"layers": (1, 3)})
    pruned = cut(model, plan, form=form)
    layers = map_units(pruned).architecture.layers
    attentions = [
        getattr(layer, "self_attn", getattr(layer, "attn", None))
        for layer in pruned.get_submodule(layers)
    ]
    assert [attention.layer_idx for attention in attentions] == [0, 1]
    kept = [name for name, _ in model.get_submodule(f"{layers}.3").named_parameters()]
    for name in kept:
        old = model.get_parameter(f"{layers}.3.{name}")
        assert torch.equal(pruned.get_parameter(f"{layers}.1.{name}"), old)


def generate(model, *, use_cache):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens(length=6), use_cache=use_cache, **options)


@pytest.mark.parametrize(("family", "mix", "form"), EVERY_CUT)
def test_generation_with_cache_equals_generation_without(family, mix, form):
    model = tiny_model(family)
    pruned = cut(model, plan_for(model, MIXES[mix]), form=form)
    with_cache = generate(pruned, use_cache=True)
    assert with_cache.shape == (2, 14)
    assert torch.equal(with_cache, generate(pruned, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_works_when_the_first_layers_have_no_attention(family):
    model = tiny_model(family, layers=4)
    kept = {"attention_sublayers": (2, 3), "mlp_sublayers": (0, 1, 3)}
    plan = PrunePlan(model=map_units(model).signature(), kept=kept)
    pruned = cut(model, plan, form="per_layer")
    assert torch.equal(generate(pruned, use_cache=True), generate(pruned, use_cache=False))
    with torch.no_grad():
        cached = stock_logits.cached_logits(pruned, tokens())
    torch.testing.assert_close(cached, logits(pruned), atol=1e-10, rtol=0)
    assert float((logits(pruned) - masked_logits(model, plan)).abs().max()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_implementation_of_differing_layers_can_be_chosen(family):
    model = tiny_model(family, ratio=3)
    plan = plan_for(model, UNIT_KINDS, differ=True)
    pruned = cut(model, plan, form="per_layer")
    pruned.set_attn_implementation("eager")
    assert pruned.config._attn_implementation == "eager"
    layers = [m for m in pruned.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    assert {layer.config._attn_implementation for layer in layers} == {"eager"}
    with torch.no_grad():
        seen = pruned(tokens(), output_attentions=True).attentions
    assert seen is not None
    assert float((logits(pruned) - masked_logits(model, plan)).abs().max()) < 1e-4


def test_lost_sublayers_are_recorded_as_skip():
    model = tiny_model("llama", layers=4)
    kept = {"attention_sublayers": (1, 2, 3), "mlp_sublayers": (0, 1, 3)}
    plan = PrunePlan(model=map_units(model).signature(), kept=kept)
    pruned = cut(model, plan, form="per_layer")
    own = pruned.config.to_dict()["per_layer_config"]
    assert {int(index): layer["skip"] for index, layer in own.items()} == {
        0: ["attention"],
        2: ["mlp"],
    }
    assert not list(pruned.model.layers[0].self_attn.parameters())
    assert not list(pruned.model.layers[0].input_layernorm.parameters())
    assert not list(pruned.model.layers[2].mlp.parameters())


def test_a_layer_that_loses_both_sublayers_is_gone():
    model = tiny_model("qwen2", layers=4)
    kept = {"attention_sublayers": (0, 2, 3), "mlp_sublayers": (0, 2, 3)}
    plan = PrunePlan(model=map_units(model).signature(), kept=kept)
    pruned = cut(model, plan)
    assert pruned.config.num_hidden_layers == 3
    assert float((logits(pruned) - masked_logits(model, plan)).abs().max()) < 1e-4


@pytest.mark.parametrize(("family", "mix", "form"), EVERY_CUT)
def test_saved_models_reload_with_equal_logits(family, mix, form, tmp_path):
    """T12."""
    model = tiny_model(family, tied=True, biased=True, dtype=torch.float32)
    if family == "llama" and form == "uniform" and "hidden_channels" in MIXES[mix]:
        model = tiny_model(family, tied=True, dtype=torch.float32)
    plan = plan_for(model, MIXES[mix], scaled=True, differ=form == "per_layer")
    pruned = cut(model, plan, form=form)
    save_pruned(pruned, None, tmp_path / "model")
    again = load_pruned(tmp_path / "model")
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(pruned))
    names = {name for name, _ in again.named_parameters()}
    assert names == {name for name, _ in pruned.named_parameters()}
    assert again.config.model_type == pruned.config.model_type


@pytest.mark.parametrize("form", ["uniform", "per_layer"])
def test_biases_survive_the_reload(form, tmp_path):
    model = tiny_model("llama", biased=True, dtype=torch.float32)
    plan = plan_for(model, ("heads", "mlp_channels"))
    save_pruned(cut(model, plan, form=form), None, tmp_path / "model")
    again = load_pruned(tmp_path / "model")
    kept = list(plan.kept["layers.1.mlp_channels"])
    for name in ("gate_proj", "up_proj"):
        bias = model.get_parameter(f"model.layers.1.mlp.{name}.bias")[kept]
        assert torch.equal(again.get_parameter(f"model.layers.1.mlp.{name}.bias"), bias)
    for name in ("model.layers.1.mlp.down_proj.bias", "model.layers.1.self_attn.o_proj.bias"):
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))


def reload_elsewhere(pruned, folder):
    """What stock_logits finds in a fresh process that knows nothing of llmprune."""
    save_pruned(pruned, None, folder / "model")
    input_ids = tokens()
    save_file({"tokens": input_ids, "float32": logits(pruned)}, folder / "reference.safetensors")
    command = [sys.executable, "-P", stock_logits.__file__]
    # the modules cache must not hold what another test loaded
    hidden = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    child = subprocess.run(
        [*command, folder / "model", folder / "reference.safetensors"],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, **hidden},
    )
    return json.loads(child.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["uniform", "per_layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_in_a_fresh_process_gives_the_same_logits(family, form, tmp_path):
    model = tiny_model(family, tied=True, dtype=torch.float32)
    mix = "all" if form == "per_layer" else ("mlp_channels" if family == "gpt2" else "widths")
    plan = plan_for(model, MIXES[mix], scaled=True, differ=form == "per_layer")
    found = reload_elsewhere(cut(model, plan, form=form), tmp_path)
    assert found["remote_code"] == (form == "per_layer")
    assert not found["llmprune_imported"]
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert max(found["max_abs_difference"]["float32"].values()) < 1e-4


def test_per_layer_models_load_without_remote_code(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    pruned = cut(model, plan_for(model, UNIT_KINDS, differ=True), form="per_layer")
    save_pruned(pruned, None, tmp_path / "model")
    (tmp_path / "model" / "modeling_pruned.py").write_text("raise RuntimeError('remote code ran')")
    assert torch.equal(logits(load_pruned(tmp_path)), logits(pruned))


def per_layer_refusal(model, kinds, *, differ=False):
    plan = plan_for(model, kinds, differ=differ)
    with pytest.raises(InputError, match=r"export\.format: per_layer") as refusal:
        cut(model, plan)
    unit_map = map_units(model)
    with pytest.raises(InputError) as early:
        check_form(model, unit_map, plan.widths(unit_map), "uniform")
    assert str(early.value) == str(refusal.value)
    cut(model, plan, form="per_layer")
    return str(refusal.value)


def test_uniform_refuses_gpt2_heads():
    for kinds in (("heads",), ("kv_groups",), ("hidden_channels",)):
        assert "derives head_dim" in per_layer_refusal(tiny_model("gpt2"), kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_refuses_missing_sublayers(family):
    model = tiny_model(family)
    assert "lost its attention" in per_layer_refusal(model, ("attention_sublayers",))
    assert "lost its mlp" in per_layer_refusal(model, ("mlp_sublayers",))


@pytest.mark.parametrize("kind", ["heads", "mlp_channels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_refuses_differing_layers(family, kind):
    if family == "gpt2" and kind == "heads":
        kind = "kv_groups"
    model = tiny_model(family, ratio=3)
    assert "differ in width" in per_layer_refusal(model, (kind,), differ=True)


def plan_keeping(model, hidden):
    kept = {"hidden_channels": tuple(range(hidden))}
    return PrunePlan(model=map_units(model).signature(), kept=kept)


def test_llama_with_an_odd_hidden_size_becomes_mistral_with_equal_logits(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    plan = plan_keeping(model, 23)
    pruned = cut(model, plan)
    assert pruned.config.model_type == "mistral"
    assert pruned.config.sliding_window is None
    expected = masked_logits(model, plan)
    assert float((logits(pruned) - expected).abs().max()) < 1e-4
    save_pruned(pruned, None, tmp_path / "model")
    assert torch.equal(logits(load_pruned(tmp_path)), logits(pruned))


def test_llama_with_a_fitting_hidden_size_stays_llama():
    model = tiny_model("llama")
    assert cut(model, plan_keeping(model, 20)).config.model_type == "llama"


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_llama_with_biases_and_an_odd_hidden_size_is_refused(key):
    model = tiny_model("llama", biased=True)
    setattr(model.config, {"attention_bias": "mlp_bias"}.get(key, "attention_bias"), False)
    with pytest.raises(InputError, match=f"mistral has no {key}.*per_layer"):
        cut(model, plan_keeping(model, 23))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_other_families_take_any_hidden_size(family):
    model = tiny_model(family)
    pruned = cut(model, plan_keeping(model, 23))
    assert pruned.config.model_type == family
    assert pruned.config.hidden_size == 23


def test_layer_types_go_with_their_layers():
    config = tiny_model("qwen2", layers=4).config
    data = config.to_dict() | {"use_sliding_window": True, "max_window_layers": 2}
    data |= {"sliding_window": 4, "layer_types": None}
    model = type(tiny_model("qwen2"))(type(config)(**data)).eval()
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.layer_types == kinds
    plan = PrunePlan(model=map_units(model).signature(), kept={"layers": (1, 2)})
    pruned = cut(model, plan)
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert pruned.config.max_window_layers == 1
    assert float((logits(pruned) - masked_logits(model, plan)).abs().max()) < 1e-4
    lost = PrunePlan(model=plan.model, kept={"attention_sublayers": (0, 2, 3)})
    with pytest.raises(InputError, match=r"mixes layer_types.*remove whole layers"):
        cut(model, lost, form="per_layer")


@pytest.mark.parametrize("form", ["uniform", "per_layer"])
def test_rope_scaling_survives_the_cut(form):
    dense = tiny_model("llama", dtype=torch.float32)
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
    data = dense.config.to_dict() | {"rope_parameters": rope}
    model = type(dense)(type(dense.config)(**data)).eval()
    model.load_state_dict(dense.state_dict())
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-3
    plan = plan_for(model, ("heads", "mlp_channels", "hidden_channels"))
    pruned = cut(model, plan, form=form)
    assert float((logits(pruned) - masked_logits(model, plan)).abs().max()) < 1e-4


@pytest.mark.parametrize("form", ["uniform", "per_layer"])
def test_layers_stay_where_attention_is_scaled_by_their_index(form):
    dense = tiny_model("gpt2", layers=4)
    data = dense.config.to_dict() | {"scale_attn_by_inverse_layer_idx": True}
    model = type(dense)(type(dense.config)(**data)).double().eval()
    model.load_state_dict(dense.state_dict())
    plan = PrunePlan(model=map_units(model).signature(), kept={"layers": (1, 3)})
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        cut(model, plan, form=form)
    channels = plan_for(model, ("mlp_channels",))
    pruned = cut(model, channels, form=form)
    assert float((logits(pruned) - masked_logits(model, channels)).abs().max()) < 1e-10


def test_a_plan_for_another_model_is_refused():
    model = tiny_model("llama")
    plan = plan_for(tiny_model("llama", ratio=3), ("heads",))
    with pytest.raises(InputError, match="plan: must be for this model, which has hidden_size 32"):
        cut(model, plan)


def test_a_wrong_scale_is_seen():
    """The comparison of cut and masked is no tautology: another factor gives other logits."""
    model = tiny_model("llama")
    plan = plan_for(model, ("heads",), scaled=True)
    other = dataclasses.replace(plan, scale={})
    assert float((logits(cut(model, other)) - masked_logits(model, plan)).abs().max()) > 1e-2
