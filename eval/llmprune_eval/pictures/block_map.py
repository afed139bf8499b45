"""Maps of weight blocks: for each kind of projection, how full every block column is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune_eval.markup import Markup, element
from llmprune_eval.pictures.axes import numbered_columns, picture, rect, text

if TYPE_CHECKING:
    from llmprune.weight_blocks import BlockPlan

# Cells of a map's height; more block columns than that are averaged.
_MOST_ROWS = 48


@dataclass(frozen=True)
class BlockedKind:
    """All projections of one name, in layer order.

    Attributes:
        name: `down_proj`, ...
        block: (rows, columns) of a block.
        keep_masks: One a layer: bool, shape (block rows, block columns).
    """

    name: str
    block: tuple[int, int]
    keep_masks: tuple[Tensor, ...]

    @property
    def kept(self) -> int:
        """Blocks that stay, in all layers."""
        return sum(int(mask.sum()) for mask in self.keep_masks)

    @property
    def total(self) -> int:
        """Blocks of the dense projections."""
        return sum(mask.numel() for mask in self.keep_masks)

    def densities(self) -> list[float]:
        """Share of the blocks that stays, a layer each."""
        return [float(mask.float().mean()) for mask in self.keep_masks]


def blocked_kinds(plan: BlockPlan) -> list[BlockedKind]:
    """The projections of a plan by kind; kinds with different blocks or grids stand apart."""
    alike: dict[tuple[str, tuple[int, int], torch.Size], list[Tensor]] = {}
    for name, mask in plan.keep_masks.items():
        key = (name.rpartition(".")[2], plan.blocks[name], mask.shape)
        alike.setdefault(key, []).append(mask)
    return [BlockedKind(name, block, tuple(masks)) for (name, block, _), masks in alike.items()]


def block_map(kind: BlockedKind, width: int) -> Markup:
    """Layers from left to right, block columns from top to bottom; darker is fuller."""
    columns = torch.stack([mask.float().mean(0) for mask in kind.keep_masks])
    cells = _averaged(columns)
    left, top = 2.0, 20.0
    pitch = (width - left - 2) / len(cells)
    height = min(20.0, max(3.5, 160.0 / len(cells[0])))
    parts = []
    for index, row in enumerate(cells):
        shares = [
            rect(
                left + index * pitch,
                top + place * height,
                max(pitch - 0.6, 0.5),
                height - 0.6,
                "kept",
                fill_opacity=f"{share:.2f}",
            )
            for place, share in enumerate(row)
            if share
        ]
        density = f"layer {index}: {kind.densities()[index]:.3f} of the blocks kept"
        parts.append(element("g", element("title", density), *shares))
    bottom = top + len(cells[0]) * height
    frame = rect(left - 1, top - 1, width - left, bottom - top + 2, "frame")
    axis = numbered_columns(len(cells), left, float(width) - 2, bottom + 1, "layer")
    words = text(0, 12, "input features from top to bottom")
    label = (
        f"{kind.name}: share of the blocks kept in every block column of {len(cells)} layers; "
        f"{kind.kept / kind.total:.3f} in all"
    )
    return picture(width, bottom + 42, label, words, frame, *parts, axis)


def _averaged(columns: Tensor) -> Sequence[Sequence[float]]:
    """Shares of shape (layers, block columns), neighbours averaged down to what can be drawn."""
    count = columns.shape[1]
    if count <= _MOST_ROWS:
        return columns.tolist()
    parts = columns.tensor_split(_MOST_ROWS, dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1).tolist()
