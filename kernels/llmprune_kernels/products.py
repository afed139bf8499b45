"""Products by the backend that is chosen for them: plain functions, which know nothing of autograd.

`ops` makes operators of them, and calls them as they are where nothing would see an operator.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from llmprune_kernels import cpu, native, reference
from llmprune_kernels.bsr import BlockIndex, scatter_blocks
from llmprune_kernels.dispatch import Choice, choose_backend
from llmprune_kernels.gpu_speed import DECODE_ROWS
from llmprune_kernels.tiles import MAX_DECODE_TOKENS
from llmprune_kernels.triton_runtime import has_triton
from llmprune_kernels.work import Work


def linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, shape (..., out_features); arguments as for `ops.block_sparse_linear`."""
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], index.block_rows * values.shape[1])
    choice = choose_backend(Work.of(x, values, index))
    backend = choice.backend
    if backend == "native":
        return native.linear(x, values, index, bias)
    flat = _as_matrix(x)
    if backend == "reference":
        y = reference.linear(flat, values, index, bias)
    elif backend == "pytorch":
        y = cpu.linear(flat, values, index, bias)
    elif backend == "triton":
        y = _by_triton(choice, flat, values, index, bias)
    else:
        y = functional.linear(flat, dense_weight(values, index), bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def swiglu(
    x: Tensor, gate: Tensor, gate_index: BlockIndex, up: Tensor, up_index: BlockIndex
) -> Tensor:
    """silu(x Wg^T) * (x Wu^T); arguments as for `ops.block_sparse_swiglu`."""
    if x.numel() and gate.shape[1:] == up.shape[1:]:
        choices = [choose_backend(Work.of(x, gate, gate_index))]
        if up.shape == gate.shape:
            choices *= 2
        else:
            choices.append(choose_backend(Work.of(x, up, up_index)))
        backends = {choice.backend for choice in choices}
        if backends == {"native"}:
            return native.linear_swiglu(x, gate, gate_index, up, up_index)
        if backends == {"triton"}:
            y = _swiglu_by_triton(choices, _as_matrix(x), gate, gate_index, up, up_index)
            return y.reshape(*x.shape[:-1], y.shape[-1])
    opened = functional.silu(linear(x, gate, gate_index, None))
    return opened * linear(x, up, up_index, None)


def dense_weight(values: Tensor, index: BlockIndex) -> Tensor:
    """The dense weight of stored blocks, written anew: nothing that was kept can be out of date."""
    if values.device.type == "cpu" or not has_triton():
        return scatter_blocks(values, index)
    from llmprune_kernels.densify import densify

    return densify(values, index)


def _as_matrix(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _by_triton(
    choice: Choice, x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None
) -> Tensor:
    from llmprune_kernels import decode, matmul, tma

    # without a kernel, the environment named the backend
    kernel = choice.kernel or ("decode" if x.shape[0] <= DECODE_ROWS else "matmul")
    if kernel == "decode":
        return decode.linear(x, values, index, bias)
    if kernel == "tma" and not tma.obstacle(x, values):
        return tma.linear(x, values, index, bias)
    return matmul.linear(x, values, index, bias)


def _swiglu_by_triton(
    choices: list[Choice],
    x: Tensor,
    gate: Tensor,
    gate_index: BlockIndex,
    up: Tensor,
    up_index: BlockIndex,
) -> Tensor:
    """In one launch; for many tokens where bulk copies are faster, in two, the second gates."""
    from llmprune_kernels import swiglu, tma

    bulky = x.shape[0] > MAX_DECODE_TOKENS and all(one.kernel == "tma" for one in choices)
    if bulky and not (tma.obstacle(x, gate) or tma.obstacle(x, up)):
        opening = tma.linear(x, gate, gate_index)
        return tma.linear(x, up, up_index, gate=opening)
    return swiglu.linear_swiglu(x, gate, gate_index, up, up_index)
