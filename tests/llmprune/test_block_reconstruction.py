"""The refit of projections whose blocks are zero."""

from __future__ import annotations

import copy

import pytest
import torch

from llmprune.block_reconstruction import reconstruct_blocks
from llmprune.units import map_units
from llmprune.weight_blocks import BlockPlan, expand, zero_blocks
from tests.llmprune.test_weight_blocks import logits, random_plan, wide_model

BATCHES = tuple(
    torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(seed))
    for seed in range(6)
)


def refitted(dense, plan, ridge=1e-3, on_layer=lambda done, total: None):
    pruned = copy.deepcopy(dense)
    zero_blocks(pruned, plan)
    zeroed = copy.deepcopy(pruned)
    reconstruct_blocks(
        pruned,
        dense,
        map_units(dense),
        plan,
        batches=BATCHES,
        ridge=ridge,
        on_layer=on_layer,
    )
    return zeroed, pruned


@torch.no_grad()
def stream_of(model):
    """The residual stream after the last layer, on the calibration rows."""
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=torch.cat(BATCHES))
    handle.remove()
    return seen[0]


@torch.no_grad()
def reads(model, name):
    """What a projection reads on the calibration rows, (tokens, width)."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=torch.cat(BATCHES))
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("rows", ["balanced", "free"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "mistral"])
@pytest.mark.parametrize("modules", [("mlp",), ("attention",), ("mlp", "attention")])
def test_the_stream_comes_nearer_to_the_dense_one_and_zeros_stay(family, modules, rows):
    dense = wide_model(family)
    before = copy.deepcopy(dense.state_dict())
    _, plan = random_plan(dense, modules=modules, rows=rows)
    told = []
    zeroed, pruned = refitted(dense, plan, on_layer=lambda *progress: told.append(progress))
    wanted = stream_of(dense)
    assert (stream_of(pruned) - wanted).norm() < 0.97 * (stream_of(zeroed) - wanted).norm()
    for name, mask in plan.keep_masks.items():
        weight = pruned.get_submodule(name).weight
        kept = expand(mask, plan.blocks[name]).bool()
        assert (weight[~kept] == 0).all()
        # a row that reads all or nothing has nothing to make up for by itself
        is_partial = bool((mask.any(1) & ~mask.all(1)).any())
        was = zeroed.get_submodule(name).weight[kept]
        assert torch.equal(weight[kept], was) <= (not is_partial), name
    others = set(before) - {f"{name}.weight" for name in plan.blocks}
    assert all(torch.equal(pruned.state_dict()[name], before[name]) for name in others)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert told == [(1, 2), (2, 2)]


def test_every_block_row_is_the_least_squares_of_what_it_reads():
    """Nothing that the kept inputs could still tell is left in the error."""
    dense = wide_model()
    _, plan = random_plan(dense, modules=("mlp",))
    _, pruned = refitted(dense, plan, ridge=1e-10)
    name = "model.layers.0.mlp.up_proj"
    inputs = reads(pruned, name)
    error = inputs @ (dense.get_submodule(name).weight - pruned.get_submodule(name).weight).T
    told = inputs.T @ error
    kept = expand(plan.keep_masks[name], plan.blocks[name]).bool().T
    assert told[kept].abs().max() < 1e-6 * told[~kept].abs().max()


def test_nothing_changes_where_every_block_stays():
    dense = wide_model()
    _, some = random_plan(dense)
    masks = {name: torch.ones_like(mask) for name, mask in some.keep_masks.items()}
    _, pruned = refitted(dense, BlockPlan(some.blocks, masks))
    assert torch.allclose(logits(pruned), logits(dense), atol=1e-10)


def test_a_block_row_without_blocks_stays_zero():
    dense = wide_model()
    _, some = random_plan(dense)
    masks = {name: mask.clone() for name, mask in some.keep_masks.items()}
    name = "model.layers.1.mlp.gate_proj"
    masks[name][0] = False
    _, pruned = refitted(dense, BlockPlan(some.blocks, masks))
    assert (pruned.get_submodule(name).weight[:16] == 0).all()
    assert torch.isfinite(logits(pruned)).all()
