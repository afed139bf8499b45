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
    bias = _checked_bias(bias, out_features, x.dtype)
    y = x.new_empty(*x.shape[:-1], out_features)
    sizes = (index.block_rows, rows, columns)
    pointers = (*_pointers(values, index), _pointer(bias), y.data_ptr())
    _call("llmprune_linear", x, using, values.numel(), (*sizes, *pointers))
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
    sizes = _check_pair(x, gate, gate_index, up, up_index)
    y = x.new_empty(*x.shape[:-1], sizes[0] * sizes[1])
    pointers = (*_pointers(gate, gate_index), *_pointers(up, up_index), y.data_ptr())
    _call("llmprune_linear_swiglu", x, using, gate.numel() + up.numel(), (*sizes, *pointers))
    return y


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
    sizes = _check_pair(x, *gate, *up)
    rows, columns = _check_weight(*down, x.dtype)
    down_blocks, hidden = down[1].block_rows, down[1].block_columns * columns
    if hidden != sizes[0] * sizes[1]:
        raise ValueError(
            f"down must have as many in_features as gate and up have out_features, "
            f"{sizes[0] * sizes[1]}, got {hidden}"
        )
    bias = _checked_bias(bias, down_blocks * rows, x.dtype)
    y = x.new_empty(*x.shape[:-1], down_blocks * rows)
    arguments = (
        *(*sizes, *_pointers(*gate), *_pointers(*up)),
        *(down_blocks, rows, columns, *_pointers(*down), _pointer(bias), y.data_ptr()),
    )
    numbers = gate[0].numel() + up[0].numel() + down[0].numel()
    _call("llmprune_gated_mlp", x, using, numbers, arguments)
    return y


def grad_input(
    dy: Tensor, values: Tensor, index: BlockIndex, *, using: str | None = None
) -> Tensor:
    """dx = dy W, shape (..., in_features); arguments and errors as for `linear`."""
    rows, columns = _check(dy, values, index, columns=False)
    dx = dy.new_empty(*dy.shape[:-1], index.block_columns * columns)
    sizes = (index.block_columns, rows, columns)
    pointers = (one.data_ptr() for one in (values, index.t_ptr, index.t_row, index.t_idx, dx))
    _call("llmprune_grad_input", dy, using, values.numel(), (*sizes, *pointers))
    return dx


def _call(
    name: str,
    x: Tensor,
    using: str | None,
    numbers: int,
    arguments: tuple[int | None, ...],
) -> None:
    """Call a function with what all begin with and `arguments`; `numbers` of weights are read."""
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
    head = (ELEMENTS[x.dtype], level, threads, x.data_ptr(), x_stride, num_rows, in_size)
    status = getattr(library, name)(*head, *arguments)
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory to pack {num_rows} rows of {in_size} numbers")
    if status:
        raise ValueError(f"{x.dtype} needs more than {INSTRUCTION_SETS[level]} instructions")


def _pointers(values: Tensor, index: BlockIndex) -> tuple[int, int, int]:
    return values.data_ptr(), index.row_ptr.data_ptr(), index.col.data_ptr()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(x: Tensor, values: Tensor, index: BlockIndex, *, columns: bool) -> tuple[int, int]:
    """(rows, columns) of a block, when C++ can read all; x is as wide as the weight, or as high."""
    block = _check_weight(values, index, x.dtype)
    in_size = index.block_columns * block[1] if columns else index.block_rows * block[0]
    if x.dim() < 1 or x.shape[-1] != in_size:
        raise ValueError(f"x must have shape (..., {in_size}), got {tuple(x.shape)}")
    if not x.is_cpu:
        raise ValueError(f"x must be on the CPU, got {x.device}")
    return block


def _check_pair(
    x: Tensor, gate: Tensor, gate_index: BlockIndex, up: Tensor, up_index: BlockIndex
) -> tuple[int, int, int]:
    """Block rows, and (rows, columns) of a block, when C++ can read all."""
    block = _check(x, gate, gate_index, columns=True)
    if (
        _check_weight(up, up_index, x.dtype) != block
        or up_index.block_rows != gate_index.block_rows
        or up_index.block_columns != gate_index.block_columns
    ):
        raise ValueError(
            "gate and up must have one shape and one block, got "
            f"{gate_index.block_rows}x{gate_index.block_columns} and "
            f"{up_index.block_rows}x{up_index.block_columns} of the blocks "
            f"{tuple(gate.shape[1:])} and {tuple(up.shape[1:])}"
        )
    return gate_index.block_rows, *block


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


def _checked_bias(bias: Tensor | None, out_features: int, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, if there is one that C++ can add."""
    if bias is None:
        return None
    if bias.shape != (out_features,) or bias.dtype != dtype or not bias.is_cpu:
        raise ValueError(
            f"bias must be {dtype} of shape ({out_features},) on the CPU, got {bias.dtype} of "
            f"shape {tuple(bias.shape)} on {bias.device}"
        )
    return bias.contiguous()


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
