"""The operators: `torch.library` custom ops with shapes, gradients and FLOPs, opaque to compilers.

A functional operator on plain tensors, so that `torch.compile` and `torch.export` keep it as one
node; which kernel runs is decided inside, where the number of rows is a number. Calling one costs
as much as the product of a small layer and one token; where nobody would see it, it is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from llmprune_kernels import cpu, native, products, reference
from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.dispatch import Backend, choose_backend, is_outrun
from llmprune_kernels.work import Work


def block_sparse_linear(
    x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias for a weight of which only blocks are stored; differentiable.

    Args:
        x: Shape (..., in_features), float32, bfloat16, float16 or float64.
        values: The stored blocks, shape (num_blocks, rows, columns), of x's dtype.
        index: Where they are.
        bias: Shape (out_features,).

    Returns:
        Shape (..., out_features). Under autocast, in its dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    if _is_plain(x, values, bias):
        _check(x, values, index, bias)
        return products.linear(x, values, index, bias)
    x, values, bias = _cast(x, values, bias)
    _check(x, values, index, bias)
    return torch.ops.llmprune.block_sparse_linear(x, values, bias, *_flat(index))


def block_sparse_swiglu(
    x: Tensor, gate: Tensor, gate_index: BlockIndex, up: Tensor, up_index: BlockIndex
) -> Tensor:
    """silu(x Wg^T) * (x Wu^T), joined in one or two kernels; differentiable.

    Args:
        x: Shape (..., in_features).
        gate: Stored blocks of Wg, shape (num_blocks, rows, columns).
        gate_index: Where they are.
        up: Stored blocks of Wu; their number and places may differ from the gate's.
        up_index: Where they are. The same object as `gate_index` where both are tied.

    Returns:
        Shape (..., out_features).

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    if _is_plain(x, gate, up):
        _check_pair(x, gate, gate_index, up, up_index)
        return products.swiglu(x, gate, gate_index, up, up_index)
    x, gate, up = _cast(x, gate, up)
    _check_pair(x, gate, gate_index, up, up_index)
    return torch.ops.llmprune.block_sparse_swiglu(x, gate, up, *_flat(gate_index), *_flat(up_index))


def _flat(index: BlockIndex) -> tuple[Any, ...]:
    return (*index.tensors().values(), index.max_per_row, index.max_per_column)


def _cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return (x.to(dtype), *(None if one is None else one.to(dtype) for one in others))


def _check(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None) -> None:
    in_features = index.block_columns * values.shape[2]
    if x.shape[-1] != in_features:
        raise ValueError(f"x must end in {in_features} features, got shape {tuple(x.shape)}")
    if values.shape[0] != index.num_blocks:
        raise ValueError(f"values must hold {index.num_blocks} blocks, got {values.shape[0]}")
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"x, values and bias must share a dtype, got {x.dtype}, {values.dtype}")


def _check_pair(
    x: Tensor, gate: Tensor, gate_index: BlockIndex, up: Tensor, up_index: BlockIndex
) -> None:
    _check(x, gate, gate_index, None)
    _check(x, up, up_index, None)
    if gate_index.block_rows * gate.shape[1] != up_index.block_rows * up.shape[1]:
        raise ValueError("gate and up must have equally many out_features")


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether numbers on a CPU or GPU are all a call is about, and nothing watches operators.

    No gradient, autocast, compiler, trace, mode, function transform or subclass.
    """
    if is_watched():
        return False
    learns = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            not (tensor.is_cpu or tensor.is_cuda)
            or type(tensor) not in (Tensor, Parameter)
            or (learns and tensor.requires_grad)
        ):
            return False
    return True


def is_watched() -> bool:
    """Whether a compiler, trace, autocast, mode or function transform wants to see operators."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


