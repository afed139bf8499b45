"""Block-sparse against dense products on this CPU: results/cpu-<device>.{json,md}, or the table.

    python kernels/benchmarks/cpu.py --threads 1 2      # full set on one thread, short set on two
    python kernels/benchmarks/cpu.py --table --threads 1 2    # llmprune_kernels/tables/cpu-*.json

Every way is compared with float64 before it is timed; one that is wrong stops the run. Dense and
all ways take turns, in rounds. A model reads every weight once a token, from memory: up to 16 rows
are multiplied with one copy of the weight after the other, whose blocks fill the last cache twice.
The figure is the median of process CPU time (other work on the machine does not count, though the
caches it empties do) for one thread, of wall time for more. That is taken again, up to four times,
while others use the machine; their share is kept with it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmprune_kernels import cpu, cpu_table, native, processor, reference
from llmprune_kernels.bsr import BlockIndex, gather_blocks

RESULTS = Path(__file__).with_name("results")
# Share of all CPUs that others may have beside a measurement of wall time.
QUIET = 0.03
# Up to so many rows the time is that of reading the weight, or near it.
COLD_ROWS = 16
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One product to be timed."""

    out_features: int
    in_features: int
    block: tuple[int, int]
    dtype: str
    density: float
    num_rows: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one way: medians, and the 20th and 80th percentile of the CPU time."""

    cpu_ms: float
    cpu_ms_low: float
    cpu_ms_high: float
    wall_ms: float
    error: float


def full_cases() -> list[Case]:
    """The square of the research notes, two real projections, and a large one."""
    shapes = [
        (2048, 2048, 64), (1536, 576, 64), (1536, 576, 32), (576, 1536, 64), (576, 1536, 32),
        (4096, 4096, 64),
    ]  # fmt: skip
    return [
        Case(rows, columns, (side, side), dtype, density, num_rows)
        for rows, columns, side in shapes
        for dtype in ("float32", "bfloat16")
        for density in (0.25, 0.5, 0.75)
        for num_rows in (1, 16, 512)
    ]


def short_cases() -> list[Case]:
    """What is also run on more threads: half of the blocks, one block for every shape."""
    return [
        case
        for case in full_cases()
        if case.density == 0.5 and (case.out_features == 2048 or case.block[0] == 32)
    ]


def table_cases() -> list[Case]:
    """What the policy is read from: a large weight, and one that stays in a core's cache."""
    return [
        Case(*shape, block, dtype, density, num_rows)
        for shape in ((2048, 2048), (1536, 576))
        for dtype in ("float32", "bfloat16", "float16")
        for block in ((16, 16), (32, 32), (64, 64), (128, 32))
        for num_rows in (1, 16, 128, 512)
        for density in (0.25, 0.5, 1.0)
        if dtype != "float16" or num_rows < 512
    ]


def random_index(case: Case) -> BlockIndex:
    """As many blocks in every block row, drawn."""
    rows, columns = case.out_features // case.block[0], case.in_features // case.block[1]
    kept = torch.rand(rows, columns).topk(max(1, round(columns * case.density)), 1).indices
    return BlockIndex.from_mask(
        torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, kept, True)
    )


