"""BlockMap: the projections whose weights are cut into blocks; BlockPlan: which blocks stay.

A weight block is a rectangle of a projection's weight that stays or becomes zero; the model keeps
its shape. Where a projection cannot be cut into the recipe's block, it takes the next one that
fits: first of the same area, then smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.selection import Pool
from llmprune.units import Branch, map_units
from llmprune_kernels import BlockIndex
from llmprune_kernels.bsr import BLOCK_SIDES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.recipe import WeightBlocks
    from llmprune.scores import UnitScores

PLAN_FORMAT = "llmprune-block-plan/1"
# How far whole blocks may be from the wanted sparsity.
TOLERANCE = 0.05


@dataclass(frozen=True)
class BlockedProjection:
    """One projection and the block that its weight is cut into.

    Attributes:
        name: Of the module in the model.
        branch: The sublayer it belongs to.
        out_features: Rows of its weight.
        in_features: Columns of it.
        block: (rows, columns) of a block.
        num_kept: Blocks that stay.
    """

    name: str
    branch: Branch
    out_features: int
    in_features: int
    block: tuple[int, int]
    num_kept: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks over each other and side by side."""
        return self.out_features // self.block[0], self.in_features // self.block[1]

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.grid[0] * self.grid[1]

    @property
    def area(self) -> int:
        """Parameters of a block."""
        return self.block[0] * self.block[1]


@dataclass(frozen=True)
class BlockMap:
    """The projections that a recipe prunes in blocks, in the model's order.

    Attributes:
        projections: By module name.
        rows: `balanced`: every block row of a projection keeps equally many; `free`: blocks compete
            across the projection.
    """

    projections: Mapping[str, BlockedProjection]
    rows: str

    def pools(self) -> list[Pool]:
        """Who competes with whom: blocks of one row, or of one projection."""
        return [
            Pool(
                ((name, 0, one.num_blocks),),
                one.num_kept,
                num_rows=one.grid[0] if self.rows == "balanced" else 1,
            )
            for name, one in self.projections.items()
        ]

    @property
    def density(self) -> float:
        """Share of the parameters of all projections that stays."""
        kept = sum(one.num_kept * one.area for one in self.projections.values())
        return kept / sum(one.num_blocks * one.area for one in self.projections.values())


def map_blocks(model: PreTrainedModel, rule: WeightBlocks) -> BlockMap:
    """Cut every projection that the rule names into blocks; works on the meta device too.

    Counts are rounded up or down so that the kept parameters of all projections follow the wanted
    share as closely as whole blocks (balanced: whole blocks in every row) allow.

    Raises:
        InputError: The family has no table, a projection is no `nn.Linear`, none of the blocks fits
            it, or whole blocks are too coarse for the wanted sparsity.
    """
    found: dict[str, BlockedProjection] = {}
    wanted = kept = 0.0
    for name, branch, module in _projections(model, rule):
        block = _fitting_block(rule.block, name, module)
        rows, columns = module.out_features // block[0], module.in_features // block[1]
        step, count = (rows, columns) if rule.rows == "balanced" else (1, rows * columns)
        area = block[0] * block[1]
        wanted += (1 - rule.sparsity) * rows * columns * area
        # the nearest count, and what earlier projections gave or took is made up for
        num_kept = step * min(count, max(1, round((wanted - kept) / (step * area))))
        kept += num_kept * area
        found[name] = BlockedProjection(
            name, branch, module.out_features, module.in_features, block, num_kept
        )
    block_map = BlockMap(found, rule.rows)
    if abs(1 - block_map.density - rule.sparsity) > TOLERANCE:
        raise InputError(
            f"prune.weight_blocks.sparsity: {rule.sparsity:g} can't be met within {TOLERANCE:g} by "
            f"whole blocks, got {1 - block_map.density:.3f}; take a smaller block"
            + (", or rows: free" if rule.rows == "balanced" else "")
        )
    return block_map


def _projections(
    model: PreTrainedModel, rule: WeightBlocks
) -> Iterator[tuple[str, Branch, nn.Linear]]:
    unit_map = map_units(model)
    for parameter in unit_map.parameters:
        if parameter.branch not in rule.modules or len(parameter.shape) != 2:
            continue
        name = parameter.name.removesuffix(".weight")
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise InputError(
                f"prune.weight_blocks needs projections that are nn.Linear, {name} is a "
                f"{type(module).__name__}; choose a model of another family"
            )
        yield name, parameter.branch, module


def _fitting_block(block: tuple[int, int], name: str, module: nn.Linear) -> tuple[int, int]:
    rows, columns = block
    shapes = [(r, c) for r in BLOCK_SIDES for c in BLOCK_SIDES if r * c <= rows * columns]
    # of equal area the one nearest to the wanted shape
    shapes.sort(key=lambda shape: (-shape[0] * shape[1], abs(shape[0] - rows)))
    for shape in [block, *shapes]:
        if module.out_features % shape[0] == 0 and module.in_features % shape[1] == 0:
            return shape
    raise InputError(
        f"prune.weight_blocks.block: no block of at most {rows * columns} parameters with sides of "
        f"{', '.join(map(str, BLOCK_SIDES))} divides {name}, "
        f"{module.out_features}x{module.in_features}"
    )


