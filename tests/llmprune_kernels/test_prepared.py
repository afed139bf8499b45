"""When products of layers run as they were prepared, and what must make them prepared anew."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from llmprune_kernels import (
    BlockSparseLinear,
    BlockSparseMLP,
    native,
    native_build,
    prepared,
    products,
)
from llmprune_kernels.dispatch import OVERRIDE, Choice, choose_backend
from tests.llmprune_kernels.cases import mask_of
from tests.llmprune_kernels.test_native import DTYPES

pytestmark = pytest.mark.skipif(
    native_build.find_compiler() is None or native_build.is_switched_off(),
    reason="no C++ compiler, or LLMPRUNE_KERNELS_NATIVE=0",
)
MLP, SWIGLU, LINEAR = "llmprune_gated_mlp", "llmprune_linear_swiglu", "llmprune_linear"


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Functions of C++ that were called; they are chosen, whatever this processor is."""
    torch.manual_seed(0)
    monkeypatch.setenv(OVERRIDE, "native")
    seen, run = [], native.run

    def seen_run(product, x, **options):
        seen.append(product.function)
        return run(product, x, **options)

    monkeypatch.setattr(native, "run", seen_run)
    return seen


@pytest.fixture
def prepares(monkeypatch):
    """One entry for every time that layers were prepared."""
    seen, init = [], prepared.PreparedProduct.__init__

    def seen_init(self, layers):
        seen.append(len(layers))
        init(self, layers)

    monkeypatch.setattr(prepared.PreparedProduct, "__init__", seen_init)
    return seen


def linear(dtype=torch.float32, bias=True, mask="half", sizes=(64, 80)):
    dense = nn.Linear(*sizes, bias=bias, dtype=dtype)
    kept = mask_of(mask) if sizes == (64, 80) else mask_of(mask).T
    return BlockSparseLinear.from_dense(dense, kept).eval()


def mlp(dtype=torch.float32, bias=True):
    gate, up = linear(dtype, bias=False), linear(dtype, bias=False, mask="all")
    return BlockSparseMLP(gate, up, linear(dtype, bias, sizes=(80, 64))).eval()


def by_operators(module, x):
    """What it computes where nothing is prepared: gradients are asked for."""
    with torch.enable_grad():
        return module(x).detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_of_a_block_sparse_mlp_is_one_call(dtype, bias, calls):
    module, x = mlp(dtype, bias), torch.randn(2, 3, 64).to(dtype)
    separate = module(x)
    assert calls == [SWIGLU, LINEAR]
    with torch.inference_mode():
        assert torch.equal(module(x), separate)
    assert calls == [SWIGLU, LINEAR, MLP]
    assert not module.requires_grad_(False)(x).requires_grad
    assert calls[3:] == [MLP]
    assert module(x.requires_grad_()).requires_grad
    assert calls[4:] == [SWIGLU, LINEAR]


@torch.no_grad()
@pytest.mark.parametrize("module", [mlp(), linear()])
def test_weights_are_prepared_once(module, prepares):
    for shape in ((1, 64), (7, 64), (2, 3, 64), (1, 64), (64,), (0, 64), (20, 128)):
        x = torch.randn(shape)[..., :64]
        torch.testing.assert_close(module(x), by_operators(module, x))
    assert len(prepares) == 1


def _other_values(layer):
    layer.values = nn.Parameter(torch.randn_like(layer.values))


def _other_data(layer):
    layer.values.data = torch.randn_like(layer.values)


def _other_numbers(layer):
    layer.values.copy_(torch.randn_like(layer.values))


def _other_bias(layer):
    layer.bias = nn.Parameter(torch.randn_like(layer.bias))


def _no_bias(layer):
    layer.bias = None


def _other_index(layer):
    old = layer.row_ptr
    layer.load_state_dict(layer.state_dict())
    assert layer.row_ptr is not old


def _other_columns(layer):
    layer.col.data = layer.col.clone()
    layer.col[:2] = layer.col[:2].flip(0)


def _other_dtype(layer):
    layer.bfloat16().float()


