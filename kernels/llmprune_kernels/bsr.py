"""BlockIndex: which blocks of a weight are stored, as BCSR + COO + the transposed permutation.

A weight of shape (out_features, in_features) is cut into blocks of (rows, columns). Stored blocks
lie in `values`, shape (num_blocks, rows, columns), block row by block row and columns ascending;
absent ones are zero. The column index is padded, so that a kernel may read it ahead. The form is
that of stk (CSR + COO + a permutation for the transposed product, no values copied twice).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Kernels read columns one group of blocks ahead; the widest group is four blocks.
COLUMN_PADDING = 8
BLOCK_SIDES = (16, 32, 64, 128)


@dataclass(frozen=True)
class BlockIndex:
    """Where the stored blocks of a weight are; all tensors int32, contiguous, on one device.

    Attributes:
        row_ptr: Shape (block_rows + 1,): blocks of row r are `row_ptr[r]` to `row_ptr[r + 1] - 1`.
        col: Block column of every block, shape (num_blocks + COLUMN_PADDING,), ascending in a row,
            zeros at the end.
        row: Block row of every block, shape (num_blocks,).
        t_ptr: Shape (block_columns + 1,): as `row_ptr`, for the blocks ordered by column.
        t_row: Block row of every block ordered by column, shape (num_blocks + COLUMN_PADDING,),
            zeros at the end.
        t_idx: Its place in `values`, shape (num_blocks + COLUMN_PADDING,), zeros at the end.
        max_per_row: Blocks in the fullest block row.
        max_per_column: Blocks in the fullest block column.
    """

    row_ptr: Tensor
    col: Tensor
    row: Tensor
    t_ptr: Tensor
    t_row: Tensor
    t_idx: Tensor
    max_per_row: int
    max_per_column: int

    @property
    def num_blocks(self) -> int:
        """Blocks that are stored."""
        return self.row.shape[0]

    @property
    def block_rows(self) -> int:
        """Block rows of the weight."""
        return self.row_ptr.shape[0] - 1

    @property
    def block_columns(self) -> int:
        """Block columns of the weight."""
        return self.t_ptr.shape[0] - 1

    @property
    def density(self) -> float:
        """Stored share of the weight, in [0, 1]."""
        return self.num_blocks / (self.block_rows * self.block_columns)

    @property
    def is_balanced(self) -> bool:
        """Whether every block row has equally many blocks."""
        return self.max_per_row * self.block_rows == self.num_blocks

    @staticmethod
    def from_mask(keep_mask: Tensor) -> BlockIndex:
        """Index of the blocks that a mask keeps.

        Args:
            keep_mask: Bool, shape (block_rows, block_columns), True = stored.

        Raises:
            ValueError: It is not a bool matrix with at least one row and one column.
        """
        if keep_mask.dtype != torch.bool or keep_mask.dim() != 2 or 0 in keep_mask.shape:
            raise ValueError(
                "keep_mask must be a bool matrix of at least one row and one column, got "
                f"{keep_mask.dtype} of shape {tuple(keep_mask.shape)}"
            )
        mask = keep_mask.cpu()
        row, col = mask.nonzero(as_tuple=True)
        t_col, t_row = mask.T.nonzero(as_tuple=True)
        place = torch.empty(mask.shape, dtype=torch.int64)
        place[row, col] = torch.arange(len(row))
        index = BlockIndex(
            row_ptr=_pointers(row, mask.shape[0]),
            col=_padded(col),
            row=row.int().contiguous(),
            t_ptr=_pointers(t_col, mask.shape[1]),
            t_row=_padded(t_row),
            t_idx=_padded(place[t_row, t_col]),
            max_per_row=int(mask.sum(1).max()),
            max_per_column=int(mask.sum(0).max()),
        )
        return index.to(keep_mask.device)

    def to_mask(self) -> Tensor:
        """Bool, shape (block_rows, block_columns), True = stored."""
        mask = torch.zeros(
            self.block_rows, self.block_columns, dtype=torch.bool, device=self.row.device
        )
        mask[self.row.long(), self.col[: self.num_blocks].long()] = True
        return mask

    def to(self, device: torch.device | str) -> BlockIndex:
        """The same index on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return BlockIndex(**moved, max_per_row=self.max_per_row, max_per_column=self.max_per_column)

    def tensors(self) -> dict[str, Tensor]:
        """All six tensors by name, in the order that the operators take them."""
        names = ("row_ptr", "col", "row", "t_ptr", "t_row", "t_idx")
        return {name: getattr(self, name) for name in names}

    def to_saved(self) -> dict[str, Tensor]:
        """What a file needs to hold: `row_ptr`, `col` without padding, and `shape` in blocks."""
        return {
            "row_ptr": self.row_ptr.cpu().contiguous(),
            "col": self.col[: self.num_blocks].cpu().contiguous(),
            "shape": torch.tensor([self.block_rows, self.block_columns], dtype=torch.int32),
        }

    @staticmethod
    def from_saved(saved: Mapping[str, Tensor], *, name: str = "block index") -> BlockIndex:
        """Read back what `to_saved` gave.

        Raises:
            ValueError: A tensor is missing or breaks a rule; `name` begins the message.
        """
        missing = [key for key in ("row_ptr", "col", "shape") if key not in saved]
        if missing:
            raise ValueError(f"{name}: must hold row_ptr, col and shape, {missing[0]} is missing")
        row_ptr, col = saved["row_ptr"].long(), saved["col"].long()
        block_rows, block_columns = (int(size) for size in saved["shape"])
        _check(row_ptr, col, block_rows, block_columns, name)
        row = torch.repeat_interleave(torch.arange(block_rows), row_ptr.diff())
        mask = torch.zeros(block_rows, block_columns, dtype=torch.bool)
        mask[row, col] = True
        return BlockIndex.from_mask(mask)


