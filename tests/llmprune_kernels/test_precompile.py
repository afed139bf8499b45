"""Work in several processes: results in order, in processes of their own."""

from __future__ import annotations

import os

import pytest

from llmprune_kernels import precompile
from llmprune_kernels.tiles import Problem


def test_one_process_is_this_one():
    assert precompile.in_processes(_where, [1, 2], processes=1) == [
        (1, os.getpid()),
        (2, os.getpid()),
    ]


@pytest.mark.slow
def test_several_processes_keep_the_order():
    found = precompile.in_processes(abs, list(range(-8, 0)), processes=2)
    assert found == list(range(8, 0, -1))


def test_a_job_that_cannot_run_says_why_and_stops_nothing():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    problem = Problem(1, 64, 64, 0.5, (16, 16), torch.float16)
    jobs = [("decode", problem, None), ("matmul", problem, None), ("decode", problem, None)]
    found = precompile.compile_ahead(jobs, processes=1)
    # the same job once
    assert [reason.split()[0] for reason in found] == ["decode", "matmul"]


def test_a_machine_keeps_cpus_for_itself(monkeypatch):
    counts = {None: 1, 1: 1, 2: 1, 16: 14, 96: 14}
    for cpus, wanted in counts.items():
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert precompile.workers() == wanted


def _where(number):
    return number, os.getpid()
