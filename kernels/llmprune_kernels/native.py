"""The C++ products of `native/`, for float32, bfloat16 and float16.

x W^T, its fused SwiGLU, a whole gated MLP, and dy W.

They are compiled when they are first needed, by the compiler that CXX names or the first of c++,
g++ and clang++, and kept in a cache folder. Without a compiler, or where the build fails, one
warning says so and `is_available` is False from then on. `LLMPRUNE_KERNELS_NATIVE=0` switches them
off. They are called with plain pointers and know nothing of autograd: `ops` does.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune_kernels import native_build
from llmprune_kernels.bsr import BLOCK_SIDES, BlockIndex

# The stored blocks of a weight, and where they are.
Weight = tuple[Tensor, BlockIndex]
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_NO_MEMORY = 1
# Below this many multiply-adds a second thread costs more than it brings: 10 us on one.
_MIN_THREADED_WORK = 1 << 18
_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_HEAD = [_INT] * 3 + [_POINTER] + [_SIZE] * 6
_SIGNATURES = {
    "llmprune_linear": [*_HEAD, *[_POINTER] * 5],
    "llmprune_linear_swiglu": [*_HEAD, *[_POINTER] * 7],
    "llmprune_gated_mlp": [*_HEAD, *[_POINTER] * 6, *[_SIZE] * 3, *[_POINTER] * 5],
    "llmprune_grad_input": [*_HEAD, *[_POINTER] * 5],
}


def is_available() -> bool:
    """Whether the C++ products can be used and are worth it; builds them on the first call."""
    # An x86 processor without AVX2 is left to PyTorch; elsewhere the portable code is wide enough.
    return _library() is not None and (_best() > 0 or platform.machine() not in ("x86_64", "AMD64"))


def supports(dtype: torch.dtype) -> bool:
    """Whether they can be used for numbers of this type."""
    return dtype in ELEMENTS and is_available()


def instruction_set() -> str:
    """The one in use, of INSTRUCTION_SETS; the best that the processor has.

    Raises:
        RuntimeError: There is no native library.
    """
    _loaded()
    return INSTRUCTION_SETS[_best()]


def uses_amx(dtype: torch.dtype) -> bool:
    """Whether products of this type run on tiles of the processor.

    Raises:
        RuntimeError: There is no native library.
    """
    return dtype == torch.bfloat16 and instruction_set() == "amx"


class Product(NamedTuple):
    """A C++ function with all arguments but x, the place of y, and what goes with the processor.

    `arguments` hold pointers: whoever keeps a product keeps the tensors that it was made of, and
    their memory. `numbers` of weights are multiplied.
    """

    function: str
    dtype: torch.dtype
    in_size: int
    out_size: int
    numbers: int
    arguments: tuple[int | None, ...]


def linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    *,
    using: str | None = None,
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: Shape (..., in_features), any strides.
        values: Shape (num_blocks, rows, columns), contiguous, of x's dtype.
        index: Where the blocks are.
        bias: Shape (out_features,), of x's dtype.
        using: One of INSTRUCTION_SETS, none above `instruction_set()`; that one if None.

    Returns:
        Shape (..., out_features), contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit.
        RuntimeError: There is no native library.
    """
    bias = None if bias is None else bias.contiguous()
    return run(linear_product(x.dtype, (values, index), bias), x, using=using)


def linear_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_index: BlockIndex,
    up: Tensor,
    up_index: BlockIndex,
    *,
    using: str | None = None,
) -> Tensor:
    """silu(x Wg^T) * (x Wu^T), rounded once, at the end.

    Both weights have one shape and are cut into blocks of one shape; which blocks are stored may
    differ. For the other arguments, results and errors see `linear`.
    """
    return run(_swiglu_product(x.dtype, (gate, gate_index), (up, up_index)), x, using=using)


