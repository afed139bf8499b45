"""Random weights in blocks for the tests of the CPU products."""

import torch
from torch import Tensor

from llmprune_kernels.bsr import BlockIndex

# kernels at fp32 differ from float64 by 1e-6 * sqrt(K / 128); K is at most 512 here.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
PATTERNS = ("random", "unequal", "empty rows", "full", "empty", "one block")


def mask(pattern: str, rows: int, columns: int) -> Tensor:
    """Bool, shape (rows, columns), True = stored."""
    kept = torch.rand(rows, columns) < 0.5
    if pattern == "unequal":
        kept = torch.rand(rows, columns) < torch.linspace(0, 1, rows)[:, None]
    elif pattern == "empty rows":
        kept[::2] = False
    elif pattern in ("full", "empty"):
        kept = torch.full((rows, columns), pattern == "full")
    elif pattern == "one block":
        kept = torch.zeros(rows, columns, dtype=torch.bool)
        kept[-1, -1] = True
    return kept


def weight(
    pattern: str, dtype: torch.dtype, block: tuple[int, int], grid: tuple[int, int] = (3, 4)
) -> tuple[Tensor, BlockIndex]:
    """Values and index of a weight of `grid` blocks."""
    index = BlockIndex.from_mask(mask(pattern, *grid))
    return torch.randn(index.num_blocks, *block).to(dtype), index


def surrounded(tensor: Tensor) -> Tensor:
    """The same numbers with NaN before, after and between rows: reading those shows."""
    rows, width = tensor.shape
    outer = torch.full((rows + 2, width + 32), float("nan"), dtype=tensor.dtype)
    inner = outer[1:-1, 16:-16]
    inner.copy_(tensor)
    return inner
