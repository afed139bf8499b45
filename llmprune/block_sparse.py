"""Swap nn.Linear for BlockSparseLinear where a checkpoint says which blocks are stored.

A model of zero blocks is an ordinary checkpoint; beside it, in a folder of its own where loaders
that take every safetensors file do not look, lies the index of its blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmprune.errors import InputError
from llmprune.files import save_tensors
from llmprune.pages import release
from llmprune.weight_blocks import BlockPlan
from llmprune_kernels import BlockIndex, BlockSparseLinear, BlockSparseMLP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Inside a model folder.
INDEX_FILE = Path("llmprune") / "block_index.safetensors"
# Tokens of a decode step and of a prompt.
TYPICAL_ROWS = (1, 512)
INDEX_FORMAT = "llmprune-block-index/1"


def save_block_index(plan: BlockPlan, model_folder: Path) -> None:
    """Write the index of every projection's blocks beside a saved model.

    Raises:
        InputError: The disk is full or the place can't be written.
    """
    tensors = {
        f"{name}.{key}": tensor
        for name, index in plan.indices().items()
        for key, tensor in index.to_saved().items()
    }
    note = {"format": INDEX_FORMAT, "blocks": json.dumps(dict(plan.blocks))}
    file = model_folder / INDEX_FILE
    file.parent.mkdir(exist_ok=True)
    save_tensors(tensors, file, note)


def read_block_index(file: Path) -> tuple[dict[str, BlockIndex], dict[str, tuple[int, int]]]:
    """The index and the block of every projection, as `save_block_index` wrote them.

    Raises:
        InputError: The file is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            note = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file.name}: is damaged ({error}); prune again") from error
    if note.get("format") != INDEX_FORMAT:
        raise InputError(
            f"{file.name}: format must be {INDEX_FORMAT!r}, got {note.get('format')!r}"
        )
    try:
        blocks = {name: (int(r), int(c)) for name, (r, c) in json.loads(note["blocks"]).items()}
        indices = {name: _index_of(name, tensors) for name in blocks}
    except (ValueError, KeyError) as error:
        raise InputError(f"{file.name}: {error}; prune again") from error
    return indices, blocks


def _index_of(name: str, tensors: Mapping[str, torch.Tensor]) -> BlockIndex:
    keys = ("row_ptr", "col", "shape")
    return BlockIndex.from_saved({key: tensors[f"{name}.{key}"] for key in keys}, name=name)


def make_block_sparse(
    model: PreTrainedModel,
    indices: Mapping[str, BlockIndex],
    blocks: Mapping[str, tuple[int, int]],
    *,
    just_loaded: bool = False,
) -> None:
    """Put a BlockSparseLinear in the place of every projection with an index, in place.

    Where gate and up of an MLP both become sparse and the activation is SiLU, the two products and
    what joins them become one.

    Args:
        model: Dense, with zeros.
        indices: Which blocks of a projection are stored, by its name.
        blocks: (rows, columns) of a block, by the same names.
        just_loaded: The dense weights are as their file has them and nobody else's, so that the
            pages of the file need not stay in memory once their blocks are copied.

    Raises:
        InputError: A projection is missing, has another shape, or is not zero outside its blocks.
    """
    for name, index in indices.items():
        block = blocks[name]
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"block index: {name} must be a projection of the model") from error
        shape = (index.block_rows * block[0], index.block_columns * block[1])
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
            raise InputError(
                f"block index: {name} must be an nn.Linear of shape {shape}, got {linear}"
            )
        sparse = BlockSparseLinear.from_dense(linear, index.to_mask())
        if int(linear.weight.count_nonzero()) != int(sparse.values.count_nonzero()):
            raise InputError(
                f"block index: {name} must be zero outside its {index.num_blocks} blocks, it is "
                "not; the weights have changed since, prune again"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse)
        if just_loaded:
            release(linear.weight)
    _fuse_mlps(model)


def keep_faster(model: nn.Module) -> None:
    """Keep dense copies in layers that blocks would slow down, for one token and for many.

    Moving a model to another kind of device drops them, so call this again there.
    """
    for layer in block_sparse_layers(model).values():
        choices = [layer.choice(rows) for rows in TYPICAL_ROWS]
        if all(choice.speedup is not None and choice.speedup < 1.0 for choice in choices):
            layer.keep_dense()


def make_dense(model: nn.Module) -> None:
    """Undo `make_block_sparse`, in place; weights that were trained meanwhile are kept."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BlockSparseLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_dense())


def block_sparse_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    """The block-sparse layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def _fuse_mlps(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        children = dict(module.named_children())
        gate, up = children.get("gate_proj"), children.get("up_proj")
        if set(children) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            continue
        if not isinstance(gate, BlockSparseLinear) or not isinstance(up, BlockSparseLinear):
            continue
        if "silu" not in type(module.act_fn).__name__.lower() or gate.bias is not None:
            continue
        parent, _, child = name.rpartition(".")
        fused = BlockSparseMLP(gate, up, module.down_proj).train(module.training)
        setattr(model.get_submodule(parent), child, fused)


__all__ = [
    "INDEX_FILE",
    "block_sparse_layers",
    "make_block_sparse",
    "make_dense",
    "read_block_index",
    "save_block_index",
]
