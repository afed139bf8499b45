"""y = x W^T + bias for many tokens on sm_90 and later: tiles fetched by the bulk copy engine.

The same walk as in `matmul`, with tensor descriptors instead of pointers: one instruction fetches
a whole tile, no thread computes addresses, and rows beyond the last token are filled with zeros.
A box cannot be gathered from several block columns, so a dot's inner size is the block's columns,
at most `step`. Where a step is twice that and rows are equally full, of an even number, blocks are
taken in pairs, two dots a turn of the loop.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from llmprune_kernels import operands, tiles
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.tiles import Tile
from llmprune_kernels.walk import (
    add_product,
    lane_blocks,
    load_places,
    program_tile,
    silu_times,
    upright,
    zero_sums,
)

# what the copy engine asks of a tensor's base and row stride
ALIGNMENT_BYTES = 16


@triton.jit
def tma_kernel(
    x_tensor,
    values_tensor,
    row_ptr,
    col_ptr,
    bias_ptr,
    gate_ptr,
    y_ptr,
    num_tokens,
    block_rows,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BM, BN) tile of y; x boxes are (BM, STEP), weight boxes (BN, STEP)."""
    num_tiles = tl.cdiv(num_tokens, BM)
    token_tile, row = program_tile(tl.program_id(0), num_tiles, block_rows, GROUP)
    first = tl.load(row_ptr + row)
    count = tl.load(row_ptr + row + 1) - first
    acc = zero_sums(BM, BN, SWAP)
    if PAIRS:
        column = tl.load(col_ptr + first)
        second = tl.load(col_ptr + first + 1)
        for pair in range(0, count // 2):
            block = first + 2 * pair
            x = x_tensor.load([token_tile * BM, column * BK])
            w = values_tensor.load([block * BN, 0])
            second_x = x_tensor.load([token_tile * BM, second * BK])
            second_w = values_tensor.load([(block + 1) * BN, 0])
            column = tl.load(col_ptr + block + 2)
            second = tl.load(col_ptr + block + 3)
            acc = add_product(x, w, acc, SWAP, UPCAST, PRECISION)
            acc = add_product(second_x, second_w, acc, SWAP, UPCAST, PRECISION)
    else:
        column = load_places(col_ptr + first, 0, STEP, BK)
        for step in range(0, count * (BK // STEP)):
            within = step % (BK // STEP) * STEP
            x = x_tensor.load([token_tile * BM, column * BK + within])
            w = values_tensor.load([(first + lane_blocks(step, STEP, BK)) * BN, within])
            column = load_places(col_ptr + first, step + 1, STEP, BK)
            acc = add_product(x, w, acc, SWAP, UPCAST, PRECISION)
    acc = upright(acc, SWAP)
    tokens = token_tile * BM + tl.arange(0, BM)
    features = row * BN + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    at = tl.cast(tokens, tl.int64)[:, None] * (block_rows * BN) + features[None, :]
    mask = (tokens < num_tokens)[:, None]
    if HAS_GATE:
        acc = silu_times(tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32), acc)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    config: Tile | None = None,
) -> Tensor:
    """y = x W^T + bias, as `matmul.linear`, on a GPU that has the bulk copy engine.

    Args:
        x: As for `matmul.linear`, like `values`, `index`, `bias` and `config`.
        values: The blocks.
        index: Which blocks.
        bias: Shape (out_features,).
        gate: The shape and dtype of y, contiguous; the result is silu(gate) * y, y in float32.
        config: The tile.

    Raises:
        ValueError: As `matmul.linear`; or the GPU is older than sm_90, a base or row stride is not
            a multiple of 16 bytes, the blocks hold 2^31 rows or more, or the gate is not like y.
    """
    block = operands.check_values(values, index)
    x = operands.token_rows(x, index.block_columns * block[1], values)
    out_features = index.block_rows * block[0]
    operands.check_bias(bias, out_features, values)
    y = x.new_empty(x.shape[0], out_features)
    if gate is not None:
        check_gate(gate, y)
    if y.numel() == 0:
        return y
    if index.num_blocks == 0:
        # a descriptor of nothing is not allowed
        y = y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        return y if gate is None else (functional.silu(gate.float()) * y).to(y.dtype)
    if reason := obstacle(x, values):
        raise ValueError(f"{reason}: use matmul")
    tile = config or tiles.choose_for("tma", values, index, x.shape[0])
    step = min(tile.step, block[1])
    x_tensor = TensorDescriptor.from_tensor(x, [tile.block_m, step])
    values_tensor = TensorDescriptor.from_tensor(values.flatten(0, 1), [block[0], step])
    grid = (triton.cdiv(x.shape[0], tile.block_m) * index.block_rows,)
    with torch.cuda.device_of(x):
        tma_kernel[grid](
            x_tensor, values_tensor, index.row_ptr, index.col,
            x if bias is None else bias, x if gate is None else gate, y,
            x.shape[0], index.block_rows,
            **constants(tile, block, x.dtype, paired=is_paired(tile, block, index)),
            HAS_BIAS=bias is not None, HAS_GATE=gate is not None, **tile.options(),
        )  # fmt: skip
    return y


def obstacle(x: Tensor, values: Tensor) -> str:
    """Why the copy engine can't address the operands, "" if it can.

    Args:
        x: Shape (M, in_features).
        values: Shape (num_blocks, rows, columns).
    """
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return f"tma needs a GPU of sm_90 or later, got {torch.cuda.get_device_name(x.device)}"
    for name, tensor in (("x", x), ("values", values)):
        if tensor.data_ptr() % ALIGNMENT_BYTES:
            return f"tma needs {name} to begin at a multiple of 16 bytes"
    # an x whose last stride is not 1 is copied, and then lies close
    stride = x.stride(0) if x.stride(1) == 1 else x.shape[1]
    if stride * x.element_size() % ALIGNMENT_BYTES or stride < 1:
        return (
            "tma needs x's row stride to be a positive multiple of 16 bytes, got "
            f"{stride} elements of {x.element_size()} bytes"
        )
    lines = values.shape[0] * values.shape[1]
    if lines >= 1 << 31:
        return f"tma counts block rows in 32 bits, got {lines}"
    return ""


def check_gate(gate: Tensor, y: Tensor) -> None:
    """Refuse a gate that the kernel can't read beside y.

    Raises:
        ValueError: Its shape, dtype, device or layout is not y's.
    """
    if (gate.shape, gate.dtype, gate.device) != (y.shape, y.dtype, y.device):
        raise ValueError(
            f"gate must be {y.dtype} of shape {tuple(y.shape)} on {y.device}, got {gate.dtype} of "
            f"shape {tuple(gate.shape)} on {gate.device}"
        )
    if not gate.is_contiguous():
        raise ValueError(f"gate must be contiguous, got strides {gate.stride()}")


def is_paired(tile: Tile, block: tuple[int, int], index: BlockIndex) -> bool:
    """Whether blocks are taken in pairs: narrow ones, and every row has an even number."""
    narrow = tile.step >= 2 * block[1]
    return narrow and index.is_balanced and index.max_per_row % 2 == 0


def constants(
    tile: Tile, block: tuple[int, int], dtype: torch.dtype, *, paired: bool
) -> dict[str, Any]:
    """The kernel's compile-time numbers of a tile, all but HAS_BIAS."""
    return {
        "BM": tile.block_m,
        "BN": block[0],
        "BK": block[1],
        "STEP": min(tile.step, block[1]),
        "PAIRS": paired,
        "GROUP": tile.group,
        "SWAP": tile.swap,
        "UPCAST": operands.needs_upcast(dtype),
        "PRECISION": operands.dot_precision(dtype),
    }
