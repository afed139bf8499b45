"""What launchers ask of the tensors they are handed: rules that kernels assume and never check."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune_kernels.bsr import BLOCK_SIDES, COLUMN_PADDING, BlockIndex
from llmprune_kernels.triton_runtime import is_interpreting

# the index is padded by two steps of four blocks, `bsr.COLUMN_PADDING`
MOST_MERGED = COLUMN_PADDING // 2
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_values(values: Tensor, index: BlockIndex, name: str = "values") -> tuple[int, int]:
    """The block's (rows, columns), when kernels can read the blocks.

    Raises:
        ValueError: Dtype, shape, layout, device or number of blocks is not what kernels assume.
    """
    if not (values.is_cuda or is_interpreting()):
        raise ValueError(
            f"{name} must lie on a GPU (or TRITON_INTERPRET=1 be set before the import), "
            f"got {values.device}"
        )
    if values.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {values.dtype}")
    if values.dim() != 3 or values.shape[0] != index.num_blocks:
        raise ValueError(
            f"{name} must have shape ({index.num_blocks}, rows, columns), one entry for every "
            f"block of its index, got {tuple(values.shape)}"
        )
    block = (values.shape[1], values.shape[2])
    if any(side not in BLOCK_SIDES for side in block):
        raise ValueError(f"{name}: block sides must be two of {BLOCK_SIDES}, got {block}")
    if not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {values.stride()}")
    if block[0] * block[1] * index.block_columns >= 1 << 31:
        raise ValueError(
            f"{name}: a block row must hold less than 2^31 numbers, got blocks {block} in "
            f"{index.block_columns} columns"
        )
    if index.row_ptr.device != values.device:
        raise ValueError(
            f"{name} and its index must lie on one device, got {values.device} and "
            f"{index.row_ptr.device}"
        )
    return block


def check_step(step: int, side: int) -> None:
    """Refuse a step that reads the index further ahead than it is padded.

    Args:
        step: Inner size of one dot.
        side: The block's side along it.

    Raises:
        ValueError: The step merges more than four blocks.
    """
    if step > MOST_MERGED * side:
        raise ValueError(f"tile: step must be at most {MOST_MERGED} blocks of {side}, got {step}")


def token_rows(x: Tensor, features: int, like: Tensor, name: str = "x") -> Tensor:
    """`x` as kernels read it: any row stride, the last stride 1 (copied only if it is not).

    Args:
        x: Shape (M, features).
        features: What the weight asks for.
        like: A tensor whose dtype and device `x` must share.
        name: Begins the message.

    Raises:
        ValueError: Shape, dtype or device differs.
    """
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"{name} must have shape (M, {features}), got {tuple(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as the blocks are, "
            f"got {x.dtype} on {x.device}"
        )
    return x if x.stride(1) == 1 or x.numel() == 0 else x.contiguous()


def check_bias(bias: Tensor | None, features: int, like: Tensor) -> None:
    """Refuse a bias that kernels can't add.

    Raises:
        ValueError: It is no contiguous vector of `features` numbers on the device of `like`.
    """
    if bias is None:
        return
    if bias.shape != (features,) or not bias.is_contiguous() or bias.device != like.device:
        raise ValueError(
            f"bias must be contiguous, of shape ({features},) and on {like.device}, "
            f"got {tuple(bias.shape)} on {bias.device}"
        )


def needs_upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must widen before it multiplies: the interpreter's bfloat16 dot is wrong."""
    return dtype == torch.bfloat16 and is_interpreting()


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: "ieee" unless `torch.set_float32_matmul_precision` allows TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
