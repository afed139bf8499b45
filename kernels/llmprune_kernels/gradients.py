"""The two gradients of y = x W^T: dx = dy W, and dW at the stored blocks only.

dx walks a block column through the transposed index, so no value is copied or transposed in
memory. dW multiplies dy^T by x for the blocks of one row that lie side by side in `values`, so
that one dy tile serves several blocks.
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
    lane_blocks,
    lane_offsets,
    lanes_inside,
    load_places,
    multiply,
    program_tile,
)


@triton.jit
def grad_input_kernel(
    dy_ptr,
    values_ptr,
    t_ptr,
    t_row_ptr,
    t_idx_ptr,
    dx_ptr,
    num_tokens,
    block_columns,
    dy_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BM, BK) tile of dx; both indices of the next step are carried, as in the prefill."""
    num_tiles = tl.cdiv(num_tokens, BM)
    token_tile, column = program_tile(tl.program_id(0), num_tiles, block_columns, GROUP)
    tokens = token_tile * BM + tl.arange(0, BM)
    is_token = (tokens < num_tokens)[:, None]
    dy_rows = dy_ptr + tl.cast(tokens, tl.int64)[:, None] * dy_stride
    first = tl.load(t_ptr + column)
    count = tl.load(t_ptr + column + 1) - first
    inside = tl.arange(0, BK)[None, :]
    rows = load_places(t_row_ptr + first, 0, STEP, BN)
    places = load_places(t_idx_ptr + first, 0, STEP, BN)
    acc = tl.zeros((BM, BK), dtype=tl.float32)
    for step in range(0, tl.cdiv(count * BN, STEP)):
        dy_at = dy_rows + lane_offsets(rows, step, STEP, BN)[None, :]
        # a line is one of a block's rows: BK numbers that lie together
        lines = tl.cast(places, tl.int64) * BN + lanes_inside(step, STEP, BN)
        w_at = values_ptr + lines[:, None] * BK + inside
        if RAGGED:
            stored = lane_blocks(step, STEP, BN) < count
            dy = tl.load(dy_at, mask=is_token & stored[None, :], other=0.0)
            w = tl.load(w_at, mask=stored[:, None], other=0.0)
        else:
            dy = tl.load(dy_at, mask=is_token, other=0.0)
            w = tl.load(w_at)
        rows = load_places(t_row_ptr + first, step + 1, STEP, BN)
        places = load_places(t_idx_ptr + first, step + 1, STEP, BN)
        acc = multiply(dy, w, acc, UPCAST, PRECISION)
    features = column * BK + tl.arange(0, BK)
    dx_rows = dx_ptr + tl.cast(tokens, tl.int64)[:, None] * (block_columns * BK)
    tl.store(dx_rows + features[None, :], acc.to(dx_ptr.dtype.element_ty), mask=is_token)


