"""Memory of weight files that were mapped: what has been copied out need not stay in it."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")
_FILE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S{2}[ps] \S+ \S+ (?!0 )\d+ +/")


def release(tensor: Tensor) -> int:
    """Give back the pages of a tensor that lies in a mapped file; Linux only.

    Whoever reads it later gets the file's bytes again, so nothing may have been written to it. A
    tensor that lies elsewhere is left alone, and so are pages that others begin or end in.

    Args:
        tensor: On the CPU, contiguous.

    Returns:
        Bytes given back, 0 where there is nothing to give.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return 0
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = end // mmap.PAGESIZE * mmap.PAGESIZE
    if first >= last or not _is_mapped_file(first, last):
        return 0
    failed = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED)
    )
    return 0 if failed else last - first


def _is_mapped_file(first: int, last: int) -> bool:
    for line in MAPS.read_text().splitlines():
        found = _FILE.match(line)
        if found and int(found[1], 16) <= first and last <= int(found[2], 16):
            return True
    return False
