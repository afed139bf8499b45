"""A gated MLP in one call of C++: what it computes, and when it runs."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from llmprune_kernels import BlockSparseLinear, BlockSparseMLP, native, native_build, products
from llmprune_kernels import reference as exact
from llmprune_kernels.dispatch import OVERRIDE, Choice
from llmprune_kernels.ops import block_sparse_mlp
from tests.llmprune_kernels import blocks
from tests.llmprune_kernels.cases import mask_of
from tests.llmprune_kernels.test_native import DTYPES, ROWS, usable

pytestmark = pytest.mark.skipif(
    native_build.find_compiler() is None or native_build.is_switched_off(),
    reason="no C++ compiler, or LLMPRUNE_KERNELS_NATIVE=0",
)


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def weights(dtype, block=(32, 16), down_block=(16, 64), patterns=("unequal", "random", "random")):
    """Gate, up and down of 64 numbers in, 192 between and 48 out, scaled so that SiLU bends."""
    grids = [(192 // block[0], 64 // block[1])] * 2 + [(48 // down_block[0], 192 // down_block[1])]
    sides = (block, block, down_block)
    made = [blocks.weight(*one) for one in zip(patterns, [dtype] * 3, sides, grids, strict=True)]
    return [(values / 8, index) for values, index in made]


def apart(x, gate, up, down, bias=None, using=None):
    return native.linear(native.linear_swiglu(x, *gate, *up, using=using), *down, bias, using=using)


def wanted(x, gate, up, down, bias=None):
    wide = [(values.double(), index) for values, index in (gate, up, down)]
    between = exact.swiglu(x.double(), *wide[0], *wide[1])
    return exact.exact(between, *wide[2], None if bias is None else bias.double())


@pytest.mark.parametrize("patterns", itertools.product(("unequal", "empty rows", "full"), repeat=3))
def test_it_equals_float64_and_has_the_bits_of_two_calls(patterns):
    for (name, dtype), num_rows in itertools.product(usable(), ROWS):
        layers, bias = weights(dtype, patterns=patterns), torch.randn(48).to(dtype)
        x = blocks.surrounded(torch.randn(num_rows, 64).to(dtype))
        y = native.gated_mlp(x, *layers, bias, using=name)
        error = exact.relative_error(y, wanted(x, *layers, bias))
        assert error <= blocks.TOLERANCE[dtype], (name, dtype, num_rows)
        assert torch.equal(y, apart(x, *layers, bias, using=name)), (name, dtype, num_rows)


@pytest.mark.parametrize("block", [(16, 16), (64, 32), (32, 64), (16, 64)])
@pytest.mark.parametrize("down_block", [(16, 16), (48 // 3, 32), (16, 64)])
def test_blocks_of_down_may_have_another_shape(block, down_block):
    for (name, dtype), num_rows in itertools.product(usable(), (1, 9, 33)):
        layers, x = weights(dtype, block, down_block), torch.randn(num_rows, 64).to(dtype)
        y = native.gated_mlp(x, *layers, using=name)
        assert torch.equal(y, apart(x, *layers, using=name)), (name, dtype, num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_go_through_in_rounds_equal_float64_and_two_calls(dtype):
    """The rows of a round are 48 where a row has 8,192 numbers in between."""
    gate, up = (blocks.weight("random", dtype, (128, 16), (64, 2)) for _ in range(2))
    down = blocks.weight("random", dtype, (16, 128), (2, 64))
    for num_rows in (48, 49, 96, 103, 155, 250):
        x = (torch.randn(num_rows, 32) / 4).to(dtype)
        y = native.gated_mlp(x, gate, up, down)
        error = exact.relative_error(y, wanted(x, gate, up, down))
        assert error <= 4 * blocks.TOLERANCE[dtype], num_rows
        assert torch.equal(y, apart(x, gate, up, down)), num_rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(native, "_MIN_THREADED_WORK", 0)
    layers = weights(dtype)
    before = torch.get_num_threads()
    try:
        for num_rows in (1, 5, 11, 100):
            x, results = torch.randn(num_rows, 64).to(dtype), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results += [native.gated_mlp(x, *layers) for _ in range(4)]
            assert all(torch.equal(result, results[0]) for result in results[1:])
    finally:
        torch.set_num_threads(before)


def test_leading_dimensions_stay_and_no_rows_give_no_rows():
    layers = weights(torch.float32)
    x = torch.randn(2, 3, 64)
    y = native.gated_mlp(x, *layers)
    assert torch.equal(y.flatten(0, 1), native.gated_mlp(x.flatten(0, 1), *layers))
    assert torch.equal(native.gated_mlp(x.transpose(0, 1), *layers), y.transpose(0, 1))
    assert native.gated_mlp(torch.empty(0, 64), *layers).shape == (0, 48)


def test_nan_of_a_row_stays_in_that_row():
    for (name, dtype), num_rows in itertools.product(usable(), (3, 20)):
        x = torch.randn(num_rows, 64).to(dtype)
        x[1] = float("nan")
        layers = weights(dtype, patterns=("full", "full", "full"))
        bad = native.gated_mlp(x, *layers, using=name).isnan()
        assert bad[1].all()
        assert not bad[torch.arange(num_rows) != 1].any()


def test_what_does_not_fit_is_refused():
    x = torch.randn(2, 64)
    gate, up, down = weights(torch.float32)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 64\), got \(2, 32\)"):
        native.gated_mlp(x[:, :32], gate, up, down)
    with pytest.raises(ValueError, match="one block, got 6x4 and 12x4 of the blocks"):
        native.gated_mlp(x, gate, weights(torch.float32, (16, 16))[1], down)
    with pytest.raises(ValueError, match=r"as many in_features as gate and up .* 192, got 64"):
        native.gated_mlp(x, gate, up, gate)
    with pytest.raises(ValueError, match="contiguous blocks"):
        native.gated_mlp(x, gate, up, (down[0][1:], down[1]))
    for wrong in range(3):
        layers = [gate, up, down]
        layers[wrong] = (layers[wrong][0].bfloat16(), layers[wrong][1])
        with pytest.raises(ValueError, match="of one dtype"):
            native.gated_mlp(x, *layers)
    for bias in (torch.randn(47), torch.randn(48).double()):
        with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \(48,\)"):
            native.gated_mlp(x, gate, up, down, bias)


@pytest.fixture
def calls(monkeypatch):
    """One entry for every call of the whole MLP; C++ is chosen whatever this processor is."""
    monkeypatch.setenv(OVERRIDE, "native")
    seen, call = [], native.gated_mlp
    monkeypatch.setattr(native, "gated_mlp", lambda *args: seen.append(1) or call(*args))
    return seen


def mlp(dtype=torch.float32, bias=True):
    gate, up = (nn.Linear(64, 80, bias=False, dtype=dtype) for _ in range(2))
    down = nn.Linear(80, 64, bias=bias, dtype=dtype)
    masks = (mask_of("half"), mask_of("all"), mask_of("half").T)
    layers = map(BlockSparseLinear.from_dense, (gate, up, down), masks)
    return BlockSparseMLP(*layers).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_of_a_block_sparse_mlp_is_one_call(dtype, bias, calls):
    module, x = mlp(dtype, bias), torch.randn(2, 3, 64).to(dtype)
    separate = module(x)
    assert calls == []
    with torch.inference_mode():
        assert torch.equal(module(x), separate)
    assert calls == [1]
    assert not module.requires_grad_(False)(x).requires_grad
    assert calls == [1, 1]


@pytest.mark.parametrize("which", range(3))
def test_one_product_that_is_not_chosen_keeps_all_apart(which, calls, monkeypatch):
    module, x = mlp(), torch.randn(3, 64)
    refused = (module.gate_proj, module.up_proj, module.down_proj)[which]
    choose = products.choose_backend

    def choose_all_but_one(work):
        same = (work.in_features, work.density) == (refused.in_features, refused.index.density)
        return Choice("pytorch", "told so") if same else choose(work)

    with torch.no_grad():
        together = module(x)
        monkeypatch.setattr(products, "choose_backend", choose_all_but_one)
        torch.testing.assert_close(module(x), together)
    assert calls == [1]


@torch.no_grad()
def test_elsewhere_products_stay_apart(calls, monkeypatch):
    x = torch.randn(3, 64)
    module = mlp()
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
    assert mlp()(x[:0]).shape == (0, 64)
    monkeypatch.delenv(OVERRIDE)
    assert mlp(torch.float64)(x.double()).dtype == torch.float64
    assert calls == [1]


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
    assert calls == [1]


def test_it_has_the_gradients_of_its_parts():
    module = mlp(torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    gate, up, down = module.children()
    whole = block_sparse_mlp(
        x, *((one.values, one.index) for one in (gate, up, down)), down.bias
    ).square()
    parts = down(nn.functional.silu(gate(x)) * up(x)).square()
    torch.testing.assert_close(whole, parts)
    of = [x, *module.parameters()]
    slopes = [torch.autograd.grad(one.sum(), of) for one in (whole, parts)]
    torch.testing.assert_close(*slopes)