@triton.jit
def grad_values_kernel(
    dy_ptr,
    x_ptr,
    row_ptr,
    col_ptr,
    grad_ptr,
    num_tokens,
    dy_stride,
    x_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of WIDTH / BK blocks of one block row, side by side, as (WIDTH, BN).

    WIDTH comes first because a tensor core's tile has 64 rows, which a block may not have.
    """
    row = tl.program_id(0)
    first = tl.load(row_ptr + row) + tl.program_id(1) * (WIDTH // BK)
    count = tl.load(row_ptr + row + 1) - first
    if count <= 0:
        return
    lane = tl.arange(0, WIDTH)
    stored = lane // BK < count
    columns = tl.load(col_ptr + first + lane // BK, mask=stored, other=0)
    x_at = x_ptr + lane_offsets(columns, 0, WIDTH, BK)[None, :]
    dy_at = dy_ptr + (row * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros((WIDTH, BN), dtype=tl.float32)
    for begin in range(0, num_tokens, BM):
        tokens = begin + tl.arange(0, BM)
        is_token = (tokens < num_tokens)[:, None]
        far = tl.cast(tokens, tl.int64)[:, None]
        x = tl.load(x_at + far * x_stride, mask=is_token & stored[None, :], other=0.0)
        dy = tl.load(dy_at + far * dy_stride, mask=is_token, other=0.0)
        acc = multiply(tl.trans(x), dy, acc, UPCAST, PRECISION)
    start = grad_ptr + tl.cast(first, tl.int64) * (BN * BK)
    along = (lane // BK) * (BN * BK) + lane % BK
    at = start + along[:, None] + (tl.arange(0, BN) * BK)[None, :]
    tl.store(at, acc.to(grad_ptr.dtype.element_ty), mask=stored[:, None])


def grad_input(
    dy: Tensor, values: Tensor, index: BlockIndex, *, config: Tile | None = None
) -> Tensor:
    """dx = dy W.

    Args:
        dy: Shape (M, out_features), any row stride.
        values: Shape (num_blocks, rows, columns), contiguous, the dtype of `dy`.
        index: Which blocks.
        config: The tile; from the tables by default.

    Returns:
        Shape (M, in_features), contiguous, the dtype of `dy`.

    Raises:
        ValueError: An operand is not what the kernel assumes.
    """
    block = operands.check_values(values, index)
    dy = operands.token_rows(dy, index.block_rows * block[0], values, "dy")
    dx = dy.new_empty(dy.shape[0], index.block_columns * block[1])
    if dx.numel() == 0:
        return dx
    tile = config or tiles.choose_for("grad_input", values, index, dy.shape[0])
    grid = (triton.cdiv(dy.shape[0], tile.block_m) * index.block_columns,)
    with torch.cuda.device_of(dy):
        grad_input_kernel[grid](
            dy, values, index.t_ptr, index.t_row, index.t_idx, dx,
            dy.shape[0], index.block_columns, dy.stride(0),
            **input_constants(tile, block, dy.dtype), **tile.options(),
        )  # fmt: skip
    return dx


def grad_values(
    dy: Tensor,
    x: Tensor,
    index: BlockIndex,
    block: tuple[int, int],
    *,
    config: Tile | None = None,
) -> Tensor:
    """The stored blocks of dy^T x, each summed over all tokens in float32 by one program.

    Args:
        dy: Shape (M, out_features), any row stride.
        x: Shape (M, in_features), any row stride, the dtype of `dy`.
        index: Which blocks.
        block: Their (rows, columns).
        config: The tile; from the tables by default.

    Returns:
        Shape (num_blocks, rows, columns), contiguous, the dtype of `dy`.

    Raises:
        ValueError: An operand is not what the kernel assumes.
    """
    grad = dy.new_empty(index.num_blocks, *block)
    operands.check_values(grad, index, "the gradient")
    dy = operands.token_rows(dy, index.block_rows * block[0], grad, "dy")
    x = operands.token_rows(x, index.block_columns * block[1], grad)
    if x.shape[0] != dy.shape[0]:
        raise ValueError(f"dy and x must have as many rows, got {dy.shape[0]} and {x.shape[0]}")
    if grad.numel() == 0:
        return grad
    tile = config or tiles.choose_for("grad_values", grad, index, x.shape[0])
    constants = values_constants(tile, block, dy.dtype)
    grid = (index.block_rows, triton.cdiv(index.max_per_row * block[1], constants["WIDTH"]))
    with torch.cuda.device_of(dy):
        grad_values_kernel[grid](
            dy, x, index.row_ptr, index.col, grad, x.shape[0], dy.stride(0), x.stride(0),
            **constants, **tile.options(),
        )  # fmt: skip
    return grad


def input_constants(tile: Tile, block: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time numbers of dx's kernel."""
    operands.check_step(tile.step, block[0])
    return {
        "BM": tile.block_m,
        "BN": block[0],
        "BK": block[1],
        "STEP": tile.step,
        "GROUP": tile.group,
        # columns are seldom equally full, so the index is not asked
        "RAGGED": tile.step > block[0],
        "UPCAST": operands.needs_upcast(dtype),
        "PRECISION": operands.dot_precision(dtype),
    }


def values_constants(tile: Tile, block: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time numbers of dW's kernel."""
    return {
        "BM": tile.block_m,
        "BN": block[0],
        "BK": block[1],
        "WIDTH": max(tile.step, block[1]),
        "UPCAST": operands.needs_upcast(dtype),
        "PRECISION": operands.dot_precision(dtype),
    }