# the index in the flat form that an operator's schema can express
@torch.library.custom_op("llmprune::block_sparse_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col: Tensor,
    row: Tensor,
    t_ptr: Tensor,
    t_row: Tensor,
    t_idx: Tensor,
    max_per_row: int,
    max_per_column: int,
) -> Tensor:
    index = BlockIndex(row_ptr, col, row, t_ptr, t_row, t_idx, max_per_row, max_per_column)
    return products.linear(x, values, index, bias)


@_linear_op.register_fake
def _(x, values, bias, row_ptr, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], (row_ptr.shape[0] - 1) * values.shape[1])


@torch.library.custom_op("llmprune::block_sparse_grad_input", mutates_args=())
def _grad_input(
    dy: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    row: Tensor,
    t_ptr: Tensor,
    t_row: Tensor,
    t_idx: Tensor,
    max_per_row: int,
    max_per_column: int,
) -> Tensor:
    index = BlockIndex(row_ptr, col, row, t_ptr, t_row, t_idx, max_per_row, max_per_column)
    flat = dy.reshape(-1, dy.shape[-1])
    if dy.device.type == "cpu":
        compiled = native.is_available() and native.supports(dy.dtype)
        compiled = compiled and not is_outrun(_transposed_work(flat, values, index))
        dx = (native if compiled else cpu).grad_input(flat, values, index)
    elif choose_backend(_transposed_work(flat, values, index)).backend == "triton":
        from llmprune_kernels.gradients import grad_input

        dx = grad_input(flat, values, index)
    else:
        dx = flat @ products.dense_weight(values, index)
    return dx.reshape(*dy.shape[:-1], dx.shape[-1])


@_grad_input.register_fake
def _(dy, values, row_ptr, col, row, t_ptr, *rest):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:-1], (t_ptr.shape[0] - 1) * values.shape[2])


@torch.library.custom_op("llmprune::block_sparse_grad_values", mutates_args=())
def _grad_values(
    dy: Tensor,
    x: Tensor,
    rows: int,
    columns: int,
    row_ptr: Tensor,
    col: Tensor,
    row: Tensor,
    t_ptr: Tensor,
    t_row: Tensor,
    t_idx: Tensor,
    max_per_row: int,
    max_per_column: int,
) -> Tensor:
    index = BlockIndex(row_ptr, col, row, t_ptr, t_row, t_idx, max_per_row, max_per_column)
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.device.type == "cpu":
        return cpu.grad_values(flat_dy, flat_x, index, (rows, columns))
    if choose_backend(_grad_work(flat_x, index, rows, columns)).backend == "triton":
        from llmprune_kernels.gradients import grad_values

        return grad_values(flat_dy, flat_x, index, (rows, columns))
    return reference.grad_values(flat_dy, flat_x, index, (rows, columns))


@_grad_values.register_fake
def _(dy, x, rows, columns, row_ptr, col, row, *rest):  # type: ignore[no-untyped-def]
    return dy.new_empty(row.shape[0], rows, columns)


def _grad_work(x: Tensor, index: BlockIndex, rows: int, columns: int) -> Work:
    sizes = (x.shape[1], index.block_rows * rows)
    return Work(x.device.type, x.dtype, x.shape[0], *sizes, (rows, columns), index.density)


def _transposed_work(dy: Tensor, values: Tensor, index: BlockIndex) -> Work:
    """Of the gradient of the input: its output side is the block's columns."""
    rows, columns = values.shape[1:]
    sizes = (index.block_rows * rows, index.block_columns * columns)
    return Work(dy.device.type, dy.dtype, dy.shape[0], *sizes, (columns, rows), index.density)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, *index = inputs
    ctx.save_for_backward(x, values, *index[:6])
    ctx.sizes = index[6:]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, *index = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dv = db = None
    if needs_x:
        dx = torch.ops.llmprune.block_sparse_grad_input(dy, values, *index, *ctx.sizes)
    if needs_values:
        rows, columns = values.shape[1:]
        dv = torch.ops.llmprune.block_sparse_grad_values(dy, x, rows, columns, *index, *ctx.sizes)
    if ctx.has_bias and needs_bias:
        db = dy.reshape(-1, dy.shape[-1]).sum(0)
    return (dx, dv, db, *[None] * 8)