def _dense_copy(layer):
    layer.keep_dense()
    layer.values.zero_()


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        (_other_values, True),
        (_other_data, True),
        (_other_numbers, False),
        (_other_bias, True),
        (_no_bias, True),
        (_other_index, True),
        (_other_columns, True),
        (_other_dtype, True),
        (_dense_copy, False),
    ],
)
@pytest.mark.parametrize("make", [mlp, linear])
def test_changed_weights_are_seen(make, change, is_new, prepares):
    module, x = make(), torch.randn(3, 64)
    module(x)
    change(module.down_proj if make is mlp else module)
    torch.testing.assert_close(module(x), by_operators(module, x), rtol=1e-5, atol=1e-5)
    assert len(prepares) == 1 + is_new


@torch.no_grad()
def test_copies_have_weights_of_their_own(prepares):
    module, x = mlp(), torch.randn(3, 64)
    y = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert not any(one._prepared for one in other.modules())
        assert torch.equal(other(x), y)
        other.down_proj.values.zero_()
        other.down_proj.bias.zero_()
        assert not other(x).any()
    assert torch.equal(module(x), y)
    assert len(prepares) == 3


@torch.no_grad()
def test_weights_that_moved_are_not_kept():
    module, x = mlp(), torch.randn(3, 64)
    module(x)
    module.to("meta")
    assert module._prepared is None


@torch.no_grad()
@pytest.mark.parametrize("which", range(3))
def test_one_product_that_is_not_chosen_keeps_all_apart(which, calls, monkeypatch):
    module, x = mlp(), torch.randn(3, 64)
    together = module(x)
    refused = list(module.children())[which]

    def choose_all_but_one(work):
        same = (work.in_features, work.density) == (refused.in_features, refused.index.density)
        return Choice("pytorch", "told so") if same else choose_backend(work)

    for place in (prepared, products):
        monkeypatch.setattr(place, "choose_backend", choose_all_but_one)
    other = copy.deepcopy(module)
    torch.testing.assert_close(other(x), together)
    assert calls.count(MLP) == 1
    # who was asked before is not asked again
    assert torch.equal(module(x), together)


@torch.no_grad()
def test_elsewhere_products_stay_apart(calls, monkeypatch):
    module, x = mlp(), torch.randn(3, 64)
    together = module(x)
    for name in ("pytorch", "densify", "reference"):
        monkeypatch.setenv(OVERRIDE, name)
        torch.testing.assert_close(module(x), together)
    monkeypatch.setenv(OVERRIDE, "native")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    module.down_proj.keep_dense()
    torch.testing.assert_close(module(x), together)
    module.down_proj = module.down_proj.to_dense()
    torch.testing.assert_close(module(x), together)
    module.gate_proj.keep_dense()
    torch.testing.assert_close(module(x), together)
    monkeypatch.delenv(OVERRIDE)
    assert mlp(torch.float64)(x.double()).dtype == torch.float64
    assert calls.count(MLP) == 1


@torch.no_grad()
@pytest.mark.parametrize("make", [mlp, linear])
def test_an_x_that_does_not_fit_is_refused_after_one_that_did(make):
    module = make()
    module(torch.randn(3, 64))
    with pytest.raises(ValueError, match="x must end in 64 features"):
        module(torch.randn(3, 48))
    with pytest.raises(ValueError, match="must share a dtype"):
        module(torch.randn(3, 64).bfloat16())


@torch.no_grad()
def test_who_watches_down_sees_it_called(calls):
    module, x, seen = mlp(), torch.randn(3, 64), []
    together = module(x)
    watch = (
        module.down_proj.register_forward_hook,
        module.down_proj.register_forward_pre_hook,
        register_module_forward_pre_hook,
    )
    for number, register in enumerate(watch, 1):
        handle = register(lambda layer, *_: seen.append(layer))
        assert torch.equal(module(x), together)
        handle.remove()
        assert seen.count(module.down_proj) == number
    replaced = module.down_proj.forward
    module.down_proj.forward = lambda x: 2 * replaced(x)
    assert torch.equal(module(x), 2 * together)
    assert calls.count(MLP) == 1