def measure(case: Case, *, rounds: int, sample_s: float) -> dict[str, Timing]:
    """Timings by way, `dense` among them.

    Raises:
        SystemExit: A way is wrong.
    """
    torch.manual_seed(0)
    index = random_index(case)
    dtype = getattr(torch, case.dtype)
    dense = torch.randn(case.out_features, case.in_features).to(dtype)
    values = gather_blocks(dense, index, case.block)
    x = torch.randn(case.num_rows, case.in_features).to(dtype)
    count = num_copies(case.num_rows, values.nbytes)
    every_dense = [dense.clone() for _ in range(count)]
    every_values = [values.clone() for _ in range(count)]
    ways: dict[str, Callable[[], Tensor]] = {
        way: in_turn([partial(cpu.linear, x, v, index, way=way) for v in every_values])
        for way in cpu.WAYS
    }
    if native.supports(dtype):
        ways["native"] = in_turn([partial(native.linear, x, v, index) for v in every_values])
    wanted = reference.exact(x, values, index)
    errors = {name: reference.relative_error(way(), wanted) for name, way in ways.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{case}: {name} is wrong by {error:.1e}, nothing is timed")
    ways = {"dense": in_turn([partial(functional.linear, x, w) for w in every_dense]), **ways}
    samples = take_turns(list(ways.values()), rounds=rounds, sample_s=sample_s)
    return {
        name: summary(taken, errors.get(name, 0.0))
        for name, taken in zip(ways, samples, strict=True)
    }


def num_copies(num_rows: int, num_bytes: int) -> int:
    """Copies of a weight of so many bytes that are multiplied in turn."""
    return 1 if num_rows > COLD_ROWS else -(-2 * last_cache() // num_bytes)


def last_cache() -> int:
    """Bytes of the largest cache that a core reaches; 32 MiB where nothing says."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return 1024 * max((int(size[:-1]) for size in sizes if size.endswith("K")), default=32768)


def in_turn(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """One of the calls after the other, again and again."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def take_turns(
    ways: list[Callable[[], Tensor]], *, rounds: int, sample_s: float
) -> list[list[tuple[float, float]]]:
    """Seconds a call, (CPU, wall), of every way and round; `ways[0]` is the dense one.

    A way that takes eight times as long as dense is out of the running, and timed once only.
    """
    samples: list[list[tuple[float, float]]] = []
    for way in ways:
        way()
        samples.append([timed(way, 1)])
    costs = [taken[0][1] for taken in samples]
    samples = [
        [] if cost < 8 * costs[0] else taken for cost, taken in zip(costs, samples, strict=True)
    ]
    for _ in range(rounds):
        for way, cost, taken in zip(ways, costs, samples, strict=True):
            if cost < 8 * costs[0]:
                way()  # the caches are those of the way before
                taken.append(timed(way, max(1, int(sample_s / max(1e-6, cost)))))
    return samples


def timed(way: Callable[[], Tensor], count: int) -> tuple[float, float]:
    """Seconds a call, (CPU, wall)."""
    start, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        way()
    return (time.process_time() - start) / count, (time.perf_counter() - wall) / count


def summary(samples: list[tuple[float, float]], error: float) -> Timing:
    """Medians and spread in milliseconds."""
    spent = sorted(1e3 * cpu_s for cpu_s, _ in samples)
    edge = len(spent) // 5
    wall = statistics.median(1e3 * wall_s for _, wall_s in samples)
    return Timing(statistics.median(spent), spent[edge], spent[-1 - edge], wall, error)


def device() -> dict[str, str]:
    """Name and kind of this processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    return {key: fields[key].strip() for key in ("model name", "cpu family", "model")}


def slug() -> str:
    """Name of this processor's files."""
    names = device()
    model = re.sub(r"[^a-z0-9]+", "-", names["model name"].lower()).strip("-")
    return f"cpu-{model}-family{names['cpu family']}"


def conditions() -> dict[str, object]:
    """What figures hold for."""
    return {
        "device": device(),
        "dense": processor.dense_kinds(),
        "instruction_set": native.instruction_set() if native.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "weights": f"from memory, up to {COLD_ROWS} rows",
        "load": f"{os.getloadavg()[2]:.1f} on {os.cpu_count()} CPUs",
    }


def speedups(timings: dict[str, Timing], threads: int) -> dict[str, float]:
    """Dense time over the time of every way."""
    times = {
        name: timing.cpu_ms if threads == 1 else timing.wall_ms for name, timing in timings.items()
    }
    return {name: round(times["dense"] / t, 3) for name, t in times.items() if name != "dense"}


def measure_on(case: Case, threads: int, *, rounds: int, sample_s: float) -> dict[str, Any]:
    """A cell: what was measured, its timings, speedups and the share that others had of all CPUs.

    Wall time beside others says little: the quietest of up to four measurements is kept.
    """
    torch.set_num_threads(threads)
    taken = []
    while not taken or (threads > 1 and len(taken) < 4 and taken[-1]["others"] > QUIET):
        busy_s, own_s, start = busy(), time.process_time(), time.perf_counter()
        timings = measure(case, rounds=rounds, sample_s=sample_s)
        spent = busy() - busy_s - (time.process_time() - own_s)
        others = max(0.0, spent) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        ratios = speedups(timings, threads)
        kept = {name: asdict(timing) for name, timing in timings.items()}
        head = {"threads": threads, **asdict(case), "others": round(others, 3)}
        taken.append({**head, "speedup": ratios, "timings": kept})
    cell = min(taken, key=lambda one: one["others"])
    print(threads, case, cell["others"], cell["speedup"], flush=True)
    return cell


def busy() -> float:
    """Seconds that all CPUs have worked since the start of the machine."""
    numbers = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
    # the fourth and fifth are idle and waiting for a disk
    return (sum(numbers) - sum(numbers[3:5])) / os.sysconf("SC_CLK_TCK")


def write_table(thread_counts: list[int], *, rounds: int) -> None:
    """Measure the policy's table."""
    save_table(
        [
            measure_on(case, threads, rounds=rounds, sample_s=0.01)
            for threads in thread_counts
            for case in table_cases()
        ],
        rounds=rounds,
    )


def save_table(cells: list[dict], *, rounds: int) -> None:
    """Write what the policy reads of cells that `measure_on` gave."""
    keys = ("threads", "dtype", "block", "num_rows", "density", "others", "speedup")
    lines = [
        json.dumps(
            {"shape": [cell["out_features"], cell["in_features"]], **{k: cell[k] for k in keys}}
        )
        for cell in cells
    ]
    head = json.dumps({**conditions(), "rounds": rounds})
    body = ",\n".join(lines)
    path = cpu_table.FOLDER / f"{slug()}.json"
    path.write_text(f'{head[:-1]}, "cells": [\n{body}\n]}}\n')


def write_results(thread_counts: list[int], *, rounds: int) -> None:
    """Measure the full set on the first number of threads and the short set on the others."""
    measured = [
        measure_on(case, threads, rounds=rounds, sample_s=0.02)
        for threads in thread_counts
        for case in (full_cases() if threads == thread_counts[0] else short_cases())
    ]
    save_results(measured, rounds=rounds)


def save_results(measured: list[dict], *, rounds: int) -> None:
    """Write cells that `measure_on` gave, and the same as a report."""
    path = RESULTS / slug()
    RESULTS.mkdir(exist_ok=True)
    result: dict[str, Any] = {**conditions(), "rounds": rounds, "cells": measured}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(result, measured))


