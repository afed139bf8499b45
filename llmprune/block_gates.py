"""BlockGates: a gate on every block of some projections' weights.

Unlike a unit's gate, which multiplies what flows, this one multiplies the weight: the projection
computes with `weight * gate`, block by block. Closed gates are zeros in the weight, so the gated
model is the function of the model whose blocks are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.errors import InputError
from llmprune.weight_blocks import BlockedProjection, BlockMap, BlockPlan, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockGates:
    """The gate values of some projections' blocks, and the forwards that apply them.

    Attributes:
        values: Projection -> gate values, shape (num_blocks,), row by row; may carry a gradient. A
            projection that is not there is open.
    """

    def __init__(self, model: PreTrainedModel, block_map: BlockMap) -> None:
        """Puts the gates on; all are open."""
        self.block_map = block_map
        self.group_names = tuple(block_map.projections)
        self.values: dict[str, Tensor] = {}
        self._modules: dict[str, nn.Linear] = {}
        self._are_open = False
        for name, projection in block_map.projections.items():
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear), name
            self._modules[name] = module
            self._gate(name, module, projection)

    def _gate(self, name: str, module: nn.Linear, projection: BlockedProjection) -> None:
        def forward(x: Tensor) -> Tensor:
            value = None if self._are_open else self.values.get(name)
            if value is None:
                return functional.linear(x, module.weight, module.bias)
            return functional.linear(x, gated(module.weight, value, projection), module.bias)

        anything: Any = module
        anything.forward = forward

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take new values for some or all projections; the others keep theirs.

        Raises:
            InputError: A projection that has no gates, or a wrong number of values.
        """
        for name, value in values.items():
            if name not in self._modules:
                raise InputError(f"gates: {name} was not attached, only {list(self.group_names)}")
            expected = (self.block_map.projections[name].num_blocks,)
            if tuple(value.shape) != expected:
                raise InputError(f"gates: {name} takes shape {expected}, got {tuple(value.shape)}")
        self.values.update(values)

    def set_plan(self, plan: BlockPlan) -> None:
        """Close what the plan drops, open the rest."""
        self.set({name: mask.flatten().double() for name, mask in plan.keep_masks.items()})

    @contextmanager
    def opened(self) -> Iterator[None]:
        """All gates open inside the block."""
        were_open, self._are_open = self._are_open, True
        try:
            yield
        finally:
            self._are_open = were_open

    def magnitudes(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The Frobenius norm of every block of the model's weights, float64."""
        return {
            name: block_norms(weight_of(model, name), projection)
            for name, projection in self.block_map.projections.items()
        }

    def detach(self) -> None:
        """Take the gates off; weights are as they were."""
        for module in self._modules.values():
            module.__dict__.pop("forward", None)


def gated(weight: Tensor, value: Tensor, projection: BlockedProjection) -> Tensor:
    """The weight times a gate per block (num_blocks,), in the weight's dtype."""
    (rows, columns), (height, width) = projection.grid, projection.block
    gate = value.to(weight).view(rows, 1, columns, 1)
    return (weight.view(rows, height, columns, width) * gate).view(weight.shape)


@torch.no_grad()
def block_norms(weight: Tensor, projection: BlockedProjection) -> Tensor:
    """Frobenius norm of every block, float64, shape (num_blocks,), on the CPU."""
    return block_sums(weight.double().square(), projection).sqrt().cpu()


def block_sums(matrix: Tensor, projection: BlockedProjection) -> Tensor:
    """Sum over every block of a matrix of the weight's shape, shape (num_blocks,)."""
    (rows, columns), (height, width) = projection.grid, projection.block
    return matrix.view(rows, height, columns, width).sum((1, 3)).flatten()
