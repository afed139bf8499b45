"""y = x W^T + bias for few tokens: the decode kernel, bound by the bytes of the stored blocks.

Work is cut in two ways, so that there are several programs for every processor of the GPU. A
program takes ROWS of a block's rows, which costs another read of x from L2 and nothing else. And a
block row may be split into items of `split` blocks: each item writes float32 partial sums and a
second kernel adds them in a fixed order. The same bits every time, no atomics; a row of one item is
written at once, in one launch.

The weight tile is the left operand: its rows are the tensor core's 16 or 64 rows, and the tokens
are its 8 to 64 columns. A tile of `block_m` 1 multiplies without tensor cores, for one token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune_kernels import operands, tiles
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.matmul import is_ragged
from llmprune_kernels.tiles import Tile
from llmprune_kernels.walk import (
    lane_blocks,
    lane_offsets,
    load_places,
    multiply,
    row_blocks,
    row_tile_offsets,
)

MAX_TOKENS = tiles.MAX_DECODE_TOKENS
# The reduction holds all partial sums of a row's feature at once.
MAX_ITEMS = 64


@triton.jit
def item_product(
    x_ptr,
    values_ptr,
    col_ptr,
    first,
    count,
    part,
    num_tokens,
    x_stride,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part `part` of `count` blocks from block `first` on times the tokens: float32, (ROWS, MP)."""
    tokens = tl.arange(0, MP)
    is_token = (tokens < num_tokens)[:, None]
    x_rows = x_ptr + tl.cast(tokens, tl.int64)[:, None] * x_stride
    item_values = values_ptr + tl.cast(first, tl.int64) * (BN * BK) + part * (ROWS * BK)
    item_col = col_ptr + first
    columns = load_places(item_col, 0, STEP, BK)
    acc = tl.zeros((ROWS, STEP if MP == 1 else MP), dtype=tl.float32)
    # A loop without a dot has its depth from here. With one, the depth named here would make the
    # loads of columns copies that are waited for, and everything that was fetched ahead with them.
    for step in tl.range(0, tl.cdiv(count * BK, STEP), num_stages=STAGES if MP == 1 else None):
        x_at = x_rows + lane_offsets(columns, step, STEP, BK)[None, :]
        w_at = item_values + row_tile_offsets(step, STEP, ROWS, BN, BK)
        if RAGGED:
            stored = (lane_blocks(step, STEP, BK) < count)[None, :]
            x = tl.load(x_at, mask=is_token & stored, other=0.0)
            w = tl.load(w_at, mask=stored, other=0.0)
        else:
            x = tl.load(x_at, mask=is_token, other=0.0)
            w = tl.load(w_at)
        columns = load_places(item_col, step + 1, STEP, BK)
        if MP == 1:
            acc += w.to(tl.float32) * x.to(tl.float32)
        else:
            acc = multiply(w, tl.trans(x), acc, UPCAST, PRECISION)
    if MP == 1:
        acc = tl.sum(acc, axis=1, keep_dims=True)
    return acc


