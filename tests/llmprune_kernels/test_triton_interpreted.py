"""Each case of `interpreted_cases.py`, run in a process in which Triton interprets."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")
CASES = Path(__file__).with_name("interpreted_cases.py")
_spec = importlib.util.spec_from_file_location("interpreted_cases", CASES)
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """What went wrong in a case, by speed and name; one process of each speed for all workers."""
    worker = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if worker else base

    @cache
    def outcomes(speed: str) -> dict[str, str]:
        file = folder / f"interpreted-{speed}.json"
        with (folder / f"interpreted-{speed}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                file.write_text(_run(speed), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    return lambda speed, name: outcomes(speed)[name]


def _run(speed: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(CASES), speed], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", cases.FAST)
def test_interpreted_kernel_equals_its_definition(name, outcome):
    assert outcome("fast", name) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.SLOW)
def test_interpreted_kernel_equals_its_definition_for_every_block(name, outcome):
    assert outcome("slow", name) == ""