def report(result: dict[str, Any], cells: list[dict]) -> str:
    """The same as one Markdown table for every number of threads, after `notes` written by hand."""
    names = result["device"]
    lines = [
        "# Block-sparse against dense products on a CPU",
        "",
        f"{names['model name']} (family {names['cpu family']}), {result['instruction_set']} "
        f"instructions, torch {result['torch']}, {result['date']}, {result['rounds']} rounds.",
        "Dense: `F.linear` of the same shape. Speedup: dense time over the way's, above 1 is faster"
        "; every way makes y from x and the stored blocks anew (`densify` the dense weight too).",
        "One thread: medians of process CPU time. More: medians of wall time. "
        f"Weights: {result.get('weights', 'one, again and again, as far as caches hold it')}. "
        f"Load average at the end: {result.get('load', 'not recorded')}.",
        *result.get("notes", []),
    ]
    ways = ["native", *cpu.WAYS]
    for threads in sorted({cell["threads"] for cell in cells}):
        kind = "cpu_ms" if threads == 1 else "wall_ms"
        head = [
            "weight",
            "block",
            "dtype",
            "density",
            "M",
            "dense ms",
            "native ms (20-80 %)" if threads == 1 else "native ms",
            *ways,
        ]
        lines += ["", f"## {threads} thread{'s' * (threads > 1)}", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for cell in (cell for cell in cells if cell["threads"] == threads):
            timings = cell["timings"]
            fast = timings.get("native", timings["dense"])
            spread = f" ({fast['cpu_ms_low']:.3f}-{fast['cpu_ms_high']:.3f})"
            row = [
                f"{cell['out_features']}x{cell['in_features']}",
                f"{cell['block'][0]}x{cell['block'][1]}",
                cell["dtype"],
                f"{cell['density']:g}",
                str(cell["num_rows"]),
                f"{timings['dense'][kind]:.3f}",
                f"{fast[kind]:.3f}" + spread * (threads == 1),
                *(f"{cell['speedup'].get(way, float('nan')):.2f}" for way in ways),
            ]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="measure the policy's table instead")
    options = parser.parse_args()
    if options.table:
        write_table(options.threads, rounds=options.rounds)
    else:
        write_results(options.threads, rounds=options.rounds)


if __name__ == "__main__":
    main()
