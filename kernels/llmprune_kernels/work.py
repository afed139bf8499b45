"""What the choice of a backend depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune_kernels.bsr import BlockIndex


class Work(NamedTuple):
    """One product. A tuple, since every call makes one and looks it up.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: Of the activations and blocks.
        num_rows: Rows of x (tokens), M.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        block: (rows, columns) of a stored block.
        density: Stored share of the weight.
        threads: That a CPU computes it with.
    """

    device: str
    dtype: torch.dtype
    num_rows: int
    in_features: int
    out_features: int
    block: tuple[int, int]
    density: float
    threads: int = 1

    @staticmethod
    def of(x: Tensor, values: Tensor, index: BlockIndex, num_rows: int | None = None) -> Work:
        """The product with a weight, now.

        Args:
            x: Shape (..., in_features).
            values: Of the weight.
            index: Where its blocks are.
            num_rows: Where x only says the dtype and the device: rows of what is multiplied.
        """
        num_blocks, rows, columns = values.shape
        block_rows, block_columns = index.block_rows, index.block_columns
        in_features = block_columns * columns
        return Work(
            x.device.type,
            x.dtype,
            x.numel() // in_features if num_rows is None else num_rows,
            in_features,
            block_rows * rows,
            (rows, columns),
            num_blocks / (block_rows * block_columns),
            torch.get_num_threads(),
        )
