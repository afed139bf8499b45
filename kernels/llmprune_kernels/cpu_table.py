"""How much faster than a dense product each way on a CPU is, from tables/cpu-*.json.

benchmarks/cpu.py measures a table on one processor; which of them hold for another is decided by
what dense products run on (`processor.dense_kind`). A table has cells for some blocks, numbers of
rows and densities; between them the time relative to the dense product is interpolated, beyond them
the last one holds.
"""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_left
from pathlib import Path

import torch

from llmprune_kernels import processor

FOLDER = Path(__file__).with_name("tables")

# Relative times of one way by number of rows and by density.
_Grid = dict[int, dict[float, float]]
# Of one dtype, by way and block.
_Grids = dict[tuple[str, tuple[int, int]], _Grid]


@functools.lru_cache(maxsize=4096)
def speedup(
    way: str, num_rows: int, density: float, dtype: torch.dtype, block: tuple[int, int]
) -> float:
    """Time of the dense product over the time of a way, at most about 10 percent of noise apart.

    The lowest of the tables whose dense products run on what they run on here, of all where there
    is no such table: one that is too low costs time, one that is too high is slower than dense.

    Args:
        way: `native` or one of `cpu.WAYS`.
        num_rows: Rows of x.
        density: Stored share of the weight.
        dtype: A type that is not in the tables is taken for float32.
        block: (rows, columns); the nearest in a table is taken.
    """
    name = str(dtype).removeprefix("torch.")
    tables = _tables()
    if not any(name == known for known, _ in tables):
        name, dtype = "float32", torch.float32
    kind = processor.dense_kind(dtype)
    fitting = [grids for (known, on), grids in tables.items() if (known, on) == (name, kind)]
    every = [grids for (known, _), grids in tables.items() if known == name]
    return min(_look_up(grids, way, num_rows, density, block) for grids in fitting or every)


def _look_up(
    grids: _Grids, way: str, num_rows: int, density: float, block: tuple[int, int]
) -> float:
    sizes = [size for known, size in grids if known == way]
    grid = grids[way, min(sizes, key=lambda size: (_distance(size, block), size))]
    by_rows = {math.log2(rows): _between(times, density) for rows, times in grid.items()}
    return 1 / _between(by_rows, math.log2(max(num_rows, 1)))


@functools.cache
def _tables() -> dict[tuple[str, str], _Grids]:
    """By name of a dtype and what dense products of it ran on."""
    tables: dict[tuple[str, str], _Grids] = {}
    for path in sorted(FOLDER.glob("cpu-*.json")):
        table = json.loads(path.read_text())
        for cell in table["cells"]:
            grids = tables.setdefault((cell["dtype"], table["dense"][cell["dtype"]]), {})
            for way, speed in cell["speedup"].items():
                grid = grids.setdefault((way, (cell["block"][0], cell["block"][1])), {})
                times = grid.setdefault(cell["num_rows"], {})
                # of several processors, the slowest against dense
                times[cell["density"]] = max(times.get(cell["density"], 0.0), 1 / speed)
    return tables


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return sum(abs(math.log2(one / other)) for one, other in zip(a, b, strict=True))


def _between(points: dict[float, float], at: float) -> float:
    """Value at `at` of the line through the two points around it."""
    places = sorted(points)
    right = bisect_left(places, at)
    if right == 0 or right == len(places):
        return points[places[min(right, len(places) - 1)]]
    low, high = places[right - 1], places[right]
    share = (at - low) / (high - low)
    return points[low] * (1 - share) + points[high] * share
