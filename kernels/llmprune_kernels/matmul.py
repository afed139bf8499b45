"""y = x W^T + bias for many tokens: the prefill kernel.

One program computes a (BM, block rows) tile of y. Blocks narrower than STEP are merged, so every
dot has inner size STEP whatever the block's columns are. The column index of the next step is
loaded one step ahead and carried through the loop: a load at an index loaded in the same iteration
would make Triton share its pipeline stages between the two loads, and lose most of the depth.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune_kernels import operands, tiles
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.tiles import Tile
from llmprune_kernels.walk import (
    add_product,
    lane_blocks,
    lane_offsets,
    load_places,
    program_tile,
    row_tile_offsets,
    upright,
    zero_sums,
)


@triton.jit
def row_product(
    x_rows,
    is_token,
    values_ptr,
    row_ptr,
    col_ptr,
    row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    RAGGED: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x times one block row, transposed: float32, (BM, BN). RAGGED: the row may end in a step."""
    first = tl.load(row_ptr + row)
    count = tl.load(row_ptr + row + 1) - first
    row_values = values_ptr + tl.cast(first, tl.int64) * (BN * BK)
    row_col = col_ptr + first
    columns = load_places(row_col, 0, STEP, BK)
    acc = zero_sums(BM, BN, SWAP)
    for step in range(0, tl.cdiv(count * BK, STEP)):
        x_at = x_rows + lane_offsets(columns, step, STEP, BK)[None, :]
        w_at = row_values + row_tile_offsets(step, STEP, BN, BN, BK)
        if RAGGED:
            stored = (lane_blocks(step, STEP, BK) < count)[None, :]
            x = tl.load(x_at, mask=is_token & stored, other=0.0)
            w = tl.load(w_at, mask=stored, other=0.0)
        else:
            x = tl.load(x_at, mask=is_token, other=0.0)
            w = tl.load(w_at)
        columns = load_places(row_col, step + 1, STEP, BK)
        acc = add_product(x, w, acc, SWAP, UPCAST, PRECISION)
    return upright(acc, SWAP)


@triton.jit
def linear_kernel(
    x_ptr,
    values_ptr,
    row_ptr,
    col_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    block_rows,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BM, BN) tile of y."""
    num_tiles = tl.cdiv(num_tokens, BM)
    token_tile, row = program_tile(tl.program_id(0), num_tiles, block_rows, GROUP)
    tokens = token_tile * BM + tl.arange(0, BM)
    is_token = (tokens < num_tokens)[:, None]
    x_rows = x_ptr + tl.cast(tokens, tl.int64)[:, None] * x_stride
    acc = row_product(
        x_rows, is_token, values_ptr, row_ptr, col_ptr, row,
        BM, BN, BK, STEP, RAGGED, SWAP, UPCAST, PRECISION,
    )  # fmt: skip
    features = row * BN + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    y_rows = y_ptr + tl.cast(tokens, tl.int64)[:, None] * (block_rows * BN)
    tl.store(y_rows + features[None, :], acc.to(y_ptr.dtype.element_ty), mask=is_token)


def linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    *,
    config: Tile | None = None,
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: Shape (M, in_features), any row stride.
        values: Shape (num_blocks, rows, columns), contiguous, the dtype of `x`.
        index: Which blocks.
        bias: Shape (out_features,).
        config: The tile; from the tables by default.

    Returns:
        Shape (M, out_features), contiguous, the dtype of `x`.

    Raises:
        ValueError: An operand is not what the kernel assumes.
    """
    block = operands.check_values(values, index)
    x = operands.token_rows(x, index.block_columns * block[1], values)
    out_features = index.block_rows * block[0]
    operands.check_bias(bias, out_features, values)
    y = x.new_empty(x.shape[0], out_features)
    if y.numel() == 0:
        return y
    tile = config or tiles.choose_for("matmul", values, index, x.shape[0])
    grid = (triton.cdiv(x.shape[0], tile.block_m) * index.block_rows,)
    with torch.cuda.device_of(x):
        linear_kernel[grid](
            x,
            values,
            index.row_ptr,
            index.col,
            x if bias is None else bias,
            y,
            x.shape[0],
            index.block_rows,
            x.stride(0),
            **constants(tile, block, x.dtype, ragged=is_ragged(tile, block, index)),
            HAS_BIAS=bias is not None,
            **tile.options(),
        )
    return y


def constants(
    tile: Tile, block: tuple[int, int], dtype: torch.dtype, *, ragged: bool
) -> dict[str, Any]:
    """The kernel's compile-time numbers of a tile, all but HAS_BIAS."""
    operands.check_step(tile.step, block[1])
    return {
        "BM": tile.block_m,
        "BN": block[0],
        "BK": block[1],
        "STEP": tile.step,
        "GROUP": tile.group,
        "RAGGED": ragged,
        "SWAP": tile.swap,
        "UPCAST": operands.needs_upcast(dtype),
        "PRECISION": operands.dot_precision(dtype),
    }


def is_ragged(tile: Tile, block: tuple[int, int], index: BlockIndex) -> bool:
    """Whether a row may end inside a step, as far as is known without reading the GPU."""
    if tile.step <= block[1]:
        return False
    return not (index.is_balanced and index.max_per_row % (tile.step // block[1]) == 0)
