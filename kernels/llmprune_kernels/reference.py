"""What every kernel computes, in plain PyTorch: the definition that the others are tested against.

Shapes: x (M, in_features), dy (M, out_features), values (num_blocks, rows, columns); any dtype,
float64 included.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from llmprune_kernels.bsr import BlockIndex, gather_blocks, scatter_blocks


def linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, shape (M, out_features)."""
    return functional.linear(x, scatter_blocks(values, index), bias)


def grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W, shape (M, in_features)."""
    return dy @ scatter_blocks(values, index)


def grad_values(dy: Tensor, x: Tensor, index: BlockIndex, block: tuple[int, int]) -> Tensor:
    """The stored blocks of dy^T x, shape (num_blocks, rows, columns)."""
    return gather_blocks(dy.T @ x, index, block)


def swiglu(
    x: Tensor, gate: Tensor, gate_index: BlockIndex, up: Tensor, up_index: BlockIndex
) -> Tensor:
    """silu(x Wg^T) * (x Wu^T), shape (M, out_features)."""
    return functional.silu(linear(x, gate, gate_index)) * linear(x, up, up_index)


def exact(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """`linear` of the given (rounded) numbers in float64, what errors are measured from."""
    wide = None if bias is None else bias.double()
    return linear(x.double(), values.double(), index, wide)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest wanted number."""
    scale = float(wanted.abs().max()) or 1.0
    return float((got.double() - wanted.double()).abs().max()) / scale
