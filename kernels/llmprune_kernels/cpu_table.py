"""How much faster than a dense product each way on a CPU is, from tables/cpu.json.

benchmarks/cpu.py measures the table. It has cells for some blocks, numbers of rows and densities;
between them the time relative to the dense product is interpolated, beyond them the last one holds.
"""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_left
from pathlib import Path

import torch

PATH = Path(__file__).with_name("tables") / "cpu.json"

# Relative times of one way by number of rows and by density.
_Grid = dict[int, dict[float, float]]


@functools.lru_cache(maxsize=4096)
def speedup(
    way: str, num_rows: int, density: float, dtype: torch.dtype, block: tuple[int, int]
) -> float:
    """Time of the dense product over the time of a way, at most about 10 percent of noise apart.

    Args:
        way: `native` or one of `cpu.WAYS`.
        num_rows: Rows of x.
        density: Stored share of the weight.
        dtype: A type that is not in the table is taken for float32.
        block: (rows, columns); the nearest in the table is taken.
    """
    grids = _table()
    name = str(dtype).removeprefix("torch.")
    known = {key for key in grids if key[0] == way}
    if not any(key[1] == name for key in known):
        name = "float32"
    keys = [key for key in known if key[1] == name]
    grid = grids[min(keys, key=lambda key: (_distance(key[2], block), key[2]))]
    by_rows = {math.log2(rows): _between(times, density) for rows, times in grid.items()}
    return 1 / _between(by_rows, math.log2(max(num_rows, 1)))


@functools.cache
def _table() -> dict[tuple[str, str, tuple[int, int]], _Grid]:
    grids: dict[tuple[str, str, tuple[int, int]], _Grid] = {}
    for cell in json.loads(PATH.read_text())["cells"]:
        for way, speed in cell["speedup"].items():
            key = (way, cell["dtype"], (cell["block"][0], cell["block"][1]))
            grids.setdefault(key, {}).setdefault(cell["num_rows"], {})[cell["density"]] = 1 / speed
    return grids


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
