import itertools

import pytest
import torch

from llmprune_kernels import cpu, reference
from llmprune_kernels.bsr import gather_blocks
from llmprune_kernels.work import Work
from tests.llmprune_kernels import blocks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("way", cpu.WAYS)
@pytest.mark.parametrize("block", [(16, 16), (64, 32), (16, 128), (128, 16)])
def test_every_way_equals_float64(way, block):
    for pattern, dtype, num_rows in itertools.product(blocks.PATTERNS, DTYPES, (1, 7, 17)):
        values, index = blocks.weight(pattern, dtype, block)
        x = torch.randn(num_rows, 4 * block[1]).to(dtype)
        y = cpu.linear(x, values, index, way=way)
        assert y.dtype == dtype
        assert y.is_contiguous()
        error = reference.relative_error(y, reference.exact(x, values, index))
        assert error <= blocks.TOLERANCE[dtype], (pattern, dtype, num_rows)


@pytest.mark.parametrize("way", cpu.WAYS)
def test_every_way_takes_bias_and_strided_rows(way):
    for pattern, dtype in itertools.product(blocks.PATTERNS, DTYPES):
        values, index = blocks.weight(pattern, dtype, (32, 16))
        bias = torch.randn(96).to(dtype)
        wide = torch.randn(5, 64).to(dtype)
        wanted = reference.exact(wide, values, index, bias)
        for x in (blocks.surrounded(wide), wide.T.contiguous().T):
            before = bias.clone()
            error = reference.relative_error(cpu.linear(x, values, index, bias, way=way), wanted)
            assert error <= blocks.TOLERANCE[dtype]
            assert torch.equal(bias, before)


@pytest.mark.parametrize("way", cpu.WAYS)
def test_sixteen_bit_sums_are_not_rounded_at_every_block(way):
    # 1 + 64 * 2^-9 is 1.125; rounded to bfloat16 (steps of 2^-7) after every block it stays 1.
    index = blocks.weight("full", torch.bfloat16, (16, 16), (1, 65))[1]
    values = torch.full((65, 16, 16), 2.0**-9 / 16, dtype=torch.bfloat16)
    values[0] = 1 / 16
    x = torch.ones(2, 65 * 16, dtype=torch.bfloat16)
    assert cpu.linear(x, values, index, way=way).float().sub(1.125).abs().max() <= 2**-7


@pytest.mark.parametrize("num_rows", [1, 17, 300])
@pytest.mark.parametrize("block", [(16, 16), (64, 32)])
def test_gradients_equal_float64(num_rows, block):
    for pattern, dtype in itertools.product(blocks.PATTERNS, DTYPES):
        values, index = blocks.weight(pattern, dtype, block)
        x = torch.randn(num_rows, 4 * block[1]).to(dtype)
        dy = torch.randn(num_rows, 3 * block[0]).to(dtype)
        dx = cpu.grad_input(dy, values, index)
        wanted = reference.grad_input(dy.double(), values.double(), index)
        assert dx.dtype == dtype
        assert reference.relative_error(dx, wanted) <= blocks.TOLERANCE[dtype]
        dw = cpu.grad_values(dy, x, index, block)
        assert dw.shape == values.shape
        assert dw.is_contiguous()
        if index.num_blocks:
            wanted = gather_blocks(dy.double().T @ x.double(), index, block)
            assert reference.relative_error(dw, wanted) <= blocks.TOLERANCE[dtype]


@pytest.mark.parametrize("way", [*cpu.WAYS, None])
def test_no_rows_give_no_rows(way):
    values, index = blocks.weight("random", torch.float32, (16, 16))
    x, dy = torch.empty(0, 64), torch.empty(0, 48)
    assert cpu.linear(x, values, index, way=way).shape == (0, 48)
    assert cpu.grad_input(dy, values, index).shape == (0, 64)
    assert not cpu.grad_values(dy, x, index, (16, 16)).any()


def test_both_roads_of_the_gradients_are_taken():
    index = blocks.weight("full", torch.float32, (16, 16))[1]
    assert cpu._gathers(16, index, (16, 16))
    assert not cpu._gathers(17, index, (16, 16))


def test_an_unknown_way_is_refused():
    values, index = blocks.weight("full", torch.float32, (16, 16))
    with pytest.raises(ValueError, match=r"way must be one of gather_bmm, .* got 'fast'"):
        cpu.linear(torch.randn(1, 64), values, index, way="fast")


def test_without_a_way_the_result_is_that_of_the_chosen_one():
    values, index = blocks.weight("random", torch.float32, (16, 16))
    x = torch.randn(3, 64)
    way = cpu.choose_way(Work.of(x, values, index))
    assert torch.equal(cpu.linear(x, values, index), cpu.linear(x, values, index, way=way))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [False, True])
def test_the_shipped_table_says_that_fewer_blocks_are_faster(dtype, native):
    for num_rows in (1, 16, 512):
        quarter, half, all_blocks = (
            cpu.predicted_speedup(
                Work("cpu", dtype, num_rows, 2048, 2048, (64, 64), density), native=native
            )
            for density in (0.25, 0.5, 1.0)
        )
        assert quarter > half > 0.9 * all_blocks > 0


def test_float64_has_no_native_speedup():
    work = Work("cpu", torch.float64, 4, 64, 64, (32, 32), 0.5)
    with_native = cpu.predicted_speedup(work, native=True)
    assert with_native == cpu.predicted_speedup(work, native=False)
