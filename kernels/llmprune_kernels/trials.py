"""One product on a GPU, set up to be checked and timed with any kernel and tile."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from triton.errors import TritonError

from llmprune_kernels import (
    bsr,
    decode,
    gradients,
    matmul,
    operands,
    reference,
    swiglu,
    tiles,
    tma,
)
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.tiles import Device, Kind, Problem, Tile
from llmprune_kernels.timing import Graph, Launch, Timing, copies_needed, interleaved

# largest difference as a share of the largest number, of outputs rounded to the dtype
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
# tiles that are timed again after the first round
FINALISTS = 4


@dataclass(frozen=True)
class Trial:
    """Operands of one problem; `values` are equal copies, together too large for L2."""

    problem: Problem
    index: BlockIndex
    x: Tensor
    dy: Tensor
    values: list[Tensor]

    @staticmethod
    def of(
        problem: Problem,
        device: torch.device,
        *,
        keep_mask: Tensor | None = None,
        copies: int | None = None,
    ) -> Trial:
        """Random operands, the same every time.

        Args:
            problem: Sizes.
            device: Where.
            keep_mask: Which blocks; by default equally many in every row, at random.
            copies: Of the weights; by default enough to keep them out of L2.
        """
        generator = torch.Generator().manual_seed(0)
        rows, columns = problem.block
        if keep_mask is None:
            grid = (problem.out_features // rows, problem.in_features // columns)
            keep_mask = balanced_mask(*grid, problem.density, generator)
        index = BlockIndex.from_mask(keep_mask).to(device)
        torch.manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.float32)

        values = random(index.num_blocks, rows, columns) * problem.in_features**-0.5
        values = values.to(problem.dtype)
        wanted = copies or copies_needed(values.numel() * values.element_size())
        return Trial(
            problem=problem,
            index=index,
            x=random(problem.tokens, problem.in_features).to(problem.dtype),
            dy=random(problem.tokens, problem.out_features).to(problem.dtype),
            values=[values, *(values.clone() for _ in range(wanted - 1))],
        )

    def launch(self, kind: Kind, tile: Tile | None, copy: int = 0) -> Callable[[], Tensor]:
        """What runs a kind of kernel on one copy of the weights."""
        values, index = self.values[copy], self.index
        if kind == "grad_input":
            return partial(gradients.grad_input, self.dy, values, index, config=tile)
        if kind == "grad_values":
            block = self.problem.block
            return partial(gradients.grad_values, self.dy, self.x, index, block, config=tile)
        if kind == "swiglu":
            # the neighbouring copy as the second weight, so that both are cold
            up = self.values[copy - 1]
            return partial(swiglu.linear_swiglu, self.x, values, index, up, index, config=tile)
        linear = {"matmul": matmul.linear, "tma": tma.linear, "decode": decode.linear}[kind]
        return partial(linear, self.x, values, index, config=tile)

    def launches(self, kind: Kind, tile: Tile | None) -> list[Launch]:
        """One for every copy of the weights."""
        return [self.launch(kind, tile, copy) for copy in range(len(self.values))]

    def dense_launches(self, kind: Kind) -> list[Launch]:
        """The same product with a dense weight; as many copies as are needed out of L2."""
        size = self.problem.out_features * self.problem.in_features * self.problem.dtype.itemsize
        first = bsr.scatter_blocks(self.values[0], self.index)
        weights = [first, *(first.clone() for _ in range(copies_needed(size) - 1))]
        x, dy = self.x, self.dy
        if kind == "grad_input":
            return [partial(torch.matmul, dy, weight) for weight in weights]
        if kind == "grad_values":
            return [partial(torch.matmul, dy.T, x)]
        if kind == "swiglu":
            return [
                partial(_dense_swiglu, x, gate, up)
                for gate, up in zip(weights, weights[1:] + weights[:1], strict=True)
            ]
        return [partial(functional.linear, x, weight) for weight in weights]

    def wanted(self, kind: Kind) -> Tensor:
        """What a kind computes, in float64."""
        values, index = self.values[0].double(), self.index
        if kind == "grad_input":
            return reference.grad_input(self.dy.double(), values, index)
        if kind == "grad_values":
            block = self.problem.block
            return reference.grad_values(self.dy.double(), self.x.double(), index, block)
        if kind == "swiglu":
            return reference.swiglu(self.x.double(), values, index, values, index)
        return reference.exact(self.x, values, index)

    def error(self, kind: Kind, got: Tensor, wanted: Tensor) -> str:
        """Why a result is not correct, "" if it is."""
        if got.shape != wanted.shape:
            return f"{kind}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        error = reference.relative_error(got, wanted) if wanted.numel() else 0.0
        allowed = TOLERANCES[self.problem.dtype]
        # `not <=` so that NaN is refused too
        return "" if error <= allowed else f"{kind}: error {error:.1e}, allowed {allowed:.0e}"


def balanced_mask(
    block_rows: int, block_columns: int, density: float, generator: torch.Generator
) -> Tensor:
    """Bool mask with the same number of blocks, at least one, in every row."""
    kept = max(1, round(density * block_columns))
    order = torch.rand(block_rows, block_columns, generator=generator).argsort(dim=1)
    mask = torch.zeros(block_rows, block_columns, dtype=torch.bool)
    return mask.scatter_(1, order[:, :kept], True)


def candidates(kind: Kind, problem: Problem, device: Device) -> list[Tile]:
    """Tiles worth measuring: those whose buffers fit, the table's answer first."""
    default = tiles.choose_tile(kind, device, problem)
    cuts = _ways_to_cut(kind, problem, default)
    if kind == "tma":
        cuts = (shared for tile in cuts for shared in _shared_tiles(tile, problem, device))
    found = [default, *cuts]
    limit = tiles.SHARED_BYTES.get(device.arch, tiles.SMALLEST_SHARED_BYTES)
    sizes = (problem.block, problem.dtype)
    return [
        tile
        for tile in dict.fromkeys(found)
        if tiles.shared_bytes(kind, tile, *sizes) <= limit and _can_hold(kind, tile, problem)
    ]


