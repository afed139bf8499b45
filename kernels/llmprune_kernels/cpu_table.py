"""How much faster than a dense product each way on a CPU is, from tables/cpu-*.json.

benchmarks/cpu.py measures a table on one processor; which of them hold for another is decided by
what dense products run on (`processor.dense_kind`). A table has cells for some numbers of threads,
shapes of the weight, blocks, numbers of rows and densities. Of the threads the most that are not
more than asked for are taken, of the shapes and blocks the nearest; between numbers of rows and
densities the time relative to the dense product is interpolated, beyond them the last one holds.
"""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_left
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmprune_kernels import processor
from llmprune_kernels.work import Work

FOLDER = Path(__file__).with_name("tables")


class _Setting(NamedTuple):
    """What is not interpolated: threads, numbers of the dense weight, block."""

    threads: int
    size: int
    block: tuple[int, int]


# Relative times by number of rows and by density.
_Grid = dict[int, dict[float, float]]


class _Table(NamedTuple):
    """One dtype on one processor: what dense products ran on, and the grids by way."""

    dtype: str
    dense: str
    grids: dict[str, dict[_Setting, _Grid]]


@functools.lru_cache(maxsize=4096)
def speedup(way: str, work: Work) -> float:
    """Time of the dense product over the time of a way, at most about 10 percent of noise apart.

    The lowest of the tables whose dense products run on what they run on here, of all where there
    is no such table: one that is too low costs time, one that is too high is slower than dense.

    Args:
        way: `native` or one of `cpu.WAYS`.
        work: The product. A type that is not in the tables is taken for float32.
    """
    dtype, name = work.dtype, str(work.dtype).removeprefix("torch.")
    if not any(table.dtype == name for table in _tables()):
        dtype, name = torch.float32, "float32"
    every = [table for table in _tables() if table.dtype == name]
    fitting = [table for table in every if table.dense == processor.dense_kind(dtype)]
    return min(_look_up(table.grids[way], work) for table in fitting or every)


def _look_up(grids: dict[_Setting, _Grid], work: Work) -> float:
    measured = {setting.threads for setting in grids}
    threads = max((n for n in measured if n <= work.threads), default=min(measured))
    size = work.in_features * work.out_features

    def distance(setting: _Setting) -> tuple[float, float, _Setting]:
        sides = zip(setting.block, work.block, strict=True)
        return _octaves(setting.size, size), sum(_octaves(*pair) for pair in sides), setting

    grid = grids[min((one for one in grids if one.threads == threads), key=distance)]
    by_rows = {math.log2(rows): _between(times, work.density) for rows, times in grid.items()}
    return 1 / _between(by_rows, math.log2(max(work.num_rows, 1)))


@functools.cache
def _tables() -> list[_Table]:
    tables = []
    for path in sorted(FOLDER.glob("cpu-*.json")):
        text = json.loads(path.read_text())
        tables += [_read(text, dtype, dense, path.name) for dtype, dense in text["dense"].items()]
    return [table for table in tables if table.grids]


def _read(text: dict[str, Any], dtype: str, dense: str, name: str) -> _Table:
    """Of one dtype. Cells that do not say their threads or shape have those of the table.

    Raises:
        ValueError: A number of threads or a shape is missing or is none.
    """
    grids: dict[str, dict[_Setting, _Grid]] = {}
    for cell in (cell for cell in text["cells"] if cell["dtype"] == dtype):
        threads, shape = (cell.get(key, text.get(key)) for key in ("threads", "shape"))
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"{name}: threads must be a whole number from 1 on, got {threads!r}")
        if not isinstance(shape, list) or len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"{name}: shape must be [out_features, in_features], got {shape!r}")
        setting = _Setting(threads, shape[0] * shape[1], (cell["block"][0], cell["block"][1]))
        for way, speed in cell["speedup"].items():
            grid = grids.setdefault(way, {}).setdefault(setting, {})
            grid.setdefault(cell["num_rows"], {})[cell["density"]] = 1 / speed
    return _Table(dtype, dense, grids)


def _octaves(one: int, other: int) -> float:
    return abs(math.log2(one / other))


def _between(points: dict[float, float], at: float) -> float:
    """Value at `at` of the line through the two points around it."""
    places = sorted(points)
    right = bisect_left(places, at)
    if right == 0 or right == len(places):
        return points[places[min(right, len(places) - 1)]]
    low, high = places[right - 1], places[right]
    share = (at - low) / (high - low)
    return points[low] * (1 - share) + points[high] * share
