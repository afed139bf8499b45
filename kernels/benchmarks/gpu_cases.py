"""What the GPU run checks and times, in the order of what is wanted first."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune_kernels.tiles import Kind, Problem

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
# tokens and shape: no more tiles of 128 by 128 than a GPU of today has processors; keys and values
# of a prompt, and short prompts
FEW_TILES = ((512, (1024, 4096)), (512, (4096, 4096)), (128, (4096, 4096)))
BF16 = torch.bfloat16
BACKWARD: tuple[tuple[str, Kind], ...] = (
    ("backward: dx", "grad_input"),
    ("backward: dW", "grad_values"),
)
# the first two have as many numbers in a block; the last four show what each side costs
BLOCKS = ((128, 32), (64, 64), (128, 16), (128, 64), (64, 32), (32, 32))


@dataclass(frozen=True)
class Case:
    """One problem of a section, with the kinds of kernel that run it."""

    section: str
    problem: Problem
    kinds: tuple[Kind, ...]

    @property
    def with_torch(self) -> bool:
        """Whether torch's kernel is timed too: its search takes seconds, so on one shape."""
        same = (self.problem.out_features, self.problem.in_features) == SHAPES[0]
        return self.section in ("decode", "prefill") and same and self.problem.density == 0.5


def correctness_cases() -> list[tuple[Problem, str, tuple[Kind, ...]]]:
    """(problem, pattern, kinds): odd token counts, every dtype, hard patterns; small."""
    forward: tuple[Kind, ...] = ("matmul", "tma", "swiglu", "grad_input", "grad_values")
    cases = []
    for block in ((128, 32), (64, 64), (16, 16), (32, 128)):
        base = Problem(133, 6 * 128, 10 * 128, 0.4, block, BF16)
        cases.append((base, "balanced", forward))
        cases.append((replace(base, tokens=7), "unequal", ("decode", "swiglu")))
        cases.append((replace(base, tokens=1), "unequal", ("decode",)))
        cases.append((replace(base, tokens=33), "unequal", forward))
    base = Problem(70, 6 * 128, 10 * 128, 0.4, (128, 32), BF16)
    for pattern in ("empty rows", "empty", "one", "all"):
        cases.append((base, pattern, ("matmul", "tma", "grad_input", "grad_values")))
        cases.append((replace(base, tokens=16), pattern, ("decode",)))
    # longer rows, which items share
    long = replace(base, in_features=40 * 128)
    for block, pattern in itertools.product(((128, 32), (64, 64)), ("balanced", "unequal", "one")):
        cases.append((replace(long, block=block), pattern, ("tma",)))
    for dtype in (torch.float16, torch.float32):
        cases.append((replace(base, dtype=dtype), "unequal", forward))
        cases.append((replace(base, tokens=5, dtype=dtype), "unequal", ("decode",)))
    return cases


SECTIONS = ("decode", "prefill", "few tiles", "gated", *(name for name, _ in BACKWARD))


def timed_cases(sections: Collection[str] = SECTIONS) -> list[Case]:
    """Every timed problem of some sections, the most wanted first."""
    decode = [
        Case("decode", Problem(tokens, *shape, density, (128, 32), BF16), ("decode",))
        for density, tokens, shape in itertools.product((0.5, 0.25, 0.1), (1, 16, 4), SHAPES)
    ]
    prefill = [
        Case("prefill", Problem(tokens, *shape, density, (128, 32), BF16), ("matmul", "tma"))
        for density, tokens, shape in itertools.product(
            (0.5, 0.25, 0.75), (4096, 512, 2048), SHAPES
        )
        if (tokens, shape) not in FEW_TILES
    ]
    few = [
        Case("few tiles", Problem(tokens, *shape, density, (128, 32), BF16), ("matmul", "tma"))
        for density in (0.5, 0.25, 0.75)
        for tokens, shape in FEW_TILES
    ]
    wide = [
        Case("prefill", Problem(4096, *SHAPES[0], density, (64, 64), BF16), ("matmul", "tma"))
        for density in (0.5, 0.25)
    ]
    square = [
        Case("decode", Problem(tokens, *SHAPES[0], density, (64, 64), BF16), ("decode",))
        for density, tokens in itertools.product((0.5, 0.25), (1, 16))
    ]
    gated = [
        Case("gated", Problem(tokens, *SHAPES[0], 0.5, (128, 32), BF16), ("swiglu",))
        for tokens in (1, 4096, 512)
    ]
    backward = [
        [
            Case(name, Problem(4096, *SHAPES[0], density, (128, 32), BF16), (kind,))
            for density in (0.5, 0.25)
        ]
        for name, kind in BACKWARD
    ]
    # the first of each table first: a short budget still shows every kind
    cases = _round_robin(decode, prefill, wide, square, gated, *backward, few)
    return [case for case in cases if case.section in sections]


def block_problems() -> list[Problem]:
    """Prefill at one density with every block worth offering."""
    return [Problem(4096, *SHAPES[0], 0.5, block, BF16) for block in BLOCKS]


def _round_robin(*tables: list[Case]) -> list[Case]:
    turns = itertools.zip_longest(*tables)
    return [case for turn in turns for case in turn if case is not None]


def pattern_mask(pattern: str, block_rows: int, block_columns: int) -> Tensor | None:
    """The keep mask of a named pattern; None for the balanced one that trials draw themselves."""
    if pattern == "balanced":
        return None
    mask = torch.zeros(block_rows, block_columns, dtype=torch.bool)
    if pattern == "unequal":
        for row in range(block_rows):
            mask[row, : (row * 5) % block_columns + 1] = True
    elif pattern == "empty rows":
        mask[1::2, ::3] = True
    elif pattern == "one":
        mask[-1, -1] = True
    elif pattern == "all":
        mask[:] = True
    return mask
