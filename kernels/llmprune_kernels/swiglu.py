"""silu(x Wg^T) * (x Wu^T) in one pass over x: the gated MLP's first half.

Three forms: for many tokens with one pattern for gate and up (every x tile feeds two dots), for
many tokens with two patterns (two walks, one epilogue), and for few tokens (the items of both
weights in one launch, then one reduction that also gates).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune_kernels import decode, matmul, operands, tiles
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.decode import item_product, item_sum
from llmprune_kernels.matmul import row_product
from llmprune_kernels.tiles import Tile
from llmprune_kernels.walk import (
    add_product,
    lane_blocks,
    lane_offsets,
    load_places,
    program_tile,
    row_blocks,
    row_tile_offsets,
    silu_times,
    upright,
    zero_sums,
)


@triton.jit
def tied_product(
    x_rows,
    is_token,
    gate_ptr,
    up_ptr,
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
    """x times one block row of both weights, which share a pattern: silu(gate) * up, (BM, BN)."""
    first = tl.load(row_ptr + row)
    count = tl.load(row_ptr + row + 1) - first
    row_start = tl.cast(first, tl.int64) * (BN * BK)
    row_col = col_ptr + first
    columns = load_places(row_col, 0, STEP, BK)
    gate_acc = zero_sums(BM, BN, SWAP)
    up_acc = zero_sums(BM, BN, SWAP)
    for step in range(0, tl.cdiv(count * BK, STEP)):
        x_at = x_rows + lane_offsets(columns, step, STEP, BK)[None, :]
        w_at = row_tile_offsets(step, STEP, BN, BN, BK)
        if RAGGED:
            stored = (lane_blocks(step, STEP, BK) < count)[None, :]
            x = tl.load(x_at, mask=is_token & stored, other=0.0)
            gate = tl.load(gate_ptr + row_start + w_at, mask=stored, other=0.0)
            up = tl.load(up_ptr + row_start + w_at, mask=stored, other=0.0)
        else:
            x = tl.load(x_at, mask=is_token, other=0.0)
            gate = tl.load(gate_ptr + row_start + w_at)
            up = tl.load(up_ptr + row_start + w_at)
        columns = load_places(row_col, step + 1, STEP, BK)
        gate_acc = add_product(x, gate, gate_acc, SWAP, UPCAST, PRECISION)
        up_acc = add_product(x, up, up_acc, SWAP, UPCAST, PRECISION)
    return upright(silu_times(gate_acc, up_acc), SWAP)


@triton.jit
def swiglu_kernel(
    x_ptr,
    gate_ptr,
    gate_row_ptr,
    gate_col_ptr,
    up_ptr,
    up_row_ptr,
    up_col_ptr,
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
    TIED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BM, BN) tile of the gated product."""
    num_tiles = tl.cdiv(num_tokens, BM)
    token_tile, row = program_tile(tl.program_id(0), num_tiles, block_rows, GROUP)
    tokens = token_tile * BM + tl.arange(0, BM)
    is_token = (tokens < num_tokens)[:, None]
    x_rows = x_ptr + tl.cast(tokens, tl.int64)[:, None] * x_stride
    if TIED:
        product = tied_product(
            x_rows, is_token, gate_ptr, up_ptr, gate_row_ptr, gate_col_ptr, row,
            BM, BN, BK, STEP, RAGGED, SWAP, UPCAST, PRECISION,
        )  # fmt: skip
    else:
        gate = row_product(
            x_rows, is_token, gate_ptr, gate_row_ptr, gate_col_ptr, row,
            BM, BN, BK, STEP, RAGGED, SWAP, UPCAST, PRECISION,
        )  # fmt: skip
        up = row_product(
            x_rows, is_token, up_ptr, up_row_ptr, up_col_ptr, row,
            BM, BN, BK, STEP, RAGGED, SWAP, UPCAST, PRECISION,
        )  # fmt: skip
        product = silu_times(gate, up)
    features = row * BN + tl.arange(0, BN)
    y_rows = y_ptr + tl.cast(tokens, tl.int64)[:, None] * (block_rows * BN)
    tl.store(y_rows + features[None, :], product.to(y_ptr.dtype.element_ty), mask=is_token)


