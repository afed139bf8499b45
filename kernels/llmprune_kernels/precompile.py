"""Run small jobs in several processes: kernels compile one after another in a single one.

Triton keeps what it compiled in a folder that all processes share, so what workers launched once
is there for the process that measures. Workers start anew (spawn): a forked process cannot use the
GPU of its parent.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any, TypeVar

import torch

from llmprune_kernels.tiles import Kind, Problem, Tile

Job = tuple[Kind, Problem, Tile | None]
Given = TypeVar("Given")
Got = TypeVar("Got")


def workers() -> int:
    """Processes to use: all CPUs but two, at most 14, each of which holds its own GPU context."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(14, count - 2))


def in_processes(
    work: Callable[[Given], Got],
    given: Sequence[Given],
    processes: int,
    seconds: float | None = None,
) -> list[Got | None]:
    """`work` of everything given, in order; in this process where `processes` is 1.

    Args:
        work: A function of a module, so that a worker can import it.
        given: What can be pickled.
        processes: How many.
        seconds: How long to wait for all; None = until the end.

    Returns:
        None in the place of what was not done in time, or by a process that died.
    """
    if processes <= 1 or len(given) <= 1:
        return [work(one) for one in given]
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(processes, len(given)), mp_context=context) as pool:
        futures = [pool.submit(work, one) for one in given]
        late = wait(futures, seconds).not_done
        for future in late:
            future.cancel()
        if late:
            # nobody waits for what they still do
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
    return [None if _is_lost(future) else future.result() for future in futures]


def _is_lost(future: Future[Any]) -> bool:
    return future.cancelled() or isinstance(future.exception(), BrokenProcessPool)


def compile_ahead(jobs: Sequence[Job], processes: int, seconds: float) -> list[str]:
    """Launch every job once in several processes; with one process nothing is to be gained by it.

    Args:
        jobs: (kind, problem, tile); tile None = the tables' choice.
        processes: How many work at it.
        seconds: How long to wait for all.

    Returns:
        The reasons of those that could not be launched.
    """
    if processes <= 1:
        return []
    found = in_processes(_launch, list(dict.fromkeys(jobs)), processes, seconds)
    return [reason for reason in found if reason]


def _launch(job: Job) -> str:
    kind, problem, tile = job
    try:
        _trial(problem).launch(kind, tile)()
        torch.cuda.synchronize()
    # a tile that does not fit raises one of several kinds
    except Exception as error:
        return f"{kind} {tile}: {type(error).__name__}: {error}"[:300]
    return ""


@cache
def _trial(problem: Problem):  # type: ignore[no-untyped-def]
    # needs triton, which a machine without a GPU may not have
    from llmprune_kernels.trials import Trial

    return Trial.of(problem, torch.device("cuda", torch.cuda.current_device()), copies=2)
