"""Which Triton kernel multiplies on a GPU, and how fast it is against a dense product.

Where a measured table of the device has entries near a problem, their times decide, dense and
sparse of one run. Elsewhere a roofline does, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llmprune_kernels import tiles
from llmprune_kernels.tiles import Device, Kind, Problem
from llmprune_kernels.work import Work

# Up to this many rows the bytes of the stored blocks decide; without a table decode serves them.
DECODE_ROWS = 16
# Share of a GPU's bandwidth that decoding in blocks is expected to reach, against a dense product.
DECODE_EFFICIENCY = 0.85
# Density at which a prefill in blocks takes as long as the dense product, by rows of a block: the
# roofline of a tile of 128 tokens (kernels on sm_90; a model, not a measurement).
PREFILL_BREAK_EVEN = {16: 0.13, 32: 0.25, 64: 0.38, 128: 0.57}
# A table's entry speaks for problems of up to this many times as many tokens, or as few; one of
# MANY_ROWS or more, whose tiles fill any GPU, for all with more.
REACH = 4
MANY_ROWS = 2048
# Operations a byte at which a dense product takes as long for either (H200, bfloat16: 790 TFLOP/s
# and 4.3 TB/s, measured); other GPUs are near enough for a choice between two slow ways.
OPERATIONS_PER_BYTE = 184
# Time of writing a weight out against its bytes at the dense product's bandwidth (H200, measured).
WRITING = 1.3
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Estimate:
    """A kernel, its speed over the dense product's, and the GPU whose times say so, or ""."""

    kernel: Kind
    speedup: float
    measured_on: str = ""


def this_device() -> Device:
    """The GPU in use; without one a stand-in, so that a choice can be asked for anywhere."""
    if not torch.cuda.is_available():
        return Device("none", "sm_90", 132)
    return tiles.device_of(torch.device("cuda", torch.cuda.current_device()))


def problem_of(work: Work) -> Problem:
    """A product as tables know it; tokens are rounded up, so that few answers are looked up."""
    return Problem(
        tokens=1 << max(0, work.num_rows - 1).bit_length(),
        out_features=work.out_features,
        in_features=work.in_features,
        density=round(work.density, 2) or work.density,
        block=work.block,
        dtype=work.dtype,
    )


@cache
def estimate(problem: Problem, device: Device) -> Estimate:
    """The fastest kernel for y = x W^T."""
    for table in tiles.tables(device):
        measured = [
            Estimate(kind, speedup, table.get("device", device.name))
            for kind in forward_kinds(problem, device)
            if (speedup := measured_speedup(table, kind, problem, device)) is not None
        ]
        if measured:
            return max(measured, key=lambda one: one.speedup)
    if problem.tokens <= DECODE_ROWS:
        return Estimate("decode", DECODE_EFFICIENCY / problem.density)
    speedup = PREFILL_BREAK_EVEN[problem.block[0]] / problem.density
    return Estimate("matmul", speedup)


def forward_kinds(problem: Problem, device: Device) -> list[Kind]:
    """The kinds of kernel that compute y = x W^T for a problem on a device."""
    found: list[Kind] = []
    if problem.tokens <= tiles.MAX_DECODE_TOKENS:
        found.append("decode")
    if problem.tokens > DECODE_ROWS:
        found.append("matmul")
        if device.arch in tiles.BULK_COPY_ARCHS and problem.dtype.itemsize == 2:
            found.append("tma")
    return found


def measured_speedup(
    table: dict[str, Any], kind: Kind, problem: Problem, device: Device
) -> float | None:
    """Dense time over a kind's, from the nearest measured entry of the same block; None without.

    Time is taken to grow with the density, so that a problem denser than its entry is not praised.
    """
    if not table.get("measured"):
        return None
    near = [
        entry
        for entry in tiles.fitting_entries(table, kind, problem, device.arch)
        if "dense_us" in entry and _speaks_for(entry["tokens"], problem.tokens)
    ]
    if not near:
        return None
    entry = min(near, key=lambda one: tiles.distance(one, problem))
    return entry["dense_us"] / entry["us"] * entry["density"] / problem.density


def _speaks_for(measured: int, tokens: int) -> bool:
    if tokens > measured >= MANY_ROWS:
        return True
    return max(tokens, measured) <= REACH * min(tokens, measured)


def densify_speedup(problem: Problem) -> float:
    """Dense time over that of writing the dense weight out first.

    The weight is cleared, and the stored blocks are read and written; a dense product of few tokens
    reads the weight once.
    """
    extra = WRITING * (1 + 2 * problem.density)
    return 1 / (1 + extra / max(1.0, problem.tokens / OPERATIONS_PER_BYTE))
