"""What PyTorch's dense products can use on this processor: what a measured speedup holds for.

A block-sparse product is timed against `F.linear`, and that differs more between processors than
anything here does: MKL is slower on processors that are not Intel's, and tiles of bfloat16 (AMX)
make a dense product many times as fast.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
# Of a dtype, best first: the flag of a processor, and the kind that it makes of a dense product.
_FLAGS = {
    torch.bfloat16: (("amx_bf16", "amx"), ("avx512_bf16", "avx512_bf16")),
    torch.float16: (("amx_fp16", "amx"), ("avx512_fp16", "avx512_fp16")),
}


def dense_kind(dtype: torch.dtype) -> str:
    """What a dense product of this dtype runs on here.

    Returns:
        `amx`, `avx512_bf16`, `avx512_fp16` or `none` for 16 bits, where it is widened; `intel` or
        `other` for the rest. A processor that can't be asked has `none` and `other`.
    """
    vendor, flags = _identity()
    if dtype in _FLAGS:
        return next((kind for flag, kind in _FLAGS[dtype] if flag in flags), "none")
    return "intel" if vendor == "GenuineIntel" else "other"


def dense_kinds() -> dict[str, str]:
    """`dense_kind` by name of a dtype, as a table keeps it."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return {name: dense_kind(dtype) for name, dtype in dtypes.items()}


@functools.cache
def _identity() -> tuple[str, frozenset[str]]:
    """Vendor and flags of the first processor."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return "", frozenset()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split())
