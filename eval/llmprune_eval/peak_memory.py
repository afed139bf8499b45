"""Peak memory of loading a saved model, one prefill and some decode steps.

On the CPU a fresh process runs `python -m llmprune_eval.peak_memory FOLDER` and prints JSON: memory
that this process has once touched would hide the model's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import InputError
from llmprune_eval.inference import check_count, check_length, device_of, eval_mode, vocab_size_of
from llmprune_eval.timing import decode_greedily, prefill

DEFAULT_LOADER = "llmprune.checkpoint:load_pruned"
_SECRET_MARKS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


@dataclass(frozen=True)
class PeakMemory:
    """Memory of one run.

    Attributes:
        peak_bytes: Highest resident memory of the process (CPU), or highest allocated memory of
            the device (CUDA). On the CPU the mapped pages of the weight file count as well.
        before_bytes: The same just before the model was loaded, libraries imported.
        device: "cpu" or "cuda".
    """

    peak_bytes: int
    before_bytes: int
    device: str

    @property
    def model_bytes(self) -> int:
        """What the model took: weights, KV cache and activations."""
        return self.peak_bytes - self.before_bytes


def measure_peak_memory(
    folder: str | Path,
    *,
    loader: str = DEFAULT_LOADER,
    device: str = "cpu",
    batch_size: int = 1,
    context: int = 128,
    new_tokens: int = 4,
    dtype: str | None = None,
) -> PeakMemory:
    """Measure the peak memory of loading a saved model, one prefill and `new_tokens` steps.

    Args:
        folder: The saved model.
        loader: `module:function` that takes the folder and gives a Hugging Face causal LM.
        device: "cpu" (measured in a fresh process) or a CUDA device (in this one).
        batch_size: Rows of random tokens.
        context: Tokens in a row.
        new_tokens: Decode steps.
        dtype: Given to the loader as `dtype`; None leaves it to the loader.

    Raises:
        InputError: No such folder, a count below 1, no such loader, or the model doesn't load and
            run there.
    """
    if not Path(folder).is_dir():
        raise InputError(f"peak memory needs the folder of a saved model, got {folder}; save first")
    sizes = {"batch_size": batch_size, "context": context, "new_tokens": new_tokens}
    for name, value in sizes.items():
        check_count(name, value, 1)
    if torch.device(device).type == "cuda":
        load = _loader(loader, dtype)
        return _measure_cuda(Path(folder), load, torch.device(device), **sizes)
    command = [sys.executable, "-m", "llmprune_eval.peak_memory", str(folder), "--loader", loader]
    command += [] if dtype is None else ["--dtype", dtype]
    for name, value in sizes.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    child = subprocess.run(command, env=_child_environment(), capture_output=True, text=True)
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"{folder}: a saved model must load and run in a fresh process, got exit code "
            f"{child.returncode}: {last}; run `python {' '.join(command[1:])}` to see all of it"
        )
    return PeakMemory(**json.loads(child.stdout.strip().splitlines()[-1]))


def _child_environment() -> dict[str, str]:
    """This process's environment and import path, without what looks like a secret."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not any(mark in name.upper() for mark in _SECRET_MARKS)
    }
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return kept | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _measure_cuda(
    folder: Path, load: Callable[..., Any], device: torch.device, **sizes: int
) -> PeakMemory:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _run(load(folder).to(device), **sizes)
    torch.cuda.synchronize(device)
    return PeakMemory(torch.cuda.max_memory_allocated(device), before, "cuda")


def _measure_here(folder: Path, load: Callable[..., Any], **sizes: int) -> PeakMemory:
    # The loader would import it anyway; it is no part of the model's share.
    importlib.import_module("transformers.modeling_utils")
    before = _resident_bytes("VmRSS")
    _run(load(folder), **sizes)
    return PeakMemory(_resident_bytes("VmHWM"), before, "cpu")


def _run(model: Any, *, batch_size: int, context: int, new_tokens: int) -> None:
    check_length(model, context + new_tokens, what="peak memory context + new_tokens")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size_of(model), (batch_size, context), generator=generator)
    with eval_mode(model):
        decode_greedily(model, prefill(model, ids.to(device_of(model))), new_tokens)


def _resident_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its highest.

    Not `ru_maxrss` where Linux has better: an exec'd child begins with its parent's peak there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    # Here, not above: Windows has no such module, and the rest of this one works there.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _loader(name: str, dtype: str | None) -> Callable[..., Any]:
    load = _resolve(name)
    return load if dtype is None else partial(load, dtype=getattr(torch, dtype))


def _resolve(loader: str) -> Callable[..., Any]:
    module, sign, function = loader.partition(":")
    if not (module and sign and function):
        raise InputError(f"loader must be module:function, got {loader!r}")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"loader must name an importable function, got: {error}") from error


def main() -> None:
    """Measure in this process and print the fields of PeakMemory as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m llmprune_eval.peak_memory")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loader", default=DEFAULT_LOADER)
    parser.add_argument("--dtype")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=4)
    arguments = vars(parser.parse_args())
    load = _loader(arguments.pop("loader"), arguments.pop("dtype"))
    print(json.dumps(asdict(_measure_here(arguments.pop("folder"), load, **arguments))))


if __name__ == "__main__":
    main()