@triton.jit(do_not_specialize=["split", "per_row"])
def item_kernel(
    x_ptr,
    values_ptr,
    row_ptr,
    col_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    block_rows,
    x_stride,
    split,
    per_row,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,
    PARTIAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of one item of a block row, to `out_ptr`: y, or (items, M, out_features)."""
    row = tl.program_id(0) // (BN // ROWS)
    part = tl.program_id(0) % (BN // ROWS)
    item = tl.program_id(1)
    begin = item * split
    row_first, row_count = row_blocks(row_ptr, row, per_row, EVEN)
    if (item > 0) & (begin >= row_count):
        return
    acc = item_product(
        x_ptr, values_ptr, col_ptr, row_first + begin, tl.minimum(row_count - begin, split),
        part, num_tokens, x_stride, MP, ROWS, BN, BK, STEP, STAGES, RAGGED, UPCAST, PRECISION,
    )  # fmt: skip
    features = row * BN + part * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS and not PARTIAL:
        acc += tl.load(bias_ptr + features).to(tl.float32)[:, None]
    tokens = tl.arange(0, MP)
    out_rows = tl.cast(item * num_tokens + tokens, tl.int64)[None, :] * (block_rows * BN)
    mask = (tokens < num_tokens)[None, :]
    tl.store(out_ptr + out_rows + features[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def item_sum(
    partial_ptr,
    row_ptr,
    row,
    token,
    num_tokens,
    block_rows,
    split,
    BN: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """One token's features of a block row, summed over the row's items: float32, (BN,)."""
    count = tl.load(row_ptr + row + 1) - tl.load(row_ptr + row)
    items = tl.arange(0, ITEMS)
    # a row without blocks still has its first item, of zeros
    written = (items == 0) | (items * split < count)
    rows = tl.cast(items * num_tokens + token, tl.int64)[:, None] * (block_rows * BN)
    features = (row * BN + tl.arange(0, BN))[None, :]
    return tl.sum(tl.load(partial_ptr + rows + features, mask=written[:, None], other=0.0), axis=0)


@triton.jit(do_not_specialize=["split"])
def reduce_kernel(
    partial_ptr,
    row_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    block_rows,
    split,
    BN: tl.constexpr,
    ITEMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The sum of a row's items for one token, and the bias."""
    row = tl.program_id(0)
    token = tl.program_id(1)
    total = item_sum(partial_ptr, row_ptr, row, token, num_tokens, block_rows, split, BN, ITEMS)
    features = row * BN + tl.arange(0, BN)
    if HAS_BIAS:
        total += tl.load(bias_ptr + features).to(tl.float32)
    y_row = y_ptr + tl.cast(token, tl.int64) * (block_rows * BN)
    tl.store(y_row + features, total.to(y_ptr.dtype.element_ty))


def linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    *,
    config: Tile | None = None,
) -> Tensor:
    """y = x W^T + bias for at most `MAX_TOKENS` tokens; bitwise the same every time.

    Args:
        x: Shape (M, in_features), any row stride.
        values: Shape (num_blocks, rows, columns), contiguous, the dtype of `x`.
        index: Which blocks.
        bias: Shape (out_features,).
        config: The tile; from the tables by default.

    Returns:
        Shape (M, out_features), contiguous, the dtype of `x`.

    Raises:
        ValueError: An operand is not what the kernel assumes, or there are too many tokens.
    """
    block = operands.check_values(values, index)
    x = operands.token_rows(x, index.block_columns * block[1], values)
    num_tokens, out_features = x.shape[0], index.block_rows * block[0]
    operands.check_bias(bias, out_features, values)
    y = x.new_empty(num_tokens, out_features)
    if y.numel() == 0:
        return y
    tile = config or tiles.choose_for("decode", values, index, num_tokens)
    check_tokens(tile, num_tokens)
    split, items = split_rows(tile, block, index.max_per_row)
    out = y if items == 1 else x.new_empty(items, num_tokens, out_features, dtype=torch.float32)
    shared = {"HAS_BIAS": bias is not None, "BN": block[0]}
    given_bias = x if bias is None else bias
    with torch.cuda.device_of(x):
        item_kernel[(out_features // rows_of(tile, block), items)](
            x, values, index.row_ptr, index.col, given_bias, out,
            num_tokens, index.block_rows, x.stride(0), split, index.max_per_row,
            **shared, **constants(tile, block, x.dtype), PARTIAL=items > 1,
            EVEN=index.is_balanced, RAGGED=is_ragged(tile, block, index), **tile.options(),
        )  # fmt: skip
    if items > 1:
        with torch.cuda.device_of(x):
            reduce_kernel[(index.block_rows, num_tokens)](
                out, index.row_ptr, given_bias, y, num_tokens, index.block_rows, split,
                **shared, ITEMS=triton.next_power_of_2(items), num_warps=4,
            )  # fmt: skip
    return y


def check_tokens(tile: Tile, num_tokens: int) -> None:
    """Refuse more tokens than the kernel or its tile holds.

    Raises:
        ValueError: There are.
    """
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"decode takes at most {MAX_TOKENS} tokens, got {num_tokens}: use matmul")
    if num_tokens > tile.block_m:
        raise ValueError(
            f"decode's tile must hold every token, got block_m {tile.block_m} for {num_tokens}"
        )


def rows_of(tile: Tile, block: tuple[int, int]) -> int:
    """Rows of a block that one program computes."""
    return min(tile.rows or block[0], block[0])


def split_rows(tile: Tile, block: tuple[int, int], max_per_row: int) -> tuple[int, int]:
    """(blocks in an item, items in the fullest row); whole steps, at most `MAX_ITEMS` items."""
    per_step = max(1, tile.step // block[1])
    items = min(max(1, tile.items), MAX_ITEMS)
    split = triton.cdiv(max(1, triton.cdiv(max_per_row, items)), per_step) * per_step
    return split, max(1, triton.cdiv(max_per_row, split))


def constants(tile: Tile, block: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """The item kernel's compile-time numbers that its tile and dtype alone decide."""
    operands.check_step(tile.step, block[1])
    return {
        "MP": tile.block_m,
        "ROWS": rows_of(tile, block),
        "BK": block[1],
        "STEP": tile.step,
        "STAGES": tile.num_stages,
        "UPCAST": operands.needs_upcast(dtype),
        "PRECISION": operands.dot_precision(dtype),
    }
