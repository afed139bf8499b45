"""The dense weight of stored blocks, written for a dense matmul to read: the safety net.

For a density above what the prefill kernel wins at, writing the weight out and multiplying densely
costs about a tenth more than a dense layer does when there are thousands of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune_kernels import operands
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.tiles import Tile

# a copy has no dot to shape; four warps move 16 bytes for every thread and turn
COPY_TILE = Tile(block_m=1, num_warps=4, num_stages=1)


@triton.jit
def densify_kernel(
    values_ptr,
    row_index_ptr,
    col_ptr,
    dense_ptr,
    in_features,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Copy one block to its place."""
    number = tl.cast(tl.program_id(0), tl.int64)
    row = tl.load(row_index_ptr + number)
    column = tl.load(col_ptr + number)
    lines = tl.arange(0, BN)[:, None]
    inside = tl.arange(0, BK)[None, :]
    block = tl.load(values_ptr + number * (BN * BK) + lines * BK + inside)
    start = dense_ptr + tl.cast(row, tl.int64) * BN * in_features + column * BK
    tl.store(start + tl.cast(lines, tl.int64) * in_features + inside, block)


def densify(values: Tensor, index: BlockIndex, *, config: Tile | None = None) -> Tensor:
    """The dense weight, zeros where no block is stored.

    Args:
        values: Shape (num_blocks, rows, columns), contiguous.
        index: Which blocks.
        config: Only its warps count.

    Returns:
        Shape (out_features, in_features), contiguous, the dtype of `values`.

    Raises:
        ValueError: An operand is not what the kernel assumes.
    """
    block = operands.check_values(values, index)
    in_features = index.block_columns * block[1]
    dense = values.new_zeros(index.block_rows * block[0], in_features)
    if index.num_blocks == 0:
        return dense
    tile = config or COPY_TILE
    with torch.cuda.device_of(values):
        densify_kernel[(index.num_blocks,)](
            values, index.row, index.col, dense, in_features,
            BN=block[0], BK=block[1], num_warps=tile.num_warps,
        )  # fmt: skip
    return dense