@dataclass(frozen=True)
class BlockPlan:
    """Which blocks stay.

    Attributes:
        blocks: Projection -> (rows, columns) of its blocks.
        keep_masks: Projection -> bool, shape (block rows, block columns), True = stays.
    """

    blocks: Mapping[str, tuple[int, int]]
    keep_masks: Mapping[str, Tensor]

    @property
    def density(self) -> float:
        """Share of the parameters of all projections that stays."""
        areas = {name: block[0] * block[1] for name, block in self.blocks.items()}
        kept = sum(int(mask.sum()) * areas[name] for name, mask in self.keep_masks.items())
        return kept / sum(mask.numel() * areas[name] for name, mask in self.keep_masks.items())

    def indices(self) -> dict[str, BlockIndex]:
        """The index of every projection."""
        return {name: BlockIndex.from_mask(mask) for name, mask in self.keep_masks.items()}

    def validate(self, model: nn.Module) -> None:
        """Check that the plan fits a model.

        Raises:
            InputError: A projection is missing or has another shape.
        """
        for name, mask in self.keep_masks.items():
            try:
                weight = weight_of(model, name)
            except AttributeError as error:
                raise InputError(f"block plan: {name} must be a projection of the model") from error
            shape = tuple(
                count * side for count, side in zip(mask.shape, self.blocks[name], strict=True)
            )
            if tuple(weight.shape) != shape:
                raise InputError(
                    f"block plan: {name} must be of shape {shape}, got {tuple(weight.shape)}"
                )

    def to_json(self) -> str:
        """JSON, one projection a line: its block and the kept columns of every block row."""
        rows = []
        for name, mask in self.keep_masks.items():
            kept = [row.nonzero().flatten().tolist() for row in mask]
            entry = {"block": list(self.blocks[name]), "columns": mask.shape[1], "kept": kept}
            rows.append(f"{json.dumps(name)}: {json.dumps(entry)}")
        head = f'{{\n"format": {json.dumps(PLAN_FORMAT)},\n"projections": {{\n'
        return head + ",\n".join(rows) + "\n}\n}\n"

    @staticmethod
    def from_json(text: str, *, name: str = "block plan") -> BlockPlan:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is not that; `name` begins the message.
        """
        try:
            data = json.loads(text)
            written = data["format"]
            blocks = {
                key: _pair(entry["block"]) for key, entry in data.get("projections", {}).items()
            }
            masks = {
                key: _mask_of(entry["kept"], entry["columns"])
                for key, entry in data.get("projections", {}).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{name}: must be a block plan, got: {error!r}") from error
        if written != PLAN_FORMAT or not masks:
            raise InputError(f"{name}: must be a plan of format {PLAN_FORMAT!r}, got {written!r}")
        return BlockPlan(blocks, masks)

    @staticmethod
    def read(path: Path) -> BlockPlan:
        """Read a plan file; errors as `from_json`."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: a plan must be a readable file, got: {error}") from error
        return BlockPlan.from_json(text, name=str(path))


def choose_blocks(unit_scores: UnitScores, block_map: BlockMap) -> BlockPlan:
    """The plan that keeps the best blocks in the counts that the map names; pure.

    Raises:
        InputError: Scores are missing for a projection.
    """
    masks = {}
    for name, one in block_map.projections.items():
        if len(unit_scores.scores.get(name, ())) != one.num_blocks:
            raise InputError(f"scores: must hold {one.num_blocks} scores for {name}")
        ranks = unit_scores.order([name])[name]
        num_rows = one.grid[0] if block_map.rows == "balanced" else 1
        rows = ranks.view(num_rows, -1)
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        mask.scatter_(1, rows.topk(one.num_kept // num_rows, dim=1).indices, True)
        masks[name] = mask.view(one.grid)
    blocks = {name: one.block for name, one in block_map.projections.items()}
    return BlockPlan(blocks, masks)


@torch.no_grad()
def zero_blocks(model: nn.Module, plan: BlockPlan) -> None:
    """Set every block that the plan drops to zero, in place.

    Raises:
        InputError: The plan is not for this model.
    """
    plan.validate(model)
    for name, mask in plan.keep_masks.items():
        weight = weight_of(model, name)
        weight.mul_(expand(mask.to(weight), plan.blocks[name]))


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The weight of a projection; an AttributeError where there is none of that name."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter), name
    return weight


def expand(values: Tensor, block: tuple[int, int]) -> Tensor:
    """A value per block -> the same per weight; differentiable.

    Args:
        values: Shape (block rows, block columns).
        block: (rows, columns).

    Returns:
        Shape (block rows * rows, block columns * columns).
    """
    return values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def _pair(values: Any) -> tuple[int, int]:
    rows, columns = (int(value) for value in values)
    return rows, columns


def _mask_of(kept: list[list[int]], columns: int) -> Tensor:
    mask = torch.zeros(len(kept), columns, dtype=torch.bool)
    for row, indices in enumerate(kept):
        if any(not 0 <= index < columns for index in indices):
            raise ValueError(f"columns must be in [0, {columns}), got {indices}")
        mask[row, indices] = True
    return mask
