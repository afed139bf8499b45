"""Products on tiles of the processor; skipped where it has none, or the compiler knows none."""

import itertools

import pytest
import torch
from torch.nn import functional

from llmprune_kernels import native, native_build, reference
from llmprune_kernels.bsr import BLOCK_SIDES, scatter_blocks
from tests.llmprune_kernels import blocks

# Under, at and over a group of 16 rows, a pair of groups, and a round of 256 rows.
ROWS = (1, 3, 15, 16, 17, 31, 32, 33, 48, 255, 256, 257, 289)


def _reason() -> str | None:
    if native_build.is_switched_off() or native_build.find_compiler() is None:
        return "no C++ compiler, or LLMPRUNE_KERNELS_NATIVE=0"
    if not native.uses_amx(torch.bfloat16):
        return f"no AMX here, or the compiler knows none: {native.instruction_set()}"
    return None


pytestmark = pytest.mark.skipif(_reason() is not None, reason=str(_reason()))


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is not written holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def problem(block, num_rows, pattern="random", grid=(3, 4)):
    values, index = blocks.weight(pattern, torch.bfloat16, block, grid)
    return torch.randn(num_rows, grid[1] * block[1]).bfloat16(), values, index


@pytest.mark.parametrize("block", itertools.product(BLOCK_SIDES, BLOCK_SIDES))
def test_every_block_shape_and_ragged_number_of_rows_equals_float64(block):
    for num_rows, pattern in zip(ROWS, itertools.cycle(blocks.PATTERNS)):
        x, values, index = problem(block, num_rows, pattern)
        bias = torch.randn(3 * block[0]).bfloat16()
        y = native.linear(blocks.surrounded(x), values, index, bias)
        error = reference.relative_error(y, reference.exact(x, values, index, bias))
        assert error <= blocks.TOLERANCE[torch.bfloat16], num_rows


@pytest.mark.parametrize("block", itertools.product(BLOCK_SIDES, BLOCK_SIDES))
def test_gradient_of_the_input_of_every_block_shape_equals_float64(block):
    for num_rows, pattern in zip(ROWS, itertools.cycle(blocks.PATTERNS)):
        _, values, index = problem(block, num_rows, pattern)
        dy = torch.randn(num_rows, 3 * block[0]).bfloat16()
        dx = native.grad_input(blocks.surrounded(dy), values, index)
        wanted = reference.grad_input(dy.double(), values.double(), index)
        assert reference.relative_error(dx, wanted) <= blocks.TOLERANCE[torch.bfloat16], num_rows


@pytest.mark.parametrize("block", [(16, 16), (32, 128), (64, 64), (128, 32)])
def test_swiglu_of_ragged_rows_equals_float64(block):
    for num_rows in ROWS:
        x, gate, gate_index = problem(block, num_rows, "unequal")
        _, up, up_index = problem(block, num_rows, "empty rows")
        y = native.linear_swiglu(x, gate, gate_index, up, up_index)
        wanted = reference.swiglu(x.double(), gate.double(), gate_index, up.double(), up_index)
        assert reference.relative_error(y, wanted) <= blocks.TOLERANCE[torch.bfloat16], num_rows


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it():
    x, values, index = problem((64, 32), 289)
    y = native.linear(x, values, index)
    for first, last in ((0, 1), (5, 21), (250, 289)):
        assert torch.equal(native.linear(x[first:last], values, index), y[first:last])


def test_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(native, "_MIN_THREADED_WORK", 0)
    x, values, index = problem((32, 64), 289, "unequal", (7, 6))
    dy = torch.randn(289, 7 * 32).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = native.linear(x, values, index)
            z = native.linear_swiglu(x, values, index, values, index)
            results.append((y, z, native.grad_input(dy, values, index)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("num_rows", [1, 40])
def test_blocks_that_change_in_place_are_seen(num_rows):
    """Nothing of a weight is kept from one call to the next."""
    x, values, index = problem((32, 32), num_rows)
    dy = torch.randn(num_rows, 96).bfloat16()
    y, dx = native.linear(x, values, index), native.grad_input(dy, values, index)
    values.mul_(2)
    assert torch.equal(native.linear(x, values, index), 2 * y)
    assert torch.equal(native.grad_input(dy, values, index), 2 * dx)
    # through the memory itself, which no version counter sees
    torch.from_numpy(values.view(torch.int16).numpy()).zero_()
    assert not native.linear(x, values, index).any()
    assert not native.grad_input(dy, values, index).any()


def test_it_leaves_tiles_as_it_found_them():
    """Dense products set up tiles of their own, in between."""
    x, values, index = problem((64, 16), 40)
    dense = scatter_blocks(values, index)
    wanted, other = native.linear(x, values, index), functional.linear(x, dense)
    for _ in range(3):
        assert torch.equal(functional.linear(x, dense), other)
        assert torch.equal(native.linear(x, values, index), wanted)
        x16, values16, index16 = problem((16, 16), 5)
        native.linear(x16, values16, index16)


def test_infinity_and_nan_stay_in_their_row():
    x, values, index = problem((16, 64), 40, "full")
    x[3] = float("inf")
    x[20] = float("nan")
    bad = ~native.linear(x, values, index).isfinite()
    assert bad[[3, 20]].all()
    assert int(bad.any(1).sum()) == 2


def test_sums_are_kept_in_float32():
    # 1 + 64 * 2^-9 is 1.125; rounded to bfloat16 (steps of 2^-7) after every block it stays 1.
    index = blocks.weight("full", torch.bfloat16, (16, 16), (1, 65))[1]
    values = torch.full((65, 16, 16), 2.0**-9 / 16, dtype=torch.bfloat16)
    values[0] = 1 / 16
    x = torch.ones(2, 65 * 16, dtype=torch.bfloat16)
    assert native.linear(x, values, index).float().sub(1.125).abs().max() <= 2**-7
