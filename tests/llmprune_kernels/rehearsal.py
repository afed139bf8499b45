"""The GPU run and `tune`, rehearsed without a GPU: interpreted kernels, small problems, no clock.

`TRITON_INTERPRET=1 python rehearsal.py run|gated|wrong|late|tune FOLDER`, in a process of its own
because Triton decides at import whether it interprets.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))

import gpu_cases
import gpu_competitors
import gpu_run

from llmprune_kernels import matmul, tiles, trials
from llmprune_kernels.tiles import Problem
from llmprune_kernels.tune import entry_of, write_table

SMALL = Problem(5, 64, 96, 0.5, (32, 32), torch.bfloat16)
CPU = torch.device("cpu")


class Launched:
    """In the place of a captured graph: runs each launch once and makes up the time."""

    made_up = itertools.count(100)

    def __init__(self, launches):
        self.count = len(launches)
        for launch in launches:
            launch()

    def round_us(self, repeats):
        return float(next(self.made_up)) + repeats


def small(problem: Problem) -> Problem:
    """As many tokens as are interpreted fast, and a weight of few blocks."""
    rows, columns = problem.block
    tokens = 1 if problem.tokens == 1 else 3 if problem.tokens <= 64 else 70
    return replace(problem, tokens=tokens, out_features=2 * rows, in_features=4 * columns)


def prepare(folder: Path, budget_s: float, sections: tuple[str, ...] = ()) -> gpu_run.Run:
    for module in (gpu_run, gpu_competitors, trials):
        module.Graph = Launched
    trials.copies_needed = gpu_competitors.copies_needed = lambda size: 2
    checks = gpu_cases.correctness_cases()
    chosen = checks[:3] + [case for case in checks if case[1] in ("empty", "one")]
    gpu_run.correctness_cases = lambda: [(small(case), *rest) for case, *rest in chosen]
    blocks = gpu_cases.block_problems()[:2]
    gpu_run.block_problems = lambda: [small(problem) for problem in blocks]
    timed_cases = gpu_cases.timed_cases

    def few_cases(sections):
        cases = timed_cases(sections)[:6]
        return [replace(case, problem=small(case.problem)) for case in cases]

    gpu_run.timed_cases = few_cases
    gpu_run.compare_decode = lambda run: None
    gpu_run.ceilings = lambda place: {"read, TB/s": 4.0}
    return gpu_run.Run(budget_s, folder, CPU, sections=sections)


def main(what: str, folder: Path) -> int:
    if what == "tune":
        trials.Graph, trials.copies_needed = Launched, lambda size: 2
        device = tiles.device_of(CPU)
        trial = trials.Trial.of(SMALL, CPU)
        tried = trials.candidates("decode", SMALL, device)[:3]
        trials.candidates = lambda *given: tried
        tile, mine, dense = trials.fastest(trial, "decode", device, time.monotonic() + 60)
        entry = entry_of(SMALL, "decode", tile, mine.median_us, dense.median_us)
        write_table(tiles.user_table(device), device, entry)
        assert tiles.choose_tile("decode", device, replace(SMALL, density=0.25)) == tile
        return 0
    sections = ("gated",) if what == "gated" else ()
    run = prepare(folder, 0.0 if what == "late" else 600.0, sections)
    if what == "wrong":
        right = matmul.linear
        matmul.linear = lambda *given, **options: right(*given, **options) * 1.1
    return gpu_run.run_all(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
