"""Device functions that kernels share: the order of programs and the walk over a row's blocks.

The blocks of one block row are taken as lying side by side along the inner dimension, and a kernel
takes STEP of it at a time: one dot of inner size STEP, whether that is four narrow blocks, one
block, or half of a wide one. SIDE is the block's side along the walk. When STEP > SIDE every lane
has its own block, else all lanes share one (a scalar). A function returns once, at its end: the
compiler takes no return inside an `if`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(pid, num_token_tiles, block_rows, GROUP: tl.constexpr):
    """(token tile, block row): GROUP token tiles visit all rows before the next group begins.

    Token tiles run fastest, so that a row's blocks are read once from memory for the whole group
    while the group's part of x stays in L2.
    """
    members_times_rows = GROUP * block_rows
    first = pid // members_times_rows * GROUP
    members = tl.minimum(num_token_tiles - first, GROUP)
    within = pid % members_times_rows
    return first + within % members, within // members


@triton.jit
def lane_blocks(step, STEP: tl.constexpr, SIDE: tl.constexpr):
    """Which block of its row every lane of a step reads, counted from the row's first."""
    if STEP > SIDE:
        blocks = step * (STEP // SIDE) + tl.arange(0, STEP) // SIDE
    else:
        blocks = step // (SIDE // STEP)
    return blocks


@triton.jit
def row_blocks(row_ptr, row, per_row, EVEN: tl.constexpr):
    """(first block, number of blocks) of a block row; EVEN: every row has `per_row`, none is read.

    A program that need not wait for its row's place fetches its first blocks at once.
    """
    if EVEN:
        first = row * per_row
        count = per_row
    else:
        first = tl.load(row_ptr + row)
        count = tl.load(row_ptr + row + 1) - first
    return first, count


@triton.jit
def load_places(places_ptr, step, STEP: tl.constexpr, SIDE: tl.constexpr):
    """The block column (or row, or place in the values) of every lane of a step.

    Loaded as scalars and spread over the lanes: a load for every lane would be eight for every
    thread, all of one address.
    """
    if STEP == 2 * SIDE:
        at = places_ptr + step * 2
        places = tl.where(tl.arange(0, STEP) < SIDE, tl.load(at), tl.load(at + 1))
    elif STEP == 4 * SIDE:
        at = places_ptr + step * 4
        lane = tl.arange(0, STEP)
        low = tl.where(lane < SIDE, tl.load(at), tl.load(at + 1))
        high = tl.where(lane < 3 * SIDE, tl.load(at + 2), tl.load(at + 3))
        places = tl.where(lane < 2 * SIDE, low, high)
    else:
        places = tl.load(places_ptr + lane_blocks(step, STEP, SIDE))
    return places


@triton.jit
def lanes_inside(step, STEP: tl.constexpr, SIDE: tl.constexpr):
    """Where in its block every lane reads."""
    if STEP > SIDE:
        lanes = tl.arange(0, STEP) % SIDE
    else:
        lanes = step % (SIDE // STEP) * STEP + tl.arange(0, STEP)
    return lanes


@triton.jit
def lane_offsets(places, step, STEP: tl.constexpr, SIDE: tl.constexpr):
    """Offsets along the dense side of what `places` (block columns or rows of the lanes) name.

    Blocks begin at multiples of 16 elements, which the compiler can't know of a loaded index;
    without the hint it would load one element at a time.
    """
    offsets = places * SIDE + lanes_inside(step, STEP, SIDE)
    return tl.max_contiguous(tl.multiple_of(offsets, [8]), [8])


@triton.jit
def row_tile_offsets(
    step, STEP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Offsets of a step's (ROWS, STEP) weights from the row's first block, int32; ROWS of BN.

    A row holds at most BN * in_features numbers, so int32 is enough within one.
    """
    blocks = lane_blocks(step, STEP, BK)
    along = blocks * (BN * BK) + lanes_inside(step, STEP, BK)
    if STEP > BK:
        along = tl.max_contiguous(tl.multiple_of(along, [8]), [8])
    return tl.arange(0, ROWS)[:, None] * BK + along[None, :]


@triton.jit
def zero_sums(BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    """Where `add_product` starts."""
    return tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)


@triton.jit
def add_product(x, w, acc, SWAP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x w^T for x (BM, STEP) and w (BN, STEP); kept as (BN, BM) if SWAP.

    SWAP makes the weights the left operand, and the tokens the wider side of an instruction.
    """
    if SWAP:
        acc = multiply(w, tl.trans(x), acc, UPCAST, PRECISION)
    else:
        acc = multiply(x, tl.trans(w), acc, UPCAST, PRECISION)
    return acc


@triton.jit
def upright(acc, SWAP: tl.constexpr):
    """The sums as (BM, BN)."""
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def multiply(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def write_tile(
    acc,
    bias_ptr,
    gate_ptr,
    y_ptr,
    token_tile,
    row,
    num_tokens,
    block_rows,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """A tile's sums with bias and gate, to y."""
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
