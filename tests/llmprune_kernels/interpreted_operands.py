"""Operands of interpreted cases, surrounded by NaN, and how near a result must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmprune_kernels import reference
from llmprune_kernels.bsr import BlockIndex

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCES = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 1e-6}
# the interpreter truncates to bfloat16 where a GPU rounds, so an error may be a whole ulp
ULPS = {"fp16": 2**-10, "bf16": 2**-7, "fp32": 2**-23}
PATTERNS = ("random", "balanced", "empty rows", "unequal", "one", "all", "empty")


def mask_of(pattern: str, seed: int = 0) -> Tensor:
    """A bool mask of 3 block rows and 5 block columns."""
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed))
    if pattern == "random":
        return drawn < 0.5
    if pattern == "balanced":
        return drawn <= drawn.kthvalue(2, dim=1, keepdim=True).values
    mask = torch.zeros(3, 5, dtype=torch.bool)
    if pattern == "empty rows":
        mask[1, 1:4] = True
    elif pattern == "unequal":
        mask[0, 4] = mask[1, :] = mask[2, [0, 3, 4]] = True
    elif pattern == "one":
        mask[2, 4] = True
    elif pattern == "first":
        mask[:, 0] = True
    elif pattern == "even":
        # two pairs of blocks a row
        mask[:, [0, 1, 3, 4]] = True
    elif pattern == "all":
        mask[:] = True
    return mask


def guarded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers inside a larger array of NaN: what is read beyond them shows in the result."""
    around = torch.full((rows + 3, columns + 32), torch.nan, dtype=dtype)
    inside = around[1 : 1 + rows, 16 : 16 + columns]
    return inside.copy_(torch.randn(rows, columns))


def stored(index: BlockIndex, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Random blocks, with blocks of NaN behind them."""
    around = torch.full((index.num_blocks + 4, *block), torch.nan, dtype=dtype)
    around[: index.num_blocks] = torch.randn(index.num_blocks, *block)
    return around[: index.num_blocks]


def tile_of(dtype: torch.dtype, **changes: int) -> Any:
    """A small tile that needs several programs, merged blocks and split rows."""
    from llmprune_kernels.tiles import Tile

    step = 32 if dtype == torch.float32 else 64
    sizes = {"block_m": 16, "num_warps": 4, "num_stages": 3, "step": step, "group": 2, "items": 8}
    return Tile(**sizes | changes)


def holds(got: Tensor, wanted: Tensor, dtype: str, inner: int) -> None:
    """`got` has no NaN and is as near to float64 as `inner` rounded products allow."""
    tolerance = TOLERANCES[dtype] * (max(1.0, (inner / 128) ** 0.5) if dtype == "fp32" else 1)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if wanted.numel() == 0:
        return
    error = reference.relative_error(got, wanted)
    assert error <= tolerance, f"error {error:.2e} of the largest, allowed {tolerance:.1e}"
