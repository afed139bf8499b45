"""A gated MLP in one call of C++: the bits of two calls."""

import itertools

import pytest
import torch

from llmprune_kernels import native, native_build
from llmprune_kernels import reference as exact
from tests.llmprune_kernels import blocks
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


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_go_through_in_rounds_equal_float64_and_two_calls(dtype):
    """A round of one thread is 48 rows where a row has 8,192 numbers in between, 256 with AMX."""
    gate, up = (blocks.weight("random", dtype, (128, 16), (64, 2)) for _ in range(2))
    down = blocks.weight("random", dtype, (16, 128), (2, 64))
    for num_rows in (48, 49, 96, 103, 155, 257):
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
            # other rows each time: what an earlier call left in memory is not what is wanted
            rows, results = torch.randn(4, num_rows, 64).to(dtype), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append([native.gated_mlp(x, *layers) for x in rows])
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
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