@triton.jit(do_not_specialize=["split", "items", "gate_per_row", "up_per_row"])
def swiglu_item_kernel(
    x_ptr,
    gate_ptr,
    gate_row_ptr,
    gate_col_ptr,
    up_ptr,
    up_row_ptr,
    up_col_ptr,
    partial_ptr,
    num_tokens,
    block_rows,
    items,
    x_stride,
    split,
    gate_per_row,
    up_per_row,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of an item of gate (third program index 0) or up (1), to (2, items, M, N)."""
    row = tl.program_id(0) // (BN // ROWS)
    part = tl.program_id(0) % (BN // ROWS)
    item = tl.program_id(1)
    which = tl.program_id(2)
    begin = item * split
    per_row = tl.where(which == 0, gate_per_row, up_per_row)
    if which == 0:
        values_ptr = gate_ptr
        row_ptr = gate_row_ptr
        col_ptr = gate_col_ptr
    else:
        values_ptr = up_ptr
        row_ptr = up_row_ptr
        col_ptr = up_col_ptr
    row_first, row_count = row_blocks(row_ptr, row, per_row, EVEN)
    if (item > 0) & (begin >= row_count):
        return
    acc = item_product(
        x_ptr, values_ptr, col_ptr, row_first + begin, tl.minimum(row_count - begin, split),
        part, num_tokens, x_stride, MP, ROWS, BN, BK, STEP, STAGES, RAGGED, UPCAST, PRECISION,
    )  # fmt: skip
    tokens = tl.arange(0, MP)
    lines = tl.cast((which * items + item) * num_tokens + tokens, tl.int64)[None, :]
    features = (row * BN + part * ROWS + tl.arange(0, ROWS))[:, None]
    mask = (tokens < num_tokens)[None, :]
    tl.store(partial_ptr + lines * (block_rows * BN) + features, acc, mask=mask)


@triton.jit(do_not_specialize=["gate_per_row", "up_per_row"])
def swiglu_whole_kernel(
    x_ptr,
    gate_ptr,
    gate_row_ptr,
    gate_col_ptr,
    up_ptr,
    up_row_ptr,
    up_col_ptr,
    y_ptr,
    num_tokens,
    block_rows,
    x_stride,
    gate_per_row,
    up_per_row,
    MP: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A part of a whole block row of gate and of up, gated: rows that are not split."""
    row = tl.program_id(0) // (BN // ROWS)
    part = tl.program_id(0) % (BN // ROWS)
    first, count = row_blocks(gate_row_ptr, row, gate_per_row, EVEN)
    gate = item_product(
        x_ptr, gate_ptr, gate_col_ptr, first, count,
        part, num_tokens, x_stride, MP, ROWS, BN, BK, STEP, STAGES, RAGGED, UPCAST, PRECISION,
    )  # fmt: skip
    first, count = row_blocks(up_row_ptr, row, up_per_row, EVEN)
    up = item_product(
        x_ptr, up_ptr, up_col_ptr, first, count,
        part, num_tokens, x_stride, MP, ROWS, BN, BK, STEP, STAGES, RAGGED, UPCAST, PRECISION,
    )  # fmt: skip
    tokens = tl.arange(0, MP)
    lines = tl.cast(tokens, tl.int64)[None, :] * (block_rows * BN)
    features = (row * BN + part * ROWS + tl.arange(0, ROWS))[:, None]
    mask = (tokens < num_tokens)[None, :]
    product = silu_times(gate, up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + lines + features, product, mask=mask)


@triton.jit(do_not_specialize=["split", "items"])
def swiglu_reduce_kernel(
    partial_ptr,
    gate_row_ptr,
    up_row_ptr,
    y_ptr,
    num_tokens,
    block_rows,
    items,
    split,
    BN: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """The sums of a row's items of gate and up for one token, gated."""
    row = tl.program_id(0)
    token = tl.program_id(1)
    up_partial_ptr = partial_ptr + tl.cast(items * num_tokens, tl.int64) * (block_rows * BN)
    gate = item_sum(partial_ptr, gate_row_ptr, row, token, num_tokens, block_rows, split, BN, ITEMS)
    up = item_sum(up_partial_ptr, up_row_ptr, row, token, num_tokens, block_rows, split, BN, ITEMS)
    y_row = y_ptr + tl.cast(token, tl.int64) * (block_rows * BN) + row * BN
    tl.store(y_row + tl.arange(0, BN), silu_times(gate, up).to(y_ptr.dtype.element_ty))


def linear_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_index: BlockIndex,
    up: Tensor,
    up_index: BlockIndex,
    *,
    config: Tile | None = None,
) -> Tensor:
    """silu(x Wg^T) * (x Wu^T), gated in float32.

    Args:
        x: Shape (M, in_features), any row stride.
        gate: Shape (num_blocks, rows, columns), contiguous, the dtype of `x`.
        gate_index: Its blocks. The same object as `up_index` says that the pattern is shared.
        up: As `gate`, with the same block.
        up_index: Its blocks.
        config: The tile; from the tables by default. For at most `decode.MAX_TOKENS` tokens one of
            kind "decode", beyond that one of kind "swiglu".

    Returns:
        Shape (M, out_features), contiguous, the dtype of `x`.

    Raises:
        ValueError: An operand is not what the kernels assume.
    """
    block = _check_pair(gate, gate_index, up, up_index)
    x = operands.token_rows(x, gate_index.block_columns * block[1], gate)
    y = x.new_empty(x.shape[0], gate_index.block_rows * block[0])
    if y.numel() == 0:
        return y
    if x.shape[0] <= decode.MAX_TOKENS:
        tile = config or tiles.choose_for("decode", gate, gate_index, x.shape[0])
        return _few_tokens(x, gate, gate_index, up, up_index, y, tile)
    tile = config or tiles.choose_for("swiglu", gate, gate_index, x.shape[0])
    grid = (triton.cdiv(x.shape[0], tile.block_m) * gate_index.block_rows,)
    ragged = any(matmul.is_ragged(tile, block, index) for index in (gate_index, up_index))
    with torch.cuda.device_of(x):
        swiglu_kernel[grid](
            x, gate, gate_index.row_ptr, gate_index.col, up, up_index.row_ptr, up_index.col, y,
            x.shape[0], gate_index.block_rows, x.stride(0),
            **matmul.constants(tile, block, x.dtype, ragged=ragged),
            TIED=gate_index is up_index, **tile.options(),
        )  # fmt: skip
    return y


def _check_pair(
    gate: Tensor, gate_index: BlockIndex, up: Tensor, up_index: BlockIndex
) -> tuple[int, int]:
    block = operands.check_values(gate, gate_index, "gate")
    up_block = operands.check_values(up, up_index, "up")
    sizes = (gate_index.block_rows, gate_index.block_columns)
    up_sizes = (up_index.block_rows, up_index.block_columns)
    if (block, sizes, gate.dtype) != (up_block, up_sizes, up.dtype):
        raise ValueError(
            "gate and up must have one block, one number of block rows and columns and one dtype, "
            f"got {block} {sizes} {gate.dtype} and {up_block} {up_sizes} {up.dtype}"
        )
    return block


def _few_tokens(
    x: Tensor,
    gate: Tensor,
    gate_index: BlockIndex,
    up: Tensor,
    up_index: BlockIndex,
    y: Tensor,
    tile: Tile,
) -> Tensor:
    num_tokens, block = x.shape[0], (gate.shape[1], gate.shape[2])
    decode.check_tokens(tile, num_tokens)
    fullest = max(gate_index.max_per_row, up_index.max_per_row)
    split, items = decode.split_rows(tile, block, fullest)
    constants = decode.constants(tile, block, x.dtype)
    both = (gate_index, up_index)
    constants["EVEN"] = all(index.is_balanced for index in both)
    constants["RAGGED"] = any(matmul.is_ragged(tile, block, index) for index in both)
    per_row = [index.max_per_row for index in both]
    parts = y.shape[1] // constants["ROWS"]
    if items == 1:
        with torch.cuda.device_of(x):
            swiglu_whole_kernel[(parts,)](
                x, gate, gate_index.row_ptr, gate_index.col,
                up, up_index.row_ptr, up_index.col, y,
                num_tokens, gate_index.block_rows, x.stride(0), *per_row,
                BN=block[0], **constants, **tile.options(),
            )  # fmt: skip
        return y
    partial = x.new_empty(2, items, num_tokens, y.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        swiglu_item_kernel[(parts, items, 2)](
            x, gate, gate_index.row_ptr, gate_index.col,
            up, up_index.row_ptr, up_index.col, partial,
            num_tokens, gate_index.block_rows, items, x.stride(0), split, *per_row,
            BN=block[0], **constants, **tile.options(),
        )  # fmt: skip
    with torch.cuda.device_of(x):
        swiglu_reduce_kernel[(gate_index.block_rows, num_tokens)](
            partial, gate_index.row_ptr, up_index.row_ptr, y,
            num_tokens, gate_index.block_rows, items, split,
            BN=block[0], ITEMS=triton.next_power_of_2(items), num_warps=4,
        )  # fmt: skip
    return y
