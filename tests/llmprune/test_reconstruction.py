import importlib.util
from pathlib import Path

import pytest
import torch

from llmprune.checkpoint import cast_parameters
from llmprune.hidden_refit import sides_of
from llmprune.plan import PrunePlan
from llmprune.reconstruction import reconstruct
from llmprune.streams import Streams, even_batches
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


def rows_logits(model):
    return tiny.logits(model, torch.cat(batches())).log_softmax(-1)


def divergence(model, wanted):
    """Nats a token from the dense model's distributions, on the calibration rows."""
    got = rows_logits(model)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kinds", [("hidden_channels",), ("hidden_channels", "heads", "layers")])
def test_reads_of_a_cut_stream_are_refitted(family, kinds, tied, monkeypatch):
    dense = tiny.tiny_model(family, ratio=2, tied=tied)
    unit_map = map_units(dense)
    plan = tiny.plan_for(dense, kinds)
    wanted = rows_logits(dense)
    found = {}
    for name in ("cut", "writes", "all"):
        pruned = cut(dense, plan, form="per_layer")
        with monkeypatch.context() as patch:
            if name == "writes":
                patch.setattr("llmprune.hidden_refit._CutStream.refit_reads", lambda *_: None)
            if name != "cut":
                reconstruct(pruned, dense, unit_map, plan, batches=batches())
        found[name] = divergence(pruned, wanted)
    assert found["writes"] < found["cut"]
    # channels of a random model tell little of each other
    assert found["all"] < 0.995 * found["writes"]


def test_a_tied_head_is_left_alone_where_no_fit_of_it_is_nearer(monkeypatch):
    dense = tiny.tiny_model("llama", tied=True)
    unit_map = map_units(dense)
    plan = tiny.plan_for(dense, ("hidden_channels",))
    embeddings = {}
    for name, errors in (("nearer", iter(range(1000, 0, -1))), ("farther", iter(range(1000)))):
        pruned = cut(dense, plan)
        before = pruned.get_input_embeddings().weight.clone()
        monkeypatch.setattr("llmprune.hidden_refit._error", lambda *_, e=errors: next(e))
        reconstruct(pruned, dense, unit_map, plan, batches=batches())
        assert pruned.lm_head.weight is pruned.get_input_embeddings().weight
        embeddings[name] = (before, pruned.lm_head.weight)
    assert torch.equal(*embeddings["farther"])
    assert not torch.allclose(*embeddings["nearer"], rtol=1e-2)


@pytest.mark.parametrize("kinds", [("hidden_channels",), ("heads",)])
@torch.no_grad()
def test_a_layer_that_adds_nothing_wants_the_stream_as_it_is(kinds):
    dense = tiny.tiny_model("llama", tied=True)
    unit_map = map_units(dense)
    plan = tiny.plan_for(dense, kinds)
    pruned = cut(dense, plan)
    sides = sides_of(pruned, dense, unit_map, plan, batches(), 1e-3)
    streams = Streams(pruned, unit_map.architecture.layers, batches())
    sides.begin(streams)
    moved = [stream + 0.1 * torch.randn_like(stream) for stream in streams.values]
    filled = sides.filled(moved)
    assert {value.shape[-1] for value in filled} == {unit_map.dense.hidden_size}
    for stream, wanted in zip(moved, sides.wanted(filled), strict=True):
        torch.testing.assert_close(wanted, stream)
    # and what a dense layer adds to the kept channels is wanted of the cut one
    kept = torch.tensor(plan.kept_in(unit_map.groups["hidden_channels"]))
    more = sides.wanted([value + torch.arange(value.shape[-1]) for value in filled])
    torch.testing.assert_close(more[0] - moved[0], kept.expand_as(moved[0]).double())


def with_copied_channels(family):
    """A dense model whose residual stream holds every channel twice."""
    dense = tiny.tiny_model(family, layers=2)
    if family != "gpt2":
        # an eps that shows would make the norm of half the channels another function
        dense.config.rms_norm_eps = 1e-12
        for module in dense.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-12
    unit_map = map_units(dense)
    half = unit_map.dense.hidden_size // 2
    with torch.no_grad():
        for parameter in unit_map.parameters:
            value = dense.get_parameter(parameter.name)
            module = parameter.name.rpartition(".")[0]
            write = any(module.endswith(f".{name}") for name in WRITES)
            if module in unit_map.architecture.embeddings:
                value[:, half:] = value[:, :half]
            elif write and value.dim() == 1:
                value[half:] = value[:half]
            elif write:
                is_conv = family == "gpt2"
                value = value.T if is_conv else value
                value[half:] = value[:half]
    return dense, unit_map, half


WRITES = ("o_proj", "down_proj", "c_proj")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_refit_restores_a_model_whose_lost_channels_were_copies_of_kept_ones(family, monkeypatch):
    # weights have more outputs than go through float64 at once
    monkeypatch.setattr("llmprune.hidden_refit.OUTPUTS_AT_ONCE", 7)
    dense, unit_map, half = with_copied_channels(family)
    # of every pair another one stays
    kept = tuple(sorted(i if i % 2 else i + half for i in range(half)))
    plan = PrunePlan(model=unit_map.signature(), kept={"hidden_channels": kept})
    pruned = cut(dense, plan, form="per_layer")
    assert (tiny.logits(pruned) - tiny.logits(dense)).abs().max() > 0.1
    reconstruct(pruned, dense, unit_map, plan, batches=batches(), ridge=1e-12)
    assert torch.allclose(tiny.logits(pruned), tiny.logits(dense), atol=1e-5)


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
