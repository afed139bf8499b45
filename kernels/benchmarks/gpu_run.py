"""The GPU run itself: checks, ceilings, comparisons of designs, and tables, until time is over."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import gpu_competitors
import in_loop_kernel
import torch
import triton
from gpu_cases import (
    SECTIONS,
    Case,
    block_problems,
    correctness_cases,
    pattern_mask,
    timed_cases,
)
from gpu_report import Report, Row
from torch import Tensor

from llmprune_kernels import precompile, tiles, tma
from llmprune_kernels.tiles import MAX_DECODE_TOKENS, Kind, Problem
from llmprune_kernels.timing import Graph, Launch, interleaved
from llmprune_kernels.trials import Trial

REPETITIONS = 20


class Run:
    """One run's place, deadline and report."""

    def __init__(
        self,
        budget_s: float,
        folder: Path,
        place: torch.device,
        processes: int = 1,
        sections: tuple[str, ...] = (),
    ) -> None:
        """`sections`: those to time; rows of all others are kept from the file that is there."""
        self.sections = sections
        self.cases = timed_cases(sections or SECTIONS)
        self.place = place
        self.processes = processes
        self.device = tiles.device_of(self.place)
        self.deadline = time.monotonic() + budget_s
        self.folder = folder
        versions = {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": str(torch.version.cuda),
        }
        self.report = Report(self.device.name, versions, datetime.now(UTC).date().isoformat())
        if sections:
            self.report.keep_others(folder, sections)

    def runs(self, kind: Kind) -> bool:
        """Whether the device has what a kind of kernel needs."""
        return kind != "tma" or self.device.arch in tiles.BULK_COPY_ARCHS

    def has_time(self, what: str) -> bool:
        """Whether there is time for it; if not, the report says so."""
        if time.monotonic() < self.deadline:
            print(what, flush=True)
            return True
        self.report.left_out.append(f"{what} (no time)")
        return False

    def add(self, section: str, problem: Problem, launches: dict[str, list[Launch]]) -> None:
        """Time candidates in turns, add a row for each and write the report."""
        graphs = {name: Graph(given) for name, given in launches.items()}
        for name, timing in interleaved(graphs).items():
            self.report.rows.append(Row(section, problem, name, timing))
        self.report.write(self.folder)


def run_all(run: Run) -> int:
    """0 when all was correct and written, 1 when a kernel was wrong and nothing was timed."""
    check_all(run)
    if run.report.failures:
        print(f"{len(run.report.failures)} checks failed, so nothing is timed")
        print(run.report.write(run.folder)[1])
        return 1
    run.report.ceilings = ceilings(run.place)
    compile_timed(run)
    if not run.sections:
        compare_blocks(run)
        compare_decode(run)
    for case in run.cases:
        if run.has_time(f"{case.section}: {case.problem}"):
            time_case(run, case)
    print("\n".join(str(path) for path in run.report.write(run.folder)))
    return 0


def check_all(run: Run) -> None:
    """Every correctness case, and that sums shared by items have the same bits every time."""
    cases = [
        (kind, pattern, problem, run.place)
        for problem, pattern, kinds in correctness_cases()
        for kind in filter(run.runs, kinds)
    ]
    found = precompile.in_processes(check, cases, run.processes)
    for (kind, pattern, problem, _), wrong in zip(cases, found, strict=True):
        case = f"{kind}, {pattern}, {problem}"
        said = "not checked: its process died" if wrong is None else wrong
        run.report.checks.append({"case": case, "problem": said})


def check(case: tuple[Kind, str, Problem, torch.device]) -> str:
    """What is wrong with a kind of kernel on one problem and pattern, "" if nothing."""
    # whatever a check raises, it has failed, and the others go on
    try:
        return _check(*case)
    except Exception as error:
        return f"{case[0]}: {type(error).__name__}: {error}"[:300]