def check_block(block: tuple[int, int], out_features: int, in_features: int) -> None:
    """Refuse a block that a weight cannot be cut into.

    Raises:
        ValueError: A side that kernels don't know, or one that does not divide the weight.
    """
    if len(block) != 2 or any(side not in BLOCK_SIDES for side in block):
        raise ValueError(f"block sides must be two of {BLOCK_SIDES}, got {block}")
    if out_features % block[0] or in_features % block[1]:
        raise ValueError(
            f"block sides must divide the weight, got block {block[0]}x{block[1]} for a weight of "
            f"{out_features}x{in_features}"
        )


def gather_blocks(dense: Tensor, index: BlockIndex, block: tuple[int, int]) -> Tensor:
    """The stored blocks of a dense weight, differentiable.

    Args:
        dense: Shape (out_features, in_features).
        index: Which blocks.
        block: Their (rows, columns).

    Returns:
        Shape (num_blocks, rows, columns), contiguous.
    """
    check_block(block, *dense.shape)
    grid = dense.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).transpose(1, 2)
    return grid[index.row.long(), index.col[: index.num_blocks].long()].contiguous()


def scatter_blocks(values: Tensor, index: BlockIndex) -> Tensor:
    """The dense weight of stored blocks, zeros elsewhere, differentiable.

    Args:
        values: Shape (num_blocks, rows, columns).
        index: Where they are.

    Returns:
        Shape (out_features, in_features), contiguous.
    """
    _, rows, columns = values.shape
    grid = values.new_zeros(index.block_rows, index.block_columns, rows, columns)
    places = (index.row.long(), index.col[: index.num_blocks].long())
    grid = grid.index_put(places, values)
    return grid.transpose(1, 2).reshape(index.block_rows * rows, index.block_columns * columns)


def _pointers(sorted_rows: Tensor, count: int) -> Tensor:
    counts = torch.bincount(sorted_rows, minlength=count)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()


def _padded(numbers: Tensor) -> Tensor:
    return torch.cat([numbers, numbers.new_zeros(COLUMN_PADDING)]).int()


def _check(row_ptr: Tensor, col: Tensor, block_rows: int, block_columns: int, name: str) -> None:
    if block_rows < 1 or block_columns < 1:
        raise ValueError(f"{name}: shape must be positive, got {block_rows}x{block_columns}")
    if row_ptr.shape != (block_rows + 1,):
        raise ValueError(
            f"{name}: row_ptr must have {block_rows + 1} entries, got {tuple(row_ptr.shape)}"
        )
    if row_ptr[0] != 0 or row_ptr[-1] != len(col) or bool((row_ptr.diff() < 0).any()):
        raise ValueError(
            f"{name}: row_ptr must rise from 0 to the number of blocks, {len(col)}, "
            f"got {row_ptr[0]} to {row_ptr[-1]}"
        )
    if len(col) and (int(col.min()) < 0 or int(col.max()) >= block_columns):
        raise ValueError(
            f"{name}: columns must be in [0, {block_columns}), got {col.min()} to {col.max()}"
        )
    rows = torch.repeat_interleave(torch.arange(block_rows), row_ptr.diff())
    keys = rows * block_columns + col
    if bool((keys.diff() <= 0).any()):
        raise ValueError(f"{name}: columns must ascend in every block row")
