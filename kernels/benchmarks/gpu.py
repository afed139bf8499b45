"""The whole GPU run in one command: `python kernels/benchmarks/gpu.py`, under nine minutes.

Correctness first: when a kernel is not correct, nothing is timed. Then the GPU's own ceilings, the
comparisons that decide the design, and the tables of decode, prefill, the gated pair and the
backward pass against dense, shrunk dense, densify + dense, and torch.sparse. Whatever time is
left, one JSON and one Markdown file are written for the device, and say what was left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from gpu_cases import SECTIONS, block_problems, correctness_cases, timed_cases

from llmprune_kernels.precompile import workers
from llmprune_kernels.triton_runtime import has_triton

RESULTS = Path(__file__).with_name("results")
NO_GPU = (
    "kernels/benchmarks/gpu.py times GPU kernels with Triton, and here is no GPU or no Triton; "
    "--list shows what it would run"
)


def main(arguments: list[str] | None = None) -> int:
    """0 when all was correct and written, 1 when a kernel was wrong, 2 without a GPU."""
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(listing()))
        return 0
    if not (torch.cuda.is_available() and has_triton()):
        print(NO_GPU, file=sys.stderr)
        return 2
    # needs triton
    from gpu_run import Run, run_all

    place = torch.device("cuda", torch.cuda.current_device())
    sections = tuple(options.sections or ())
    return run_all(Run(options.budget_s, options.results, place, options.processes, sections))


def listing() -> list[str]:
    """What a run with time enough would do, one line each."""
    checks = [
        f"check {pattern}, {problem}: {kinds}" for problem, pattern, kinds in correctness_cases()
    ]
    blocks = [f"blocks {problem}" for problem in block_problems()]
    return [*checks, *blocks, *(f"{case.section} {case.problem}" for case in timed_cases())]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds, default 480")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        help="time these alone; the rest of the device's file stays, with its date",
    )
    parser.add_argument("--processes", type=int, default=workers(), help="that check and compile")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