def _check(kind: Kind, pattern: str, problem: Problem, place: torch.device) -> str:
    rows, columns = problem.block
    mask = pattern_mask(pattern, problem.out_features // rows, problem.in_features // columns)
    trial = Trial.of(problem, place, keep_mask=mask, copies=2)
    launch = trial.launch(kind, None)
    got = launch()
    wrong = trial.error(kind, got, trial.wanted(kind))
    if not wrong and kind in ("decode", "tma"):
        same = all(torch.equal(launch(), got) for _ in range(REPETITIONS))
        wrong = "" if same else f"{kind}: not the same bits in {REPETITIONS} runs"
    return wrong


def compile_timed(run: Run) -> None:
    """Compile what will be timed in several processes, where there are several."""
    if run.processes > 1:
        jobs = [(kind, case.problem, None) for case in run.cases for kind in case.kinds]
        if not run.sections:
            jobs += [
                (kind, problem, None) for problem in block_problems() for kind in ("matmul", "tma")
            ]
        wanted = [job for job in jobs if run.runs(job[0])]
        precompile.compile_ahead(wanted, run.processes, run.deadline - time.monotonic())


def ceilings(place: torch.device) -> dict[str, float]:
    """What the device does at best: bandwidths in TB/s, dense bfloat16 in TFLOP/s."""
    large = torch.empty(1 << 30, dtype=torch.uint8, device=place)
    small = torch.empty(16 << 20, dtype=torch.uint8, device=place)
    other = torch.empty_like(large)
    side = 8192
    square = torch.randn(side, side, device=place).bfloat16()
    words, small_words = large.view(torch.int32), small.view(torch.int32)
    launches: dict[str, list[Launch]] = {
        "copy": [partial(other.copy_, large)],
        "read": [partial(torch.amax, words)],
        "read from L2": [partial(torch.amax, small_words)] * 20,
        "matmul": [partial(torch.matmul, square, square)] * 4,
    }
    times = interleaved({name: Graph(given) for name, given in launches.items()})
    us = {name: timing.median_us for name, timing in times.items()}
    return {
        "copy, TB/s (read + written)": 2 * large.numel() / us["copy"] / 1e6,
        "read, TB/s": large.numel() / us["read"] / 1e6,
        "read of 16 MB in L2, TB/s": small.numel() / us["read from L2"] / 1e6,
        "dense bfloat16 8192^3, TFLOP/s": 2 * side**3 / us["matmul"] / 1e6,
    }


def compare_blocks(run: Run) -> None:
    """Prefill with every block; carried index, index in the loop, and bulk copies, in turns."""
    for problem in block_problems():
        if not run.has_time(f"blocks: {problem}"):
            continue
        trial = Trial.of(problem, run.place)
        tile = tiles.choose_tile("matmul", run.device, problem)
        launches: dict[str, list[Launch]] = {
            "dense": trial.dense_launches("matmul"),
            "carried index": trial.launches("matmul", tile),
            "index in the loop": [
                partial(in_loop_kernel.linear, trial.x, values, trial.index, config=tile)
                for values in trial.values
            ],
        }
        if run.runs("tma"):
            launches["tma"] = trial.launches("tma", None)
        run.add("blocks", problem, launches)


def compare_decode(run: Run) -> None:
    """One token: with and without tensor cores, and with rows that are not split."""
    for density in (0.5, 0.25):
        problem = Problem(1, 14336, 4096, density, (128, 32), torch.bfloat16)
        if not run.has_time(f"one token: {problem}"):
            continue
        trial = Trial.of(problem, run.place)
        tile = tiles.choose_tile("decode", run.device, problem)
        launches: dict[str, list[Launch]] = {
            "dense": trial.dense_launches("decode"),
            "8 token columns": trial.launches("decode", tile),
            "no tensor cores": trial.launches("decode", replace(tile, block_m=1)),
            "rows in 4 items": trial.launches("decode", replace(tile, items=4)),
        }
        run.add("one token", problem, launches)


def time_case(run: Run, case: Case) -> None:
    """A case's kernels and competitors in turns."""
    trial = Trial.of(case.problem, run.place)
    launches: dict[str, list[Launch]] = {"dense": trial.dense_launches(case.kinds[0])}
    for kind in filter(run.runs, case.kinds):
        launches[kind] = trial.launches(kind, None)
    if case.section in ("decode", "prefill", "few tiles"):
        launches["shrunk"] = gpu_competitors.shrunk_launches(trial)
        launches["densify + dense"] = gpu_competitors.densify_launches(trial)
    if case.section == "gated" and case.problem.tokens > MAX_DECODE_TOKENS and run.runs("tma"):
        launches["two launches"] = [
            partial(gated_in_two, trial, gate, up)
            for gate, up in zip(trial.values, trial.values[1:] + trial.values[:1], strict=True)
        ]
    if case.with_torch:
        try:
            launches["torch.sparse"] = [*gpu_competitors.torch_bsr_tuned(trial)]
        except ValueError as error:
            run.report.left_out.append(f"torch.sparse on {case.problem}: {error}")
    run.add(case.section, case.problem, launches)


def gated_in_two(trial: Trial, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x Wg^T) * (x Wu^T) as prompts run it: two products by bulk copies, the second gates."""
    opening = tma.linear(trial.x, gate, trial.index)
    return tma.linear(trial.x, up, trial.index, gate=opening)
