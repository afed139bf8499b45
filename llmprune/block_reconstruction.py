"""Least-squares refit of projections whose blocks are zero, on the pruned model's own activations.

What `llmprune.reconstruction` does for the projections that write to the residual stream, for every
projection in blocks: what reads the stream (gate, up, query, key, value) is moved to where its
output is nearest to the dense projection's, what writes to it to where the stream is nearest to
what the dense layer makes of the same stream. Blocks that are zero stay zero: every block row is a
ridge regression on the inputs that it still reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.reconstruction import OnLayer
from llmprune.streams import Streams
from llmprune.units import Branch, UnitMap
from llmprune.weight_blocks import BlockPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def reconstruct_blocks(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    unit_map: UnitMap,
    plan: BlockPlan,
    *,
    batches: Sequence[Tensor],
    ridge: float = 1e-3,
    on_layer: OnLayer = lambda done, total: None,
) -> None:
    """Refit every projection that the plan names, in place.

    Args:
        pruned: The dense model with the plan's blocks set to zero.
        dense: The model before that, on the same device.
        unit_map: Of the dense model.
        plan: Which blocks stay.
        batches: Calibration rows, each of shape (batch, length), all alike, int64
            (`streams.even_batches` makes them).
        ridge: Pull towards the weights as they are, as a share of the mean squared input.
        on_layer: Called after every layer.
    """
    architecture = unit_map.architecture
    dense_streams = Streams(dense, architecture.layers, batches)
    streams = Streams(pruned, architecture.layers, batches)
    for index in range(unit_map.num_layers):
        prefix = f"{architecture.layers}.{index}"
        layer = pruned.get_submodule(prefix)
        wanted = dense_streams.advance_dense(index, architecture.attention.write)
        branches: tuple[Branch, Branch] = ("attention", "mlp")
        for branch, targets in zip(branches, wanted, strict=True):
            sublayer = getattr(architecture, branch)
            written = f"{prefix}.{sublayer.write}"
            own_names = _projections_of(unit_map, index, branch)
            reading = [name for name in own_names if name in plan.blocks and name != written]
            if reading:
                # all of them read the same: the normed stream
                first = pruned.get_submodule(reading[0])
                inputs = streams.read(layer, index, branch, sublayer, first)
                gram = _gram(inputs)
            for name in reading:
                own: Any = pruned.get_submodule(name)
                lost = dense.get_submodule(name).weight.double() - own.weight.double()
                _refit(own, name, plan, gram, gram @ lost.T, ridge)
            write: Any = pruned.get_submodule(written)
            inputs = streams.read(layer, index, branch, sublayer, write)
            if written in plan.blocks:
                gram = _gram(inputs)
                cross = sum(
                    value.flatten(0, -2).double().T
                    @ (target - stream - write(value)).flatten(0, -2).double()
                    for value, stream, target in zip(inputs, streams.values, targets, strict=True)
                )
                _refit(write, written, plan, gram, cross, ridge)
            streams.add([write(value) for value in inputs])
        dense_streams.values = list(streams.values)
        on_layer(index + 1, unit_map.num_layers)


def _projections_of(unit_map: UnitMap, layer: int, branch: Branch) -> list[str]:
    return [
        parameter.name.removesuffix(".weight")
        for parameter in unit_map.parameters
        if parameter.layer == layer and parameter.branch == branch and len(parameter.shape) == 2
    ]


def _gram(inputs: Sequence[Tensor]) -> Tensor:
    """X^T X over all tokens, shape (width, width), float64."""
    width = inputs[0].shape[-1]
    gram = inputs[0].new_zeros(width, width, dtype=torch.float64)
    for value in inputs:
        exact = value.flatten(0, -2).double()
        gram.addmm_(exact.T, exact)
    return gram


def _refit(
    projection: Any, name: str, plan: BlockPlan, gram: Tensor, cross: Tensor, ridge: float
) -> None:
    """Move the blocks that stay: for every block row, on the inputs that it reads.

    Args:
        projection: An `nn.Linear` with zeros where the plan has none.
        name: Its name in the plan.
        plan: Which blocks stay.
        gram: X^T X of its inputs, (in_features, in_features), float64.
        cross: X^T times what its outputs lack, (in_features, out_features), float64.
        ridge: As in `reconstruct_blocks`.
    """
    height, width = plan.blocks[name]
    pull = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * pull
    for row, kept in enumerate(plan.keep_masks[name].to(gram.device)):
        columns = kept.repeat_interleave(width).nonzero().flatten()
        if not len(columns):
            continue
        outputs = slice(row * height, (row + 1) * height)
        known = (gram + eye)[columns][:, columns]
        change = torch.linalg.solve(known, cross[columns, outputs])
        projection.weight[outputs, columns] += change.T.to(projection.weight)
