"""Run small jobs in several processes: kernels compile one after another in a single one.

Triton keeps what it compiled in a folder that all processes share, so what workers launched once
is there for the process that measures. Workers start anew (spawn): a forked process cannot use the
GPU of its parent.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from llmprune_kernels.tiles import Kind, Problem, Tile

Job = tuple[Kind, Problem, Tile | None]
Given = TypeVar("Given")
Got = TypeVar("Got")


def workers() -> int:
    """Processes to use: all CPUs but two, at most 14, each of which holds its own GPU context."""
    return max(1, min(14, (os.cpu_count() or 1) - 2))


def in_processes(work: Callable[[Given], Got], given: Sequence[Given], processes: int) -> list[Got]:
    """`work` of everything given, in order; in this process where `processes` is 1.

    Args:
        work: A function of a module, so that a worker can import it.
        given: What can be pickled.
        processes: How many.
    """
    if processes <= 1 or len(given) <= 1:
        return [work(one) for one in given]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(given)), mp_context=context) as pool:
        return list(pool.map(work, given))


def compile_ahead(jobs: Sequence[Job], processes: int) -> list[str]:
    """Launch every job once; the reasons of those that could not be, in their order, "" if it ran.

    Args:
        jobs: (kind, problem, tile); tile None = the tables' choice.
        processes: How many work at it.
    """
    return in_processes(_launch, list(dict.fromkeys(jobs)), processes)


def _launch(job: Job) -> str:
    kind, problem, tile = job
    try:
        _trial(problem).launch(kind, tile)()
        torch.cuda.synchronize()
    except Exception as error:  # a tile that does not fit raises one of several kinds
        return f"{kind} {tile}: {type(error).__name__}: {error}"[:300]
    return ""


@cache
def _trial(problem: Problem):  # type: ignore[no-untyped-def]
    # needs triton, which a machine without a GPU may not have
    from llmprune_kernels.trials import Trial

    return Trial.of(problem, torch.device("cuda", torch.cuda.current_device()), copies=2)
