"""Masks and weights that every kernel must get right."""

from __future__ import annotations

import torch

from llmprune_kernels.bsr import BlockIndex

# name -> keep_mask of 5 x 4 blocks
MASKS = {
    "half": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]],
    "an empty row and column": [
        [1, 0, 1, 0],
        [0, 0, 0, 0],
        [1, 1, 1, 0],
        [0, 1, 0, 0],
        [1, 1, 0, 0],
    ],
    "one block": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "all": [[1] * 4] * 5,
    "none": [[0] * 4] * 5,
}


def mask_of(name):
    return torch.tensor(MASKS[name], dtype=torch.bool)


def problem(name, block, num_rows, dtype=torch.float64, *, bias=True, seed=0):
    """x, values, index and bias of one product."""
    generator = torch.Generator().manual_seed(seed)
    index = BlockIndex.from_mask(mask_of(name))
    x = torch.randn(num_rows, index.block_columns * block[1], generator=generator)
    values = torch.randn(index.num_blocks, *block, generator=generator)
    shift = torch.randn(index.block_rows * block[0], generator=generator) if bias else None
    return x.to(dtype), values.to(dtype), index, None if shift is None else shift.to(dtype)
