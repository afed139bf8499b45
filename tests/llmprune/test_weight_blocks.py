"""Weight blocks: who competes, gates on blocks, zeros, and block-sparse layers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from llmprune import block_sparse
from llmprune.block_gates import BlockGates, block_norms
from llmprune.block_scores import score_blocks
from llmprune.block_sparse import (
    block_sparse_layers,
    make_block_sparse,
    make_dense,
    read_block_index,
    save_block_index,
)
from llmprune.checkpoint import load_pruned
from llmprune.errors import InputError
from llmprune.recipe import Recipe, WeightBlocks
from llmprune.scores import UnitScores
from llmprune.weight_blocks import BlockPlan, choose_blocks, map_blocks, zero_blocks
from llmprune_kernels import BlockSparseMLP
from tests.llmprune.tiny import tiny_model

TOKENS = torch.arange(24).view(2, 12) % 61


def wide_model(family="llama", dtype=torch.float64, seed=0):
    """hidden_size 32 and 64 MLP channels, so that blocks of 16 and 32 fit."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[family](
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def rule(**changes):
    return WeightBlocks(**{"block": (16, 16), "sparsity": 0.5, **changes})


def random_plan(model, **changes):
    block_map = map_blocks(model, rule(**changes))
    scores = UnitScores(score_blocks("random", model, block_map, TOKENS, seed=1))
    return block_map, choose_blocks(scores, block_map)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


# which projections, which blocks, how many


