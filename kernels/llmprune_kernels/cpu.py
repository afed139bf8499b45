"""Products with a weight stored in blocks, in plain PyTorch, for a CPU without the C++ library.

There is no best way: which is fastest hangs on the number of rows, the weight, the density, the
dtype, the block, the threads and the processor: `choose_way` reads it from measured tables
(tables/cpu-*.json, written by benchmarks/cpu.py). Shapes as in `reference`: x (M, in_features), dy
(M, out_features), values (num_blocks, rows, columns); float32, bfloat16, float16 and float64.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels import cpu_table
from llmprune_kernels.bsr import BlockIndex, gather_blocks, scatter_blocks
from llmprune_kernels.work import Work

Way = Literal["gather_bmm", "merged_runs", "row_loop", "densify"]
WAYS: tuple[Way, ...] = get_args(Way)


def linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    *,
    way: Way | None = None,
) -> Tensor:
    """y = x W^T + bias, shape (M, out_features), contiguous.

    Args:
        x: Shape (M, in_features), any strides.
        values: Shape (num_blocks, rows, columns), of x's dtype.
        index: Where the blocks are.
        bias: Shape (out_features,).
        way: `gather_bmm`: the part of x of every block, one batched product, sums by block row.
            `merged_runs`: a product for every run of neighbouring blocks, over x transposed.
            `row_loop`: a product for every block row. `densify`: the dense weight, made for this
            call. None: what `choose_way` says.

    Raises:
        ValueError: There is no such way.
    """
    if way is None:
        way = choose_way(Work.of(x, values, index))
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    if way == "densify":
        return functional.linear(x, scatter_blocks(values, index), bias)
    if index.num_blocks == 0:
        y = x.new_zeros(x.shape[0], index.block_rows * values.shape[1])
    elif way == "gather_bmm":
        y = _gather_bmm(
            x, values.transpose(1, 2), index.col[: index.num_blocks], index.row, index.block_rows
        )
    elif way == "merged_runs":
        y = _merged_runs(x, values, index)
    else:
        y = _row_loop(x, values, index)
    return y if bias is None else y.add_(bias)


def choose_way(work: Work) -> Way:
    """The fastest way of `linear` by the measured table; float64 is taken for float32."""
    return max(WAYS, key=lambda way: cpu_table.speedup(way, work))


def predicted_speedup(work: Work, *, native: bool) -> float:
    """How many times faster than the dense product `linear` is, by the measured table.

    Args:
        work: The product.
        native: Of `native.linear`, not of the best way here. Ways here include `densify`, which
            makes the dense weight on every call; who keeps it has 1.0 instead.
    """
    ways = ("native",) if native and work.dtype != torch.float64 else WAYS
    return max(cpu_table.speedup(way, work) for way in ways)


def grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W, shape (M, in_features)."""
    if index.num_blocks == 0:
        return dy.new_zeros(dy.shape[0], index.block_columns * values.shape[2])
    if not _gathers(dy.shape[0], index, (values.shape[1], values.shape[2])):
        return dy @ scatter_blocks(values, index)
    columns = index.col[: index.num_blocks]
    return _gather_bmm(dy, values, index.row, columns, index.block_columns)


def grad_values(dy: Tensor, x: Tensor, index: BlockIndex, block: tuple[int, int]) -> Tensor:
    """The stored blocks of dy^T x, shape (num_blocks, rows, columns), contiguous."""
    if not _gathers(dy.shape[0], index, block):
        return gather_blocks(dy.T @ x, index, block)
    left = _parts(dy, block[0])[index.row]
    right = _parts(x, block[1])[index.col[: index.num_blocks]]
    return torch.bmm(left.transpose(1, 2), right)


def _gathers(num_rows: int, index: BlockIndex, block: tuple[int, int]) -> bool:
    """Whether one product for every block beats the dense one, for gradients.

    Measured for blocks of 32 and 64 in float32 and bfloat16 (benchmarks/cpu.py): the copies that
    it makes grow with rows and density, and narrow blocks are slow products.
    """
    return num_rows * index.density <= min(block)


def _parts(x: Tensor, width: int) -> Tensor:
    """Columns of x in parts of `width`: shape (parts, M, width)."""
    return x.unflatten(1, (-1, width)).transpose(0, 1)


def _gather_bmm(x: Tensor, blocks: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
    """Sums over blocks of part `source` of x times the block, as part `target` of `size` parts."""
    products = torch.bmm(_parts(x, blocks.shape[1])[source], blocks)
    wide = _sum_dtype(x.dtype)
    sums = products.new_zeros(size, *products.shape[1:], dtype=wide)
    sums.index_add_(0, target, products.to(wide))
    return sums.to(x.dtype).transpose(0, 1).flatten(1)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over blocks are kept in: 16-bit ones would be rounded at every block."""
    return dtype if dtype == torch.float64 else torch.float32


def _side_by_side(blocks: Tensor) -> Tensor:
    """Blocks of one block row as one matrix, shape (rows, count * columns)."""
    return blocks[0] if len(blocks) == 1 else blocks.transpose(0, 1).flatten(1)


def _merged_runs(x: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    _, rows, columns = values.shape
    x_t = x.T.contiguous()
    y_t = x.new_zeros(index.block_rows * rows, x.shape[0], dtype=_sum_dtype(x.dtype))
    col = index.col.tolist()
    for row, (start, end) in enumerate(pairwise(index.row_ptr.tolist())):
        out = y_t[row * rows : (row + 1) * rows]
        for low, high in _runs(col, start, end):
            first = col[low] * columns
            part = x_t[first : first + (high - low) * columns]
            if y_t.dtype == x.dtype:
                out.addmm_(_side_by_side(values[low:high]), part)
            else:
                out.add_(_side_by_side(values[low:high]) @ part)
    return y_t.T.to(x.dtype).contiguous()


def _runs(col: list[int], start: int, end: int) -> list[tuple[int, int]]:
    """Stretches of blocks `start` to `end` whose columns are neighbours."""
    breaks = [at for at in range(start + 1, end) if col[at] != col[at - 1] + 1]
    bounds = [start, *breaks, end] if end > start else []
    return list(pairwise(bounds))


def _row_loop(x: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    _, rows, columns = values.shape
    y = x.new_zeros(x.shape[0], index.block_rows * rows)
    parts = x.unflatten(1, (-1, columns))
    for row, (start, end) in enumerate(pairwise(index.row_ptr.tolist())):
        if end > start:
            taken = parts.index_select(1, index.col[start:end]).flatten(1)
            y[:, row * rows : (row + 1) * rows] = taken @ _side_by_side(values[start:end]).T
    return y
