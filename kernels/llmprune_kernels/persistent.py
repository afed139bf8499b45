"""The bulk-copy product by programs that stay: each computes one tile after another.

A program that ends drains its pipeline, writes its sums and leaves its place to one that begins by
waiting for its first boxes: with 1,024 inner elements a quarter of the time. Here the steps of all
tiles of a program are one loop, in which the boxes of the next tile are under way while the sums
of the last are written. Rows must be equally full, so that the loop knows where a tile ends. A
gate is not read: with one, the sums pass through as much shared memory again as the buffers take.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmprune_kernels.walk import add_product, program_tile, write_tile, zero_sums


@triton.jit(do_not_specialize=["per_row"])
def persistent_kernel(
    x_tensor,
    values_tensor,
    col_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    block_rows,
    per_row,
    num_programs,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every `num_programs`-th (BM, BN) tile of y; x boxes are (BM, STEP), weight boxes (BN, STEP).

    `per_row`: blocks of every block row, at least one.
    """
    # steps of a block
    parts: tl.constexpr = BK // STEP
    token_tiles = tl.cdiv(num_tokens, BM)
    num_tiles = token_tiles * block_rows
    tile = tl.program_id(0)
    next_token_tile, next_row = program_tile(tile, token_tiles, block_rows, GROUP)
    first = next_row * per_row
    column = tl.load(col_ptr + first)
    step = 0
    acc = zero_sums(BM, BN, SWAP)
    for _ in range(0, tl.cdiv(num_tiles - tile, num_programs) * per_row * parts):
        token_tile = next_token_tile
        row = next_row
        within = step % parts * STEP
        x = x_tensor.load([token_tile * BM, column * BK + within])
        w = values_tensor.load([(first + step // parts) * BN, within])
        step += 1
        is_last = step == per_row * parts
        if is_last:
            step = 0
            # after the last tile its boxes are never fetched, but its first column is read
            tile = tl.minimum(tile + num_programs, num_tiles - 1)
            next_token_tile, next_row = program_tile(tile, token_tiles, block_rows, GROUP)
            first = next_row * per_row
        column = tl.load(col_ptr + first + step // parts)
        acc = add_product(x, w, acc, SWAP, UPCAST, PRECISION)
        if is_last:
            write_tile(
                acc, bias_ptr, bias_ptr, y_ptr, token_tile, row, num_tokens, block_rows,
                BM, BN, SWAP, HAS_BIAS, False,
            )  # fmt: skip
            acc = zero_sums(BM, BN, SWAP)