@pytest.mark.parametrize(
    ("family", "modules", "names"),
    [
        ("llama", ("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        ("qwen3", ("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("phi3", ("mlp", "attention"), {"gate_up_proj", "down_proj", "qkv_proj", "o_proj"}),
    ],
)
def test_a_rule_names_the_projections_of_its_sublayers(family, modules, names):
    block_map = map_blocks(wide_model(family), rule(modules=modules))
    assert {name.rpartition(".")[2] for name in block_map.projections} == names
    assert len(block_map.projections) == 2 * len(names)


def test_a_projection_that_the_block_does_not_divide_takes_the_nearest_that_fits():
    blocks = rule(block=(64, 16), sparsity=0.33, modules=("mlp", "attention"))
    found = map_blocks(wide_model(), blocks).projections
    layer = "model.layers.0"
    assert found[f"{layer}.mlp.gate_proj"].block == (64, 16)
    # 32 x 64, 16 x 32: same area, then smaller
    assert found[f"{layer}.mlp.down_proj"].block == (32, 32)
    assert found[f"{layer}.self_attn.k_proj"].block == (16, 32)


def test_a_model_without_a_block_that_fits_is_refused():
    with pytest.raises(InputError, match=r"no block of at most 256 parameters .* divides .*q_proj"):
        map_blocks(tiny_model("llama", kv_groups=1, ratio=1), rule(modules=("attention",)))


def test_a_projection_that_is_no_linear_is_refused():
    with pytest.raises(InputError, match=r"nn.Linear, .*c_attn is a Conv1D"):
        map_blocks(tiny_model("gpt2"), rule(modules=("attention",)))


@pytest.mark.parametrize("rows", ["balanced", "free"])
@pytest.mark.parametrize("sparsity", [0.4, 0.5])
def test_rounding_is_made_up_for_by_the_next_projection(rows, sparsity):
    model = wide_model()
    block_map = map_blocks(model, rule(rows=rows, sparsity=sparsity, modules=("mlp", "attention")))
    step = max(one.num_blocks for one in block_map.projections.values())
    total = sum(one.num_blocks for one in block_map.projections.values())
    assert abs(block_map.density - (1 - sparsity)) <= step / total
    _, plan = random_plan(model, rows=rows, sparsity=sparsity, modules=("mlp", "attention"))
    assert plan.density == pytest.approx(block_map.density)


def test_a_sparsity_that_whole_blocks_miss_is_refused():
    with pytest.raises(InputError, match=r"0.8 can't be met .* got 0.5.*rows: free"):
        map_blocks(wide_model(), rule(sparsity=0.8, modules=("attention",)))


def test_balanced_rows_keep_equally_many_and_free_ones_need_not():
    _, balanced = random_plan(wide_model())
    counts = [mask.sum(1) for mask in balanced.keep_masks.values()]
    assert all((count == count[0]).all() for count in counts)
    _, free = random_plan(wide_model(), rows="free")
    assert any((mask.sum(1) != mask.sum(1)[0]).any() for mask in free.keep_masks.values())


def test_the_best_blocks_of_a_row_stay():
    model = wide_model()
    block_map = map_blocks(model, rule())
    scores = {
        name: torch.arange(one.num_blocks, dtype=torch.float64)
        for name, one in block_map.projections.items()
    }
    plan = choose_blocks(UnitScores(scores), block_map)
    for mask in plan.keep_masks.values():
        # later columns score higher
        assert (mask.int().diff(dim=1) >= 0).all()


# gates


def test_open_gates_leave_logits_bit_equal_and_taking_them_off_leaves_nothing():
    model = wide_model()
    before, attributes = logits(model), {n: dict(m.__dict__) for n, m in model.named_modules()}
    block_map = map_blocks(model, rule(modules=("mlp", "attention")))
    gates = BlockGates(model, block_map)
    assert torch.equal(logits(model), before)
    ones = {n: torch.ones(p.num_blocks) for n, p in block_map.projections.items()}
    gates.set(ones)
    assert torch.equal(logits(model), before)
    gates.detach()
    assert {n: dict(m.__dict__) for n, m in model.named_modules()}.keys() == attributes.keys()
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_closed_gates_are_zeros_in_the_weight():
    model = wide_model()
    block_map, plan = random_plan(model, modules=("mlp", "attention"))
    gates = BlockGates(model, block_map)
    gates.set_plan(plan)
    gated = logits(model)
    with gates.opened():
        with gates.opened():
            pass
        assert not torch.equal(logits(model), gated)
    gates.detach()
    zero_blocks(model, plan)
    torch.testing.assert_close(logits(model), gated, rtol=0, atol=1e-12)


def test_a_gate_s_gradient_is_that_of_its_block():
    model = wide_model()
    block_map = map_blocks(model, rule())
    name, one = next(iter(block_map.projections.items()))
    gates = BlockGates(model, block_map)
    value = torch.ones(one.num_blocks, dtype=torch.float64, requires_grad=True)
    gates.set({name: value})
    weight = model.get_submodule(name).weight
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    slope, full = torch.autograd.grad(loss, [value, weight])
    wanted = (full * weight).view(one.grid[0], 16, one.grid[1], 16).sum((1, 3)).flatten()
    torch.testing.assert_close(slope, wanted)


def test_gates_refuse_what_does_not_fit():
    model = wide_model()
    gates = BlockGates(model, map_blocks(model, rule()))
    with pytest.raises(InputError, match="was not attached"):
        gates.set({"model.layers.0.self_attn.q_proj": torch.ones(4)})
    with pytest.raises(InputError, match=r"takes shape \(8,\), got \(9,\)"):
        gates.set({"model.layers.0.mlp.up_proj": torch.ones(9)})


# scores


@pytest.mark.parametrize(
    "method", ["random", "magnitude", "wanda", "taylor", "taylor_squared", "fisher"]
)
def test_a_dead_block_scores_lowest(method):
    model = wide_model()
    block_map = map_blocks(model, rule())
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[16:32, 16:32] = 0
    scores = score_blocks(method, model, block_map, TOKENS)
    assert all(len(scores[n]) == p.num_blocks for n, p in block_map.projections.items())
    assert all((value >= 0).all() for value in scores.values())
    if method != "random":
        assert scores[name].argmin() == 3
        assert scores[name][3] == 0
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_wanda_of_a_block_is_the_sum_of_weight_times_norm_of_input():
    model = wide_model()
    block_map = map_blocks(model, rule())
    name = "model.layers.0.mlp.down_proj"
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    norms = seen[0].flatten(0, 1).norm(dim=0)
    wanted = (module.weight.abs() * norms)[:16, 16:32].sum()
    found = score_blocks("wanda", model, block_map, TOKENS)[name]
    torch.testing.assert_close(found[1], wanted.detach())


def test_magnitude_is_the_norm_of_the_block():
    model = wide_model()
    block_map = map_blocks(model, rule())
    name, one = next(iter(block_map.projections.items()))
    weight = model.get_submodule(name).weight
    torch.testing.assert_close(block_norms(weight, one)[1], weight[:16, 16:32].norm().detach())


# files and layers


def test_a_plan_survives_json_and_a_broken_one_is_refused():
    _, plan = random_plan(wide_model())
    again = BlockPlan.from_json(plan.to_json())
    assert again.blocks == plan.blocks
    assert all(torch.equal(again.keep_masks[n], m) for n, m in plan.keep_masks.items())
    for text, rule_ in [
        ("{", "must be a block plan"),
        ('{"format": "x"}', "must be a plan of format"),
        (plan.to_json().replace('"columns": 2', '"columns": 1'), "must be a block plan"),
    ]:
        with pytest.raises(InputError, match=f"^here: {rule_}"):
            BlockPlan.from_json(text, name="here")


def test_a_plan_of_another_model_is_refused():
    _, plan = random_plan(wide_model("phi3"))
    with pytest.raises(InputError, match="must be a projection of the model"):
        zero_blocks(wide_model(), plan)
    name = "model.layers.0.mlp.up_proj"
    smaller = BlockPlan({name: (16, 16)}, {name: torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"must be of shape \(32, 32\), got \(64, 32\)"):
        smaller.validate(wide_model())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_block_sparse_layers_compute_the_zeroed_model_and_go_back(family, tmp_path):
    model = wide_model(family)
    _, plan = random_plan(model, modules=("mlp", "attention"))
    zero_blocks(model, plan)
    wanted = logits(model)
    save_block_index(plan, tmp_path)
    make_block_sparse(model, *read_block_index(tmp_path / "llmprune" / "block_index.safetensors"))
    assert set(block_sparse_layers(model)) == set(plan.keep_masks)
    fused = sum(isinstance(module, BlockSparseMLP) for module in model.modules())
    assert fused == (0 if family == "phi3" else 2)
    torch.testing.assert_close(logits(model), wanted)
    new = model.generate(TOKENS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape == (1, 16)
    make_dense(model)
    assert not block_sparse_layers(model)
    torch.testing.assert_close(logits(model), wanted)


def test_only_a_load_gives_pages_of_the_weight_file_back(tmp_path, monkeypatch):
    model = wide_model()
    _, plan = random_plan(model, modules=("mlp", "attention"))
    zero_blocks(model, plan)
    wanted = logits(model)
    given_back = []
    monkeypatch.setattr(block_sparse, "release", lambda weight: given_back.append(weight.shape))
    make_block_sparse(model, plan.indices(), dict(plan.blocks))
    assert given_back == []
    make_dense(model)
    model.save_pretrained(tmp_path)
    save_block_index(plan, tmp_path)
    loaded = load_pruned(tmp_path, block_sparse=True)
    assert len(given_back) == len(plan.keep_masks)
    torch.testing.assert_close(logits(loaded), wanted)


def test_an_index_that_the_weights_left_is_refused(tmp_path):
    model = wide_model()
    _, plan = random_plan(model)
    save_block_index(plan, tmp_path)
    found = read_block_index(tmp_path / "llmprune" / "block_index.safetensors")
    with pytest.raises(InputError, match="must be zero outside its"):
        make_block_sparse(model, *found)


def test_a_damaged_index_is_refused(tmp_path):
    file = tmp_path / "block_index.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is damaged"):
        read_block_index(file)


def test_a_block_sparse_model_trains():
    model = wide_model(dtype=torch.float32)
    _, plan = random_plan(model, modules=("mlp", "attention"))
    zero_blocks(model, plan)
    indices, blocks = plan.indices(), dict(plan.blocks)
    make_block_sparse(model, indices, blocks)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    make_dense(model)
    masks = {
        n: m.repeat_interleave(16, 0).repeat_interleave(16, 1) for n, m in plan.keep_masks.items()
    }
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(model.get_submodule(name), nn.Linear)
        assert (weight[~mask] == 0).all()


# the recipe


BASE = {"model": {"source": "x"}, "prune": {"weight_blocks": {"sparsity": 0.5}}}


@pytest.mark.parametrize(
    ("change", "rule_"),
    [
        (
            {"prune": {"weight_blocks": {"sparsity": 0.5}, "heads": {"sparsity": 0.5}}},
            "prune.heads",
        ),
        ({"budget": {"sparsity": 0.5}}, "budget"),
        ({"compensation": "mean"}, "compensation: mean"),
        ({"recovery": {"train": "lora", "steps": 1}}, "recovery.train: lora"),
        ({"gates": {"train": "lora"}}, "gates.train: lora"),
        ({"export": {"format": "per_layer"}}, "export.format: per_layer"),
        ({"gates": {"prior": "omp"}}, "gates.prior: omp"),
        ({"method": "flap"}, "method: flap"),
    ],
)
def test_what_has_no_meaning_for_blocks_is_refused(change, rule_):
    with pytest.raises(InputError, match=f"can't be combined with {rule_}"):
        Recipe.parse({**json.loads(json.dumps(BASE)), **change})


@pytest.mark.parametrize(
    "blocks",
    [
        {"sparsity": 1.0},
        {"sparsity": 0.5, "block": [8, 16]},
        {"block": [16, 16]},
        {"sparsity": 0.5, "modules": []},
    ],
)
def test_impossible_blocks_are_refused(blocks):
    with pytest.raises(InputError, match=r"prune\.weight_blocks"):
        Recipe.parse({"model": {"source": "x"}, "prune": {"weight_blocks": blocks}})