_linear_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("llmprune::block_sparse_swiglu", mutates_args=())
def _swiglu_op(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    g_row_ptr: Tensor,
    g_col: Tensor,
    g_row: Tensor,
    g_t_ptr: Tensor,
    g_t_row: Tensor,
    g_t_idx: Tensor,
    g_max_per_row: int,
    g_max_per_column: int,
    u_row_ptr: Tensor,
    u_col: Tensor,
    u_row: Tensor,
    u_t_ptr: Tensor,
    u_t_row: Tensor,
    u_t_idx: Tensor,
    u_max_per_row: int,
    u_max_per_column: int,
) -> Tensor:
    gate_index = BlockIndex(
        g_row_ptr, g_col, g_row, g_t_ptr, g_t_row, g_t_idx, g_max_per_row, g_max_per_column
    )
    up_index = BlockIndex(
        u_row_ptr, u_col, u_row, u_t_ptr, u_t_row, u_t_idx, u_max_per_row, u_max_per_column
    )
    return products.swiglu(x, gate, gate_index, up, up_index)


@_swiglu_op.register_fake
def _(x, gate, up, g_row_ptr, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], (g_row_ptr.shape[0] - 1) * gate.shape[1])


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, up, *index = inputs
    ctx.save_for_backward(x, gate, up, *index[:6], *index[8:14])
    ctx.sizes = (index[6:8], index[14:16])


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Both products are computed again: keeping them would cost what fusing saves."""
    x, gate, up, *tensors = ctx.saved_tensors
    gate_index, up_index = (*tensors[:6], *ctx.sizes[0]), (*tensors[6:], *ctx.sizes[1])
    ops = torch.ops.llmprune
    opened = ops.block_sparse_linear(x, gate, None, *gate_index)
    raised = ops.block_sparse_linear(x, up, None, *up_index)
    sigmoid = torch.sigmoid(opened)
    d_up = dy * opened * sigmoid
    d_gate = dy * raised * sigmoid * (1 + opened * (1 - sigmoid))
    needs_x, needs_gate, needs_up = ctx.needs_input_grad[:3]
    dx = d_gate_values = d_up_values = None
    if needs_x:
        dx = ops.block_sparse_grad_input(d_gate, gate, *gate_index)
        dx = dx + ops.block_sparse_grad_input(d_up, up, *up_index)
    if needs_gate:
        d_gate_values = ops.block_sparse_grad_values(d_gate, x, *gate.shape[1:], *gate_index)
    if needs_up:
        d_up_values = ops.block_sparse_grad_values(d_up, x, *up.shape[1:], *up_index)
    return (dx, d_gate_values, d_up_values, *[None] * 16)


_swiglu_op.register_autograd(_swiglu_backward, setup_context=_save_swiglu)


def _rows_of(shape: torch.Size) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


@register_flop_formula(torch.ops.llmprune.block_sparse_linear)
def _(x_shape, values_shape, *rest, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * _rows_of(x_shape) * values_shape.numel()


@register_flop_formula(torch.ops.llmprune.block_sparse_grad_input)
def _(dy_shape, values_shape, *rest, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * _rows_of(dy_shape) * values_shape.numel()


@register_flop_formula(torch.ops.llmprune.block_sparse_grad_values)
def _(dy_shape, *rest, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * _rows_of(dy_shape) * out_shape.numel()


@register_flop_formula(torch.ops.llmprune.block_sparse_swiglu)
def _(x_shape, gate_shape, up_shape, *rest, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    return 2 * _rows_of(x_shape) * (gate_shape.numel() + up_shape.numel())


__all__ = ["Backend", "block_sparse_linear", "block_sparse_swiglu"]
