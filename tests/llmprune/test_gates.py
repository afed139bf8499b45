from __future__ import annotations

import pytest
import torch

from llmprune.errors import InputError
from llmprune.gates import attach_gates
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.units import map_units
from tests.llmprune.tiny import FAMILIES, logits, plan_for, tiny_model, use_double_norms

DTYPES = (torch.float32, torch.bfloat16)


def attached(model, kinds=UNIT_KINDS):
    return attach_gates(model, map_units(model), kinds)


def ones_for(gates, dtype=torch.float32):
    groups = (gates.unit_map.groups[name] for name in gates.group_names)
    return {group.name: torch.ones(group.num_units, dtype=dtype) for group in groups}


def hooks_of(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for m in model.modules() for table in tables for hook in getattr(m, table)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", UNIT_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_leave_logits_bit_equal(family, kind, dtype):
    """T1."""
    model = tiny_model(family, layers=2, dtype=dtype)
    dense = logits(model)
    gates = attached(model, (kind,))
    assert gates.group_names
    assert torch.equal(logits(model), dense)
    gates.set(ones_for(gates))
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_of_all_kinds_together_leave_logits_bit_equal(family, dtype):
    model = tiny_model(family, tied=True, biased=True, dtype=dtype)
    dense = logits(model)
    gates = attached(model)
    assert torch.equal(logits(model), dense)
    gates.set(ones_for(gates, torch.float64))
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_gate_changes_the_logits_when_a_unit_is_closed(family):
    for kind in UNIT_KINDS:
        model = tiny_model(family)
        dense = logits(model)
        gates = attached(model, (kind,))
        values = ones_for(gates)
        for value in values.values():
            value[-1] = 0
        gates.set(values)
        assert (logits(model) - dense).abs().max() > 1e-3, kind


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_restores_the_model_exactly(family):
    model = tiny_model(family)
    dense = logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gates = attached(model)
    assert hooks_of(model)
    gates.set_plan(plan_for(model, UNIT_KINDS, scaled=True))
    assert not torch.equal(logits(model), dense)
    gates.detach()
    assert not hooks_of(model)
    assert torch.equal(logits(model), dense)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_gate_and_are_right(family, monkeypatch):
    use_double_norms(monkeypatch)
    model = tiny_model(family, layers=2)
    model.requires_grad_(False)
    gates = attached(model)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.rand(one.shape, generator=generator, dtype=torch.float64) + 0.5
        for name, one in ones_for(gates).items()
    }
    target = torch.randn(logits(model).shape, generator=generator, dtype=torch.float64)
    input_ids = torch.randint(3, 61, target.shape[:2], generator=generator)

    def loss(values):
        gates.set(values)
        return (model(input_ids).logits * target).mean()

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    loss(leaves).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().min() > 0, name
        step = torch.zeros_like(leaf)
        step[1] = 1e-5
        up, down = ({**values, name: values[name] + sign * step} for sign in (1, -1))
        slope = float(loss(up) - loss(down)) / 2e-5
        assert float(leaf.grad[1]) == pytest.approx(slope, rel=1e-4, abs=1e-9), name


def test_opened_gives_the_dense_model_inside_the_block_only():
    for family in FAMILIES:
        model = tiny_model(family)
        dense = logits(model)
        gates = attached(model)
        gates.set_plan(plan_for(model, UNIT_KINDS, scaled=True))
        pruned = logits(model)
        with gates.opened():
            assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), pruned)


def test_opened_closes_again_after_an_error_and_after_a_block_inside_it():
    model = tiny_model("llama")
    dense = logits(model)
    gates = attached(model)
    gates.set_plan(plan_for(model, UNIT_KINDS))
    pruned = logits(model)

    def fail():
        with gates.opened():
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert torch.equal(logits(model), pruned)
    with gates.opened():
        with gates.opened():
            pass
        assert torch.equal(logits(model), dense)


def test_a_group_that_is_not_set_stays_open():
    model = tiny_model("llama")
    gates = attached(model, ("heads", "mlp_channels"))
    first, last = gates.group_names[0], gates.group_names[-1]
    gates.set({first: torch.tensor([1.0, 0.0, 1.0, 0.5])})
    one = logits(model)
    gates.set({last: torch.zeros(40)})
    both = logits(model)
    assert not torch.equal(one, both)
    gates.set({last: torch.ones(40)})
    assert torch.equal(logits(model), one)


def test_unknown_groups_are_refused():
    model = tiny_model("llama")
    gates = attached(model, ("heads",))
    with pytest.raises(InputError, match=r"layers\.0\.mlp_channels was not attached"):
        gates.set({"layers.0.mlp_channels": torch.ones(40)})
    with pytest.raises(InputError, match=r"layers\.9\.heads was not attached"):
        gates.set({"layers.9.heads": torch.ones(4)})
    assert not gates.values


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_wrong_shapes_are_refused_and_nothing_is_set(shape):
    model = tiny_model("llama")
    gates = attached(model, ("heads",))
    good = torch.ones(4)
    with pytest.raises(InputError, match=r"layers\.1\.heads takes shape \(4,\), got"):
        gates.set({"layers.0.heads": good, "layers.1.heads": torch.ones(shape)})
    assert not gates.values


def test_the_layer_norm_of_a_gated_stream_ignores_closed_channels():
    model = tiny_model("gpt2")
    gates = attached(model, ("hidden_channels",))
    values = torch.ones(32)
    values[::2] = 0
    gates.set({"hidden_channels": values})
    seen = []
    norm = model.transformer.h[1].ln_1
    handle = norm.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    logits(model)
    handle.remove()
    stream, output = seen[0]
    kept = torch.nn.functional.layer_norm(
        stream[..., 1::2], (16,), norm.weight[1::2], norm.bias[1::2], norm.eps
    )
    torch.testing.assert_close(output[..., 1::2], kept, atol=1e-12, rtol=0)
    assert not output[..., ::2].any()


def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_set():
    model = tiny_model("llama")
    gates = attached(model)
    signature = gates.unit_map.signature()
    for kept in ({"layers": (0, 9)}, {"layers.0.heads": ()}, {"layers.9.heads": (0,)}):
        with pytest.raises(InputError, match=r"^plan: "):
            gates.set_plan(PrunePlan(model=signature, kept=kept))
    with pytest.raises(InputError, match="must be for this model"):
        gates.set_plan(plan_for(tiny_model("qwen2"), ("layers",)))
    assert not gates.values
