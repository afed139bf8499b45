"""Calling an operator costs more than the product of a small layer and one token.

So it is left out where nothing would see it, and only there.
"""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmprune_kernels import BlockSparseLinear, BlockSparseMLP, block_sparse_linear, ops
from tests.llmprune_kernels.cases import mask_of, problem

OPERATORS = ("llmprune::block_sparse_linear", "llmprune::block_sparse_swiglu")


def layer(seed=0, out_features=80, in_features=64, dtype=torch.float32):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    mask = mask_of("half") if out_features == 80 else mask_of("half").T
    return BlockSparseLinear.from_dense(linear, mask).eval()


def mlp():
    return BlockSparseMLP(layer(1), layer(2), layer(3, 64, 80)).eval()


def operators_in(run):
    """Names of our operators that the profiler saw."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.key for event in profile.key_averages()} & set(OPERATORS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_calls_no_operator(mode):
    x, module = torch.randn(2, 3, 64), mlp()
    wanted = module(x)
    with mode():
        assert operators_in(lambda: module(x)) == set()
        got = module(x)
    assert torch.equal(got, wanted)
    assert not got.requires_grad


def test_weights_that_do_not_learn_call_no_operator_either():
    module = layer().requires_grad_(False)
    assert operators_in(lambda: module(torch.randn(3, 64))) == set()
    assert operators_in(lambda: module(torch.randn(3, 64, requires_grad=True))) == {OPERATORS[0]}


def test_learning_calls_operators():
    module = mlp()
    assert operators_in(lambda: module(torch.randn(3, 64))) == set(OPERATORS)


def test_modes_see_the_operators():
    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, module = torch.randn(3, 64), mlp()
    with torch.no_grad():
        for mode in (Dispatched(), Called()):
            seen: list[str] = []
            with mode:
                module(x)
            for name in OPERATORS:
                assert any(one.startswith(name.replace("::", ".")) for one in seen)
        with FlopCounterMode(display=False) as counter:
            module(x)
    assert counter.get_total_flops() == 2 * 3 * sum(one.numel() for one in module.parameters())


@pytest.mark.parametrize("trace", [make_fx, lambda call: lambda x: torch.jit.trace(call, (x,))])
def test_a_trace_holds_the_operator(trace):
    x, values, index, bias = problem("half", (16, 16), 3, torch.float32)
    with torch.no_grad():
        traced = trace(lambda x: block_sparse_linear(x, values, index, bias))(x)
        assert "block_sparse_linear" in str(traced.graph)
        torch.testing.assert_close(traced(2 * x), block_sparse_linear(2 * x, values, index, bias))


def test_function_transforms_and_subclasses_get_the_operator(monkeypatch):
    class Marked(torch.Tensor):
        pass

    x, values, index, bias = problem("half", (16, 16), 3, torch.float32)
    wanted = block_sparse_linear(x, values, index, bias)

    def call(x):
        assert not ops._is_plain(x, values, bias)
        return block_sparse_linear(x, values, index, bias)

    assert type(call(x.as_subclass(Marked))) is Marked
    torch.testing.assert_close(torch.vmap(call)(x), wanted)
    torch.testing.assert_close(torch.func.jvp(call, (x,), (x,))[0], wanted)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("learns", [True, False])
def test_compiled_and_exported_layers_keep_the_operator(learns):
    module, x = mlp(), torch.randn(3, 64)
    with torch.set_grad_enabled(learns):
        wanted = module(x)
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), wanted)
        for strict in (True, False):
            graph = str(torch.export.export(module, (x,), strict=strict).graph)
            assert all(name.replace("::", ".") in graph for name in OPERATORS)
