"""Work in several processes: results in order, in processes of their own."""

from __future__ import annotations

import os
import time

import pytest
import torch

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


@pytest.mark.slow
def test_what_takes_too_long_or_dies_is_left_out():
    started = time.monotonic()
    found = precompile.in_processes(time.sleep, [0.0, 600.0], processes=2, seconds=20.0)
    # a sleep returns None as well; what matters is that nobody waited for it
    assert found == [None, None]
    assert time.monotonic() - started < 120
    assert precompile.in_processes(os._exit, [3, 3], processes=2) == [None, None]


def test_one_process_compiles_nothing_ahead():
    problem = Problem(1, 64, 64, 0.5, (16, 16), torch.float16)
    assert precompile.compile_ahead([("decode", problem, None)], processes=1, seconds=1.0) == []


def test_a_machine_keeps_cpus_for_itself(monkeypatch):
    for cpus, wanted in {1: 1, 2: 1, 16: 14, 96: 14}.items():
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cpus=cpus: set(range(cpus)))
        assert precompile.workers() == wanted


def _where(number):
    return number, os.getpid()
