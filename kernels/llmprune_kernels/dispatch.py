"""Which way a block-sparse product is computed, and why.

On a CPU the compiled kernel runs where it could be built, else the PyTorch way that measurements
favour; on a GPU the Triton kernels. Where writing the stored blocks into a dense weight and
multiplying by that is faster ("densify"), that runs. A choice that is slower than the dense product
says so: a layer may keep a dense copy (`BlockSparseLinear.keep_dense`).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from llmprune_kernels import cpu, cpu_table, gpu_speed, native, processor
from llmprune_kernels.tiles import Device, Kind
from llmprune_kernels.triton_runtime import has_triton
from llmprune_kernels.work import Work

Backend = Literal["reference", "pytorch", "native", "triton", "densify"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Up to so many rows a product in bfloat16 is bound by memory on any processor.
FEW_ROWS = 16
# Takes the place of every choice, for measurements and for reports of bugs.
OVERRIDE = "LLMPRUNE_KERNELS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """A backend and why; `speedup` over dense is predicted, None where there is no figure.

    `kernel` is which of the Triton kernels, where the backend is they.
    """

    backend: Backend
    reason: str
    speedup: float | None = None
    kernel: Kind | None = None


def choose_backend(work: Work) -> Choice:
    """The backend for one product.

    Raises:
        ValueError: The environment names a backend that there is not.
    """
    forced = os.environ.get(OVERRIDE)
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"{OVERRIDE} must be one of {', '.join(BACKENDS)}, got {forced!r}")
        return Choice(forced, f"{OVERRIDE} says so")
    if work.density == 0.0:
        return Choice("reference", "no block is stored")
    return _on_cpu(work) if work.device == "cpu" else _on_gpu(work, gpu_speed.this_device())


@functools.lru_cache(maxsize=4096)
def _on_cpu(work: Work) -> Choice:
    compiled = native.is_available() and native.supports(work.dtype) and not is_outrun(work)
    speedup = cpu.predicted_speedup(work, native=compiled)
    backend: Backend = "native" if compiled else "pytorch"
    said = f"predicted {speedup:.2f}x dense at density {work.density:.2f}, {work.num_rows} rows"
    if speedup >= 1.0:
        return Choice(backend, said, speedup)
    densified = cpu_table.speedup("densify", work)
    if speedup > densified:
        return Choice(
            backend, f"slower than dense, a dense weight made anew more so: {said}", speedup
        )
    return Choice("densify", f"{backend} would be slower: {said}", densified)


def is_outrun(work: Work) -> bool:
    """Whether the dense product has instructions for 16 bits that the compiled kernel lacks.

    The tables are of processors where both have them. Without those for bfloat16, many rows took
    1.3 to 2.2 times as long as the dense product (density 0.5, 512 rows); without AMX, 1.3 times
    for 16 rows and 5 times for 512. One row is bound by memory and was faster in each case.
    """
    if processor.dense_kind(work.dtype) == "amx":
        return work.num_rows > 1 and not native.uses_amx(work.dtype)
    dots = native.instruction_set() in ("avx512_bf16", "amx")
    return work.dtype == torch.bfloat16 and work.num_rows > FEW_ROWS and not dots


@functools.lru_cache(maxsize=4096)
def _on_gpu(work: Work, device: Device) -> Choice:
    if not has_triton():
        return Choice("densify", "triton is not installed")
    if work.dtype not in gpu_speed.DTYPES:
        return Choice("densify", f"no kernel computes in {work.dtype}")
    problem = gpu_speed.problem_of(work)
    found = gpu_speed.estimate(problem, device)
    source = f"predicted from times on {found.measured_on}," if found.measured_on else "modelled"
    said = (
        f"{source} {found.speedup:.2f}x dense at density {work.density:.2f}, {work.num_rows} rows"
    )
    densified = gpu_speed.densify_speedup(problem)
    if found.speedup < densified:
        return Choice("densify", f"triton would be slower: {said}", densified)
    return Choice("triton", f"{found.kernel}, {said}", found.speedup, found.kernel)
