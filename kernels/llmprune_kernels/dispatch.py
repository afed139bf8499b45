"""Which way a block-sparse product is computed, and why; never one known to be slower than dense.

On a CPU the compiled kernel runs where it could be built, else the PyTorch way that measurements
favour; on a GPU the Triton kernels. Where the weight is too dense for any of them to win, the
stored blocks are written into a dense weight and the dense product runs ("densify").
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from llmprune_kernels import cpu, native, processor
from llmprune_kernels.triton_runtime import has_triton
from llmprune_kernels.work import Work

Backend = Literal["reference", "pytorch", "native", "triton", "densify"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Up to this many rows the bytes of the stored blocks decide; the decode kernel serves them.
DECODE_ROWS = 16
# Share of a GPU's bandwidth that decoding in blocks is expected to reach, against a dense product.
DECODE_EFFICIENCY = 0.85
# Density at which a prefill in blocks takes as long as the dense product, by rows of a block: the
# roofline of a tile of 128 tokens (kernels on sm_90; a model, not a measurement).
PREFILL_BREAK_EVEN = {16: 0.13, 32: 0.25, 64: 0.38, 128: 0.57}
# Takes the place of every choice, for measurements and for reports of bugs.
OVERRIDE = "LLMPRUNE_KERNELS_BACKEND"


@dataclass(frozen=True)
class Choice:
    """A backend and why; `speedup` over dense is predicted, None where there is no figure."""

    backend: Backend
    reason: str
    speedup: float | None = None


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
    return _on_cpu(work) if work.device == "cpu" else _on_gpu(work)


@functools.lru_cache(maxsize=4096)
def _on_cpu(work: Work) -> Choice:
    compiled = native.is_available() and native.supports(work.dtype) and not is_outrun(work)
    speedup = cpu.predicted_speedup(work, native=compiled)
    backend: Backend = "native" if compiled else "pytorch"
    said = f"predicted {speedup:.2f}x dense at density {work.density:.2f}, {work.num_rows} rows"
    if speedup < 1.0:
        # without a dense copy that is kept, this is no faster than dense either
        return Choice("densify", f"{backend} would be slower: {said}", speedup)
    return Choice(backend, said, speedup)


def is_outrun(work: Work) -> bool:
    """Whether the dense product has instructions for 16 bits that the compiled kernel lacks.

    The tables are of processors where both have them. Without those for bfloat16, many rows took
    1.3 to 2.2 times as long as the dense product (density 0.5, 512 rows); without AMX, 1.3 times
    for 16 rows and 5 times for 512. One row is bound by memory and was faster in each case.
    """
    if processor.dense_kind(work.dtype) == "amx":
        return work.num_rows > 1 and not native.uses_amx(work.dtype)
    dots = native.instruction_set() in ("avx512_bf16", "amx")
    return work.dtype == torch.bfloat16 and work.num_rows > DECODE_ROWS and not dots


def _on_gpu(work: Work) -> Choice:
    if not has_triton():
        return Choice("densify", "triton is not installed")
    speedup = _modelled_speedup(work)
    said = f"modelled {speedup:.2f}x dense at density {work.density:.2f}, {work.num_rows} rows"
    if speedup < 1.0:
        return Choice("densify", f"triton would be slower: {said}", speedup)
    return Choice("triton", said, speedup)


def _modelled_speedup(work: Work) -> float:
    if work.num_rows <= DECODE_ROWS:
        return DECODE_EFFICIENCY / work.density
    return PREFILL_BREAK_EVEN[work.block[0]] / work.density