def gated_mlp(
    x: Tensor,
    gate: Weight,
    up: Weight,
    down: Weight,
    bias: Tensor | None = None,
    *,
    using: str | None = None,
) -> Tensor:
    """y = (silu(x Wg^T) * (x Wu^T)) Wd^T + bias, with the bits of `linear_swiglu` and `linear`.

    What is between the products is rounded to x's dtype as it is by those. For many rows it is
    never whole in memory.

    Args:
        x: Shape (..., hidden_size), any strides.
        gate: Values and index, as for `linear`.
        up: A weight of the gate's shape, in blocks of one shape with the gate's.
        down: A weight of shape (out_features, intermediate_size), in any blocks.
        bias: Shape (out_features,), of x's dtype.
        using: As for `linear`.

    Returns:
        Shape (..., out_features), contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit.
        RuntimeError: There is no native library.
    """
    bias = None if bias is None else bias.contiguous()
    return run(gated_mlp_product(x.dtype, gate, up, down, bias), x, using=using)


def linear_product(dtype: torch.dtype, weight: Weight, bias: Tensor | None = None) -> Product:
    """`linear` for x of a dtype; errors are its own, and the bias must be contiguous."""
    rows, columns = _check_weight(*weight, dtype)
    values, index = weight
    block_rows = index.block_rows
    sizes = (block_rows * rows, values.numel())
    arguments = (block_rows, rows, columns, *_pointers(weight), _bias(bias, sizes[0], dtype))
    return Product("llmprune_linear", dtype, index.block_columns * columns, *sizes, arguments)


def gated_mlp_product(
    dtype: torch.dtype, gate: Weight, up: Weight, down: Weight, bias: Tensor | None = None
) -> Product:
    """`gated_mlp` for x of a dtype; errors are its own, and the bias must be contiguous."""
    opening, closing = _swiglu_product(dtype, gate, up), linear_product(dtype, down, bias)
    if opening.out_size != closing.in_size:
        raise ValueError(
            "down must have as many in_features as gate and up have out_features, "
            f"{opening.out_size}, got {closing.in_size}"
        )
    sizes = (opening.in_size, closing.out_size, opening.numbers + closing.numbers)
    arguments = (*opening.arguments, *closing.arguments)
    return Product("llmprune_gated_mlp", dtype, *sizes, arguments)


def _swiglu_product(dtype: torch.dtype, gate: Weight, up: Weight) -> Product:
    rows, columns = block = _check_weight(*gate, dtype)
    block_rows, block_columns = shape = (gate[1].block_rows, gate[1].block_columns)
    if _check_weight(*up, dtype) != block or (up[1].block_rows, up[1].block_columns) != shape:
        raise ValueError(
            f"gate and up must have one shape and one block, got {block_rows}x{block_columns} and "
            f"{up[1].block_rows}x{up[1].block_columns} of the blocks {block} and "
            f"{tuple(up[0].shape[1:])}"
        )
    sizes = (block_columns * columns, block_rows * rows, gate[0].numel() + up[0].numel())
    arguments = (block_rows, rows, columns, *_pointers(gate), *_pointers(up))
    return Product("llmprune_linear_swiglu", dtype, *sizes, arguments)


def grad_input(
    dy: Tensor, values: Tensor, index: BlockIndex, *, using: str | None = None
) -> Tensor:
    """dx = dy W, shape (..., in_features); arguments and errors as for `linear`."""
    rows, columns = _check_weight(values, index, dy.dtype)
    sizes = (index.block_rows * rows, index.block_columns * columns, values.numel())
    pointers = (one.data_ptr() for one in (values, index.t_ptr, index.t_row, index.t_idx))
    arguments = (index.block_columns, rows, columns, *pointers)
    return run(Product("llmprune_grad_input", dy.dtype, *sizes, arguments), dy, using=using)


