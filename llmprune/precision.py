"""Which precision is faster on this machine."""

from __future__ import annotations

import math
import time
from typing import Literal

import torch

# bf16 must be this many times as fast to be taken: casts and norms cost some of the gain.
BF16_GAIN = 1.5


def faster_precision() -> Literal["no", "bf16"]:
    """`bf16` where a matrix product in it is clearly faster than in float32 on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {dtype: _matmul_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    is_faster = seconds[torch.bfloat16] * BF16_GAIN < seconds[torch.float32]
    return "bf16" if is_faster else "no"


def _matmul_seconds(dtype: torch.dtype, device: str) -> float:
    """The best of a few products of (512, 1024) and (1024, 1024), the result waited for."""
    a = torch.randn(512, 1024, device=device).to(dtype)
    b = torch.randn(1024, 1024, device=device).to(dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - start)
    return best
