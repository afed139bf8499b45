"""Whether Triton is installed, and whether it compiles for a GPU or interprets on the CPU.

The one guard of the package: modules with kernels import triton at their top, so whoever wants
them asks `has_triton` first. Nothing here imports triton before it is asked to.
"""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether the modules with kernels can be imported; says nothing of a GPU."""
    return importlib.util.find_spec("triton") is not None


@cache
def is_interpreting() -> bool:
    """Whether kernels run on the CPU: TRITON_INTERPRET=1 was set before they were imported."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
