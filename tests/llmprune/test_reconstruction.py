import importlib.util
from pathlib import Path

import pytest
import torch

from llmprune.checkpoint import cast_parameters
from llmprune.plan import PrunePlan
from llmprune.reconstruction import reconstruct
from llmprune.streams import even_batches
from llmprune.surgery import cut
from llmprune.units import map_units

# tests are no packages, so a neighbour is loaded by path
_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def batches(seed=3):
    return [tiny.tokens(batch=4, length=16, seed=seed + i) for i in range(8)]


def last_stream(model):
    """The residual stream after the last layer, on the calibration rows."""
    inner = model.get_submodule(model.base_model_prefix)
    norm = inner.norm if hasattr(inner, "norm") else inner.ln_f
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.cat(batches()))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kinds", [("mlp_channels",), ("heads", "mlp_channels"), ("layers",)])
def test_refit_brings_the_stream_nearer_to_the_dense_one(family, kinds):
    dense = tiny.tiny_model(family, ratio=2, layers=2 if kinds == ("layers",) else 1)
    unit_map = map_units(dense)
    plan = tiny.plan_for(dense, kinds)
    if kinds == ("layers",):
        # the kept layer can make up for one before it, not for one after it
        plan = PrunePlan(model=plan.model, kept={"layers": (1,)})
    pruned = cut(dense, plan, form="per_layer")
    wanted = last_stream(dense)
    before = (last_stream(pruned) - wanted).norm()
    reconstruct(pruned, dense, unit_map, plan, batches=batches(), ridge=1e-3)
    # units of a random model share little, so most of the error stays
    assert (last_stream(pruned) - wanted).norm() < 0.98 * before


def test_refit_of_an_uncut_model_changes_nothing():
    dense = tiny.tiny_model("llama")
    unit_map = map_units(dense)
    plan = PrunePlan(model=unit_map.signature(), kept={})
    same = cut(dense, plan)
    reconstruct(same, dense, unit_map, plan, batches=batches())
    assert torch.allclose(tiny.logits(same), tiny.logits(dense), atol=1e-9)


def test_refit_restores_a_layer_whose_lost_channels_were_copies_of_kept_ones():
    dense = tiny.tiny_model("llama", layers=1)
    mlp = dense.model.layers[0].mlp
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[20:] = projection.weight[:20]
    unit_map = map_units(dense)
    kept = {"layers.0.mlp_channels": tuple(range(20))}
    plan = PrunePlan(model=unit_map.signature(), kept=kept)
    pruned = cut(dense, plan)
    assert (tiny.logits(pruned) - tiny.logits(dense)).abs().max() > 0.1
    reconstruct(pruned, dense, unit_map, plan, batches=batches(), ridge=1e-12)
    assert torch.allclose(tiny.logits(pruned), tiny.logits(dense), atol=1e-5)


def test_refit_with_hidden_channels_cut_aims_at_the_kept_channels():
    dense = tiny.tiny_model("qwen3")
    unit_map = map_units(dense)
    plan = tiny.plan_for(dense, ("hidden_channels", "mlp_channels"))
    pruned = cut(dense, plan)
    kept = torch.tensor(plan.kept["hidden_channels"])
    wanted = last_stream(dense)[..., kept]
    before = (last_stream(pruned) - wanted).norm()
    reconstruct(pruned, dense, unit_map, plan, batches=batches())
    assert (last_stream(pruned) - wanted).norm() < before


@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(16, {8}), (12, {6}), (7, {7}), (13, {1}), (1, {1})]
)
def test_batches_are_alike_and_leave_no_row_out(num_rows, sizes):
    rows = torch.arange(num_rows * 3).view(num_rows, 3)
    found = even_batches(rows)
    assert {len(batch) for batch in found} == sizes
    assert torch.equal(torch.cat(found), rows)


def test_a_16_bit_model_is_refitted_in_float32():
    dense = tiny.tiny_model("llama", dtype=torch.bfloat16)
    unit_map = map_units(dense)
    plan = tiny.plan_for(dense, ("heads", "mlp_channels", "hidden_channels"))
    pruned = cut(dense, plan)
    cast_parameters(pruned, torch.float32)
    before = pruned.model.layers[0].mlp.down_proj.weight.clone()
    reconstruct(pruned, dense, unit_map, plan, batches=batches())
    after = pruned.model.layers[0].mlp.down_proj.weight
    assert after.dtype == torch.float32
    assert not torch.equal(after, after.bfloat16().float())
    assert not torch.equal(after, before)
