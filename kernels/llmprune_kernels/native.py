"""The C++ products of `native/`: x W^T, its fused SwiGLU and dy W, for float32, bfloat16, float16.

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

import torch
from torch import Tensor

from llmprune_kernels import native_build
from llmprune_kernels.bsr import BLOCK_SIDES, BlockIndex

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
    rows, columns = _check(x, values, index, columns=True)
    out_features = index.block_rows * rows
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be {x.dtype} of shape ({out_features},), got {bias.dtype} of shape "
            f"{tuple(bias.shape)}"
        )
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    tensors = (values, index.row_ptr, index.col, bias, y)
    _call("llmprune_linear", x, using, (index.block_rows, rows, columns), values.numel(), tensors)
    return y


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
    rows, columns = block = _check(x, gate, gate_index, columns=True)
    if (
        _check(x, up, up_index, columns=True) != block
        or gate_index.block_rows != up_index.block_rows
    ):
        raise ValueError(
            "gate and up must have one shape and one block, got blocks "
            f"{tuple(gate.shape[1:])} and {tuple(up.shape[1:])}, "
            f"{gate_index.block_rows} and {up_index.block_rows} block rows"
        )
    y = x.new_empty(*x.shape[:-1], gate_index.block_rows * rows)
    tensors = (gate, gate_index.row_ptr, gate_index.col, up, up_index.row_ptr, up_index.col, y)
    sizes = (gate_index.block_rows, rows, columns)
    _call("llmprune_linear_swiglu", x, using, sizes, gate.numel() + up.numel(), tensors)
    return y


def grad_input(
    dy: Tensor, values: Tensor, index: BlockIndex, *, using: str | None = None
) -> Tensor:
    """dx = dy W, shape (..., in_features); arguments and errors as for `linear`."""
    rows, columns = _check(dy, values, index, columns=False)
    dx = dy.new_empty(*dy.shape[:-1], index.block_columns * columns)
    tensors = (values, index.t_ptr, index.t_row, index.t_idx, dx)
    sizes = (index.block_columns, rows, columns)
    _call("llmprune_grad_input", dy, using, sizes, values.numel(), tensors)
    return dx


def _call(
    name: str,
    x: Tensor,
    using: str | None,
    sizes: tuple[int, int, int],
    numbers: int,
    tensors: tuple[Tensor | None, ...],
) -> None:
    library = _loaded()
    level = _best() if using is None else INSTRUCTION_SETS.index(using)
    if level > _best():
        raise ValueError(f"using must be at most {INSTRUCTION_SETS[_best()]!r}, got {using!r}")
    in_size = x.shape[-1]
    num_rows, x_stride = x.numel() // in_size, in_size
    if num_rows == 0:
        return
    if not x.is_contiguous():
        x = x.reshape(num_rows, in_size)
        x = x if x.stride(1) == 1 else x.contiguous()
        x_stride = x.stride(0)
    threads = torch.get_num_threads() if num_rows * numbers >= _MIN_THREADED_WORK else 1
    status = getattr(library, name)(
        ELEMENTS[x.dtype],
        level,
        threads,
        x.data_ptr(),
        x_stride,
        num_rows,
        in_size,
        *sizes,
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
    )
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory to pack {num_rows} rows of {in_size} numbers")
    if status:
        raise ValueError(f"{x.dtype} needs more than {INSTRUCTION_SETS[level]} instructions")


def _check(x: Tensor, values: Tensor, index: BlockIndex, *, columns: bool) -> tuple[int, int]:
    """(rows, columns) of a block, when C++ can read all; x is as wide as the weight, or as high."""
    num_blocks, *block = values.shape
    in_size = index.block_columns * block[1] if columns else index.block_rows * block[0]
    if x.dim() < 1 or x.shape[-1] != in_size:
        raise ValueError(f"x must have shape (..., {in_size}), got {tuple(x.shape)}")
    if x.dtype not in ELEMENTS or values.dtype != x.dtype:
        raise ValueError(
            "x and values must be of one dtype, float32, bfloat16 or float16, got "
            f"{x.dtype} and {values.dtype}"
        )
    if not (x.is_cpu and values.is_cpu and index.row_ptr.is_cpu):
        raise ValueError(f"x, values and index must be on the CPU, got {x.device}, {values.device}")
    if num_blocks != index.num_blocks or not values.is_contiguous():
        raise ValueError(
            f"values must be {index.num_blocks} contiguous blocks, got shape "
            f"{tuple(values.shape)} with strides {values.stride()}"
        )
    if block[0] not in BLOCK_SIDES or block[1] not in BLOCK_SIDES:
        raise ValueError(f"block sides must be of {BLOCK_SIDES}, got {tuple(block)}")
    return block[0], block[1]


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
