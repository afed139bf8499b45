"""The prefill kernel with its column index loaded where it is used: the control of one comparison.

It differs from `matmul.linear_kernel` in the place of one load, and takes no bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune_kernels import matmul
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
def in_loop_kernel(
    x_ptr,
    values_ptr,
    row_ptr,
    col_ptr,
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
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BM, BN) tile of y."""
    num_tiles = tl.cdiv(num_tokens, BM)
    token_tile, row = program_tile(tl.program_id(0), num_tiles, block_rows, GROUP)
    tokens = token_tile * BM + tl.arange(0, BM)
    is_token = (tokens < num_tokens)[:, None]
    x_rows = x_ptr + tl.cast(tokens, tl.int64)[:, None] * x_stride
    first = tl.load(row_ptr + row)
    count = tl.load(row_ptr + row + 1) - first
    row_values = values_ptr + tl.cast(first, tl.int64) * (BN * BK)
    acc = zero_sums(BM, BN, SWAP)
    for step in range(0, tl.cdiv(count * BK, STEP)):
        columns = load_places(col_ptr + first, step, STEP, BK)
        x_at = x_rows + lane_offsets(columns, step, STEP, BK)[None, :]
        w_at = row_values + row_tile_offsets(step, STEP, BN, BN, BK)
        if RAGGED:
            stored = (lane_blocks(step, STEP, BK) < count)[None, :]
            x = tl.load(x_at, mask=is_token & stored, other=0.0)
            w = tl.load(w_at, mask=stored, other=0.0)
        else:
            x = tl.load(x_at, mask=is_token, other=0.0)
            w = tl.load(w_at)
        acc = add_product(x, w, acc, SWAP, UPCAST, PRECISION)
    acc = upright(acc, SWAP)
    features = row * BN + tl.arange(0, BN)
    y_rows = y_ptr + tl.cast(tokens, tl.int64)[:, None] * (block_rows * BN)
    tl.store(y_rows + features[None, :], acc.to(y_ptr.dtype.element_ty), mask=is_token)


def linear(x: Tensor, values: Tensor, index: BlockIndex, *, config: Tile) -> Tensor:
    """y = x W^T, contiguous operands only."""
    block = (values.shape[1], values.shape[2])
    y = torch.empty(x.shape[0], index.block_rows * block[0], dtype=x.dtype, device=x.device)
    ragged = matmul.is_ragged(config, block, index)
    grid = (triton.cdiv(x.shape[0], config.block_m) * index.block_rows,)
    in_loop_kernel[grid](
        x, values, index.row_ptr, index.col, y, x.shape[0], index.block_rows, x.stride(0),
        **matmul.constants(config, block, x.dtype, ragged=ragged), **config.options(),
    )  # fmt: skip
    return y