def run(product: Product, x: Tensor, *, using: str | None = None) -> Tensor:
    """y of x.

    Args:
        product: Made for x's dtype, of tensors that are still there.
        x: Shape (..., in_size), any strides.
        using: As for `linear`.

    Returns:
        Shape (..., out_size), contiguous.

    Raises:
        ValueError: x does not fit.
    """
    function, dtype, in_size, out_size, numbers, arguments = product
    shape = x.shape
    if not shape or shape[-1] != in_size:
        raise ValueError(f"x must have shape (..., {in_size}), got {tuple(shape)}")
    if x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"x must be {dtype} on the CPU, got {x.dtype} on {x.device}")
    level = _best() if using is None else INSTRUCTION_SETS.index(using)
    if using is not None and level > _best():
        raise ValueError(f"using must be at most {INSTRUCTION_SETS[_best()]!r}, got {using!r}")
    y = x.new_empty(*shape[:-1], out_size)
    num_rows, x_stride = x.numel() // in_size, in_size
    if num_rows == 0:
        return y
    if not x.is_contiguous():
        x = x.reshape(num_rows, in_size)
        x = x if x.stride(1) == 1 else x.contiguous()
        x_stride = x.stride(0)
    threads = torch.get_num_threads() if num_rows * numbers >= _MIN_THREADED_WORK else 1
    head = (ELEMENTS[dtype], level, threads, x.data_ptr(), x_stride, num_rows, in_size)
    status = getattr(_loaded(), function)(*head, *arguments, y.data_ptr())
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory to pack {num_rows} rows of {in_size} numbers")
    if status:
        raise ValueError(f"{dtype} needs more than {INSTRUCTION_SETS[level]} instructions")
    return y


def _pointers(weight: Weight) -> tuple[int, int, int]:
    return weight[0].data_ptr(), weight[1].row_ptr.data_ptr(), weight[1].col.data_ptr()


def _check_weight(values: Tensor, index: BlockIndex, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a block, when C++ can read them as numbers of x's dtype."""
    if values.dtype != dtype or dtype not in ELEMENTS:
        raise ValueError(
            "x and values must be of one dtype, float32, bfloat16 or float16, got "
            f"{dtype} and {values.dtype}"
        )
    if not (values.is_cpu and index.row_ptr.is_cpu):
        raise ValueError(
            f"values and index must be on the CPU, got {values.device}, {index.row_ptr.device}"
        )
    num_blocks, rows, columns = values.shape
    if num_blocks != index.num_blocks or not values.is_contiguous():
        raise ValueError(
            f"values must be {index.num_blocks} contiguous blocks, got shape "
            f"{tuple(values.shape)} with strides {values.stride()}"
        )
    if rows not in BLOCK_SIDES or columns not in BLOCK_SIDES:
        raise ValueError(f"block sides must be of {BLOCK_SIDES}, got {(rows, columns)}")
    return rows, columns


def _bias(bias: Tensor | None, out_features: int, dtype: torch.dtype) -> int | None:
    """Where it is, if there is one that C++ can add."""
    if bias is None:
        return None
    if (
        bias.shape != (out_features,)
        or bias.dtype != dtype
        or not (bias.is_cpu and bias.is_contiguous())
    ):
        raise ValueError(
            f"bias must be {dtype} of shape ({out_features},), contiguous and on the CPU, got "
            f"{bias.dtype} of shape {tuple(bias.shape)} with strides {bias.stride()} on "
            f"{bias.device}"
        )
    return bias.data_ptr()


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError(
            "there is no native library: it is switched off (LLMPRUNE_KERNELS_NATIVE=0) or could "
            "not be built; use llmprune_kernels.cpu.linear"
        )
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, built if need be; None, with a warning if that was not asked for, if not."""
    if native_build.is_switched_off():
        return None
    try:
        library = native_build.load()
    except native_build.BuildError as error:
        warnings.warn(
            f"llmprune_kernels: no native CPU kernels, slower PyTorch ways are used: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library


@functools.cache
def _best() -> int:
    return int(_loaded().llmprune_instruction_set())
