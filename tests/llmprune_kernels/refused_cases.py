"""What launchers refuse, and how the message goes on; run by `interpreted_cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmprune_kernels.bsr import BlockIndex
from llmprune_kernels.tiles import Tile


def refuses(what: str, message: str) -> None:
    from llmprune_kernels import decode, gradients, matmul, swiglu, tma

    index = BlockIndex.from_mask(torch.eye(3, 5, dtype=torch.bool))
    count = index.num_blocks
    values, x = torch.randn(count, 16, 32), torch.randn(4, 160)
    other = BlockIndex.from_mask(torch.ones(3, 5, dtype=torch.bool))
    attempts: dict[str, Callable[[], Tensor]] = {
        "blocks that are no block's": lambda: matmul.linear(x, values[1:], index),
        "a side": lambda: matmul.linear(x, torch.randn(count, 24, 32), index),
        "strided blocks": lambda: matmul.linear(x, values.mT.contiguous().mT, index),
        "float64": lambda: matmul.linear(x.double(), values.double(), index),
        "another dtype": lambda: decode.linear(x.half(), values, index),
        "another width": lambda: decode.linear(x[:, 1:], values, index),
        "three dimensions": lambda: matmul.linear(x[None], values, index),
        "a short bias": lambda: matmul.linear(x, values, index, torch.randn(47)),
        "many tokens": lambda: decode.linear(torch.randn(65, 160), values, index),
        "a narrow tile": lambda: decode.linear(x, values, index, config=Tile(1, 4, 2, step=32)),
        "an odd stride": lambda: tma.linear(torch.randn(4, 161)[:, :160], values, index),
        "a long step": lambda: matmul.linear(
            torch.randn(4, 80),
            torch.randn(count, 32, 16),
            index,
            config=Tile(16, 4, 2, step=128),
        ),
        "rows that are one row": lambda: tma.linear(x[:1].expand(4, 160), values, index),
        "an odd base": lambda: tma.linear(torch.randn(4 * 160 + 1)[1:].view(4, 160), values, index),
        "unlike gate and up": lambda: swiglu.linear_swiglu(
            x, values, index, torch.randn(15, 32, 32), other
        ),
        "unlike rows": lambda: gradients.grad_values(torch.randn(3, 48), x, index, (16, 32)),
    }
    with pytest.raises(ValueError, match=message):
        attempts[what]()


REFUSALS = {
    "blocks that are no block's": "one entry for every block of its index, got",
    "a side": r"block sides must be two of .* got \(24, 32\)",
    "strided blocks": "must be contiguous, got strides",
    "float64": "must be float16, bfloat16 or float32, got torch.float64",
    "another dtype": "x must be torch.float32 .* got torch.float16",
    "another width": r"x must have shape \(M, 160\), got \(4, 159\)",
    "three dimensions": r"x must have shape \(M, 160\), got \(1, 4, 160\)",
    "a short bias": r"bias must be contiguous, of shape \(48,\)",
    "many tokens": "at most 64 tokens, got 65: use matmul",
    "a narrow tile": "must hold every token, got block_m 1 for 4",
    "a long step": "step must be at most 4 blocks of 16, got 128",
    "rows that are one row": "positive multiple of 16 bytes, got 0",
    "an odd stride": "row stride to be a positive multiple of 16 bytes, got 161",
    "an odd base": "begin at a multiple of 16 bytes",
    "unlike gate and up": "gate and up must have one block",
    "unlike rows": "as many rows, got 3 and 4",
}
