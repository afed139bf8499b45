"""Builds the C++ library of `native/` into a cache folder, once for each source and compiler.

The folder is `native` in LLMPRUNE_CACHE or ~/.cache/llmprune. A build goes to a name of its own
there and is renamed: processes that build at one time each end with a whole file, and the last one
stays.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_SWITCH, _COMPILER, _CACHE = "LLMPRUNE_KERNELS_NATIVE", "CXX", "LLMPRUNE_CACHE"
# It takes three seconds on a machine that has nothing else to do.
_TIMEOUT_S = 300


class BuildError(Exception):
    """The library could not be built or loaded; the message says why in one line."""


def is_switched_off() -> bool:
    """Whether LLMPRUNE_KERNELS_NATIVE is 0.

    Raises:
        ValueError: It is neither 0, 1 nor empty.
    """
    switch = os.environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{_SWITCH} must be 0 or 1, got {switch!r}")
    return switch == "0"


def find_compiler() -> str | None:
    """Path of the C++ compiler: what CXX names, or the first of c++, g++ and clang++."""
    named = os.environ.get(_COMPILER)
    names = [named] if named else ["c++", "g++", "clang++"]
    found = (shutil.which(name) for name in names)
    return next((path for path in found if path), None)


def load() -> ctypes.CDLL:
    """The library, from the cache if it is there.

    Raises:
        BuildError: There is no compiler, it failed, or what it made can't be loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (install g++ or set CXX)")
    path = _folder() / f"block_sparse-{_key(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A file that another system left there, or a damaged one.
        _build(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"what {compiler} made can't be loaded ({error})") from error


def _folder() -> Path:
    folder = Path(os.environ.get(_CACHE) or "~/.cache/llmprune").expanduser() / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"no cache folder {folder} (set {_CACHE}): {error}") from error
    return folder


def _key(compiler: str) -> str:
    """Hash of all that the file depends on."""
    version = _run([compiler, "--version"]).stdout
    parts = [path.read_text() for path in sorted(SOURCE.iterdir())]
    parts += [" ".join(_FLAGS), version, torch.__version__, platform.platform()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".building")
    except OSError as error:
        raise BuildError(f"can't write to {path.parent} (set {_CACHE}): {error}") from error
    os.close(handle)
    try:
        source = str(SOURCE / "block_sparse.cpp")
        # A compiler without OpenMP gives a library of one thread.
        for threads in (["-fopenmp"], []):
            done = _run([compiler, *_FLAGS, *threads, source, "-o", name])
            if done.returncode == 0:
                os.replace(name, path)
                return
        raise BuildError(f"{compiler} failed: {_first_error(done.stderr)}")
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