def _ways_to_cut(kind: Kind, problem: Problem, default: Tile) -> Iterator[Tile]:
    rows, columns = problem.block
    step = 32 if problem.dtype == torch.float32 else 64
    if kind == "decode":
        widest = operands.MOST_MERGED * columns
        steps = sorted({w for w in (columns, step, 2 * step) if 16 <= w <= min(widest, 128)})
        parts = [size for size in (16, 32, 64, 128) if size <= rows]
        for block_m, width, part in itertools.product(_token_sizes(kind, problem), steps, parts):
            for num_warps, num_stages in itertools.product((2, 4), (3, 5)):
                # a thread moves 8 to 64 numbers in a step
                if 8 <= part * width / (32 * num_warps) <= 64:
                    for items in (1, 2, 4):
                        yield Tile(block_m, num_warps, num_stages, width, 8, items, part)
        return
    depths = (3, 4, 6, 8) if kind == "tma" else (3, 4, 5)
    swaps = (False, True) if kind in ("matmul", "tma", "swiglu") else (False,)
    # narrow blocks one by one, or in pairs
    widths = sorted({min(step, columns), step}) if kind == "tma" else [step]
    if kind == "grad_values":
        widths = [default.step]
    sizes = _token_sizes(kind, problem)
    for block_m, num_warps, depth, width, swap in itertools.product(
        sizes, (4, 8), depths, widths, swaps
    ):
        yield Tile(block_m, num_warps, depth, width, 8, swap=swap)


def _shared_tiles(tile: Tile, problem: Problem, device: Device) -> Iterator[Tile]:
    """The tile for one program; of a middle depth also shared by items, or for ones that stay."""
    yield replace(tile, items=1)
    if tile.num_stages in (4, 6):
        num_tiles = problem.tokens // tile.block_m * (problem.out_features // problem.block[0])
        if num_tiles > device.num_processors and tile.step <= problem.block[1]:
            yield replace(tile, items=1, persistent=True)
        for items in (2, 4, 8):
            if tiles.prompt_items(replace(tile, items=items), problem, device) == items:
                yield replace(tile, items=items)


def fastest(
    trial: Trial, kind: Kind, device: Device, deadline: float
) -> tuple[Tile, Timing, Timing] | None:
    """The fastest correct tile, its time, and the dense product's; None if none was correct.

    All are timed once, and the best few of them again in turns with the dense product.

    Args:
        trial: The problem.
        kind: Of kernel.
        device: Whose tiles are tried.
        deadline: Of `time.monotonic`; after it the best so far is the answer.
    """
    wanted = trial.wanted(kind)
    found: list[tuple[float, Tile]] = []
    for tile in candidates(kind, trial.problem, device):
        if found and time.monotonic() > deadline:
            break
        us = _time_tile(trial, kind, tile, wanted)
        if us is not None:
            found.append((us, tile))
    if not found:
        return None
    best = [tile for _, tile in sorted(found, key=lambda pair: pair[0])[:FINALISTS]]
    graphs = {str(tile): Graph(trial.launches(kind, tile)) for tile in best}
    times = interleaved(graphs | {"dense": Graph(trial.dense_launches(kind))})
    dense = times.pop("dense")
    winner = min(best, key=lambda tile: times[str(tile)].median_us)
    return winner, times[str(winner)], dense


def _time_tile(trial: Trial, kind: Kind, tile: Tile, wanted: Tensor) -> float | None:
    """Microseconds of one tile, roughly; None if it does not fit the GPU or is not correct."""
    try:
        got = trial.launch(kind, tile)()
    except (TritonError, RuntimeError) as error:
        print(f"{kind} {tile}: {error}"[:300], file=sys.stderr)
        return None
    wrong = trial.error(kind, got, wanted)
    if wrong:
        print(f"{tile}: {wrong}", file=sys.stderr)
        return None
    graphs = {"tile": Graph(trial.launches(kind, tile))}
    return interleaved(graphs, rounds=1, round_ms=2.0)["tile"].median_us


def _dense_swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(functional.linear(x, gate)) * functional.linear(x, up)


def _token_sizes(kind: Kind, problem: Problem) -> tuple[int, ...]:
    if kind == "decode":
        columns = max(8, 1 << (problem.tokens - 1).bit_length())
        return (1, columns) if problem.tokens == 1 else (columns,)
    if kind == "grad_values":
        return (32, 64, 128)
    if problem.tokens >= 2048:
        return (128, 256)
    return (64, 128, 256) if problem.tokens > 128 else (32, 64, 128)


def _can_hold(kind: Kind, tile: Tile, problem: Problem) -> bool:
    """Whether the float32 sums of a program take at most half of its registers.

    A thread has 255; 128 of them for sums leave room for addresses. Two dots share a tied pair's.
    """
    rows, columns = problem.block
    width = {"grad_input": columns, "grad_values": rows, "swiglu": 2 * rows}.get(kind, rows)
    height = max(tile.step, columns) if kind == "grad_values" else tile.block_m
    return height * width <= 128 * 32 * tile.num_warps
