"""y = x W^T + bias for many tokens on sm_90 and later: tiles fetched by the bulk copy engine.

The same walk as in `matmul`, with tensor descriptors instead of pointers: one instruction fetches
a whole tile, no thread computes addresses, and rows beyond the last token are filled with zeros.
A box cannot be gathered from several block columns, so a dot's inner size is the block's columns,
at most `step`. Where a step is twice that and rows are equally full, of an even number, blocks are
taken in pairs, two dots a turn of the loop.

Where tiles are too few for the GPU, a tile's blocks are shared by items. All but the last store
float32 sums and count themselves done; the last waits for that count and adds the sums in their
order: one launch, and the same bits every time. Where there are many, and rows are equally full, a
tile may ask for programs that stay: `persistent`.
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
from llmprune_kernels.decode import split_rows
from llmprune_kernels.persistent import persistent_kernel
from llmprune_kernels.tiles import Tile
from llmprune_kernels.walk import (
    add_product,
    lane_blocks,
    load_places,
    program_tile,
    row_blocks,
    write_tile,
    zero_sums,
)

# what the copy engine asks of a tensor's base and row stride
ALIGNMENT_BYTES = 16


@triton.jit(do_not_specialize=["split", "per_row"])
def tma_kernel(
    x_tensor,
    values_tensor,
    row_ptr,
    col_ptr,
    bias_ptr,
    gate_ptr,
    y_ptr,
    partial_ptr,
    done_ptr,
    num_tokens,
    block_rows,
    split,
    per_row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    ITEMS: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One item of a (BM, BN) tile of y; x boxes are (BM, STEP), weight boxes (BN, STEP)."""
    tile = tl.program_id(0) // ITEMS
    item = tl.program_id(0) % ITEMS
    token_tile, row = program_tile(tile, tl.cdiv(num_tokens, BM), block_rows, GROUP)
    first, count = row_blocks(row_ptr, row, per_row, EVEN)
    if ITEMS > 1:
        begin = tl.minimum(item * split, count)
        first += begin
        count = tl.minimum(count - begin, split)
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
    if ITEMS > 1:
        sums_ptr = partial_ptr + tl.cast(tile, tl.int64) * ((ITEMS - 1) * BM * BN)
        if item < ITEMS - 1:
            hand_over(acc, sums_ptr + item * (BM * BN), done_ptr + tile)
        else:
            acc = take_over(acc, sums_ptr, done_ptr + tile, ITEMS)
            write_tile(
                acc, bias_ptr, gate_ptr, y_ptr, token_tile, row, num_tokens, block_rows,
                BM, BN, SWAP, HAS_BIAS, HAS_GATE,
            )  # fmt: skip
    else:
        write_tile(
            acc, bias_ptr, gate_ptr, y_ptr, token_tile, row, num_tokens, block_rows,
            BM, BN, SWAP, HAS_BIAS, HAS_GATE,
        )  # fmt: skip


@triton.jit
def places_of(acc):
    """Offsets of the numbers of a tile that lies row by row."""
    width: tl.constexpr = acc.shape[1]
    return tl.arange(0, acc.shape[0])[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def hand_over(acc, sums_ptr, done_ptr):
    """Store an item's sums, then count it as done."""
    tl.store(sums_ptr + places_of(acc), acc)
    tl.debug_barrier()
    tl.atomic_add(done_ptr, 1, sem="release")


@triton.jit
def take_over(acc, sums_ptr, done_ptr, ITEMS: tl.constexpr):
    """The last item's sums and those of all others, in their order, once they are there.

    The others have lower program ids, so they were begun before, and they wait for nothing.
    """
    while tl.atomic_cas(done_ptr, ITEMS - 1, ITEMS - 1, sem="acquire") != ITEMS - 1:
        pass
    tl.debug_barrier()
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    for item in tl.static_range(ITEMS - 1):
        acc += tl.load(sums_ptr + item * size + places_of(acc), cache_modifier=".cg")
    return acc


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
    fixed = constants(tile, block, x.dtype, paired=is_paired(tile, block, index))
    fixed |= {"HAS_BIAS": bias is not None, "HAS_GATE": gate is not None, **tile.options()}
    # what an absent operand's pointer is, nobody reads
    added, opening = (x if operand is None else operand for operand in (bias, gate))
    num_tiles = triton.cdiv(x.shape[0], tile.block_m) * index.block_rows
    if tile.persistent and index.is_balanced and gate is None:
        del fixed["PAIRS"], fixed["HAS_GATE"]
        programs = tiles.num_programs(tile, values, num_tiles)
        with torch.cuda.device_of(x):
            persistent_kernel[(programs,)](
                x_tensor, values_tensor, index.col, added, y,
                x.shape[0], index.block_rows, index.max_per_row, programs, **fixed,
            )  # fmt: skip
        return y
    split, items = split_rows(tile, block, index.max_per_row)
    partial, done = y, index.row_ptr
    if items > 1:
        sums = (num_tiles, items - 1, tile.block_m * block[0])
        partial = x.new_empty(sums, dtype=torch.float32)
        done = torch.zeros(num_tiles, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        tma_kernel[(num_tiles * items,)](
            x_tensor, values_tensor, index.row_ptr, index.col, added, opening, y, partial, done,
            x.shape[0], index.block_rows, split, index.max_per_row,
            ITEMS=items, EVEN=index.is_balanced, **fixed,
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
    """The kernel's compile-time numbers that its tile, dtype and pairing alone decide."""
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
