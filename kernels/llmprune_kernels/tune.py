"""`python -m llmprune_kernels.tune`: measure tiles on this GPU and write the user's table.

Every candidate is checked against float64 before it is timed. The table is written, whole or not
at all, after every problem, so that a run cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmprune_kernels import gpu_speed, tiles
from llmprune_kernels.bsr import check_block
from llmprune_kernels.precompile import Job, workers
from llmprune_kernels.tiles import Device, Kind, Problem
from llmprune_kernels.triton_runtime import has_triton

SHAPES = "4096x4096,14336x4096,4096x14336"
BLOCKS = "128x32,64x64"
TOKENS = "1,16,512,4096"
DENSITIES = "0.5,0.25"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NO_GPU = (
    "llmprune_kernels.tune measures on a GPU, with Triton, and here is none; a GPU without a table "
    "of its own gets the tiles of the shipped default"
)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 2 with a message when there is no GPU or an option is wrong."""
    options = _parser().parse_args(arguments)
    try:
        problems = list(read_problems(options))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not (torch.cuda.is_available() and has_triton()):
        print(NO_GPU, file=sys.stderr)
        return 2
    # needs triton, which a machine without a GPU may not have
    from llmprune_kernels import precompile, trials

    place = torch.device("cuda", torch.cuda.current_device())
    device = tiles.device_of(place)
    path = tiles.user_table(device)
    deadline = time.monotonic() + options.budget_s
    wanted = options.kinds.split(",")
    jobs = [job for job in different(problems, device) if job[0] in wanted]
    precompile.compile_ahead(jobs, options.processes, options.budget_s / 2)
    for problem in problems:
        if time.monotonic() > deadline:
            print(f"{options.budget_s} s are over; {path} holds what was measured")
            break
        trial = trials.Trial.of(problem, place)
        for kind in (kind for kind in kinds_for(problem, device) if kind in wanted):
            found = trials.fastest(trial, kind, device, deadline)
            if found is None:
                print(f"no {kind} tile is correct for {problem}", file=sys.stderr)
                continue
            tile, timing, dense = found
            entry = entry_of(problem, kind, tile, timing.median_us, dense.median_us)
            write_table(path, device, entry)
            print(json.dumps(entry))
    return 0


def read_problems(options: argparse.Namespace) -> Iterator[Problem]:
    """Every combination of the options.

    Raises:
        ValueError: A block does not divide a shape, or a number is out of range.
    """
    shapes, blocks = _pairs(options.shapes, "shape"), _pairs(options.blocks, "block")
    for block, shape in itertools.product(blocks, shapes):
        check_block(block, *shape)
    tokens = [int(number) for number in options.tokens.split(",")]
    densities = [float(number) for number in options.densities.split(",")]
    if unknown := set(options.kinds.split(",")) - set(tiles.KINDS):
        raise ValueError(f"kinds must be of {', '.join(tiles.KINDS)}, got {sorted(unknown)}")
    if min(tokens) < 1 or not all(0 < density <= 1 for density in densities):
        raise ValueError(
            f"tokens must be at least 1 and densities in (0, 1], got {tokens} and {densities}"
        )
    dtype = DTYPES[options.dtype]
    for density, shape, block, count in itertools.product(densities, shapes, blocks, tokens):
        yield Problem(count, *shape, density, block, dtype)


def kinds_for(problem: Problem, device: Device) -> list[Kind]:
    """The kinds of kernel that run a problem on a device."""
    forward = gpu_speed.forward_kinds(problem, device)
    if problem.tokens <= tiles.MAX_DECODE_TOKENS:
        return forward
    return [*forward, "swiglu", "grad_input", "grad_values"]


def different(problems: list[Problem], device: Device) -> list[Job]:
    """What has to be compiled: a job for every tile, block and kind of number of tokens.

    Shapes are no compile-time numbers of a kernel. Of densities it matters whether rows fill whole
    steps; what a problem compiles anew for that is compiled when it is timed.
    """
    from llmprune_kernels import trials

    jobs: dict[Any, Job] = {}
    for problem in problems:
        for kind in kinds_for(problem, device):
            for tile in trials.candidates(kind, problem, device):
                # Triton compiles anew for one, and for a multiple of 16
                tokens = (problem.tokens == 1, problem.tokens % 16 == 0)
                # how many share a row is no number of decode's compiler
                same = replace(tile, items=min(tile.items, 2)) if kind == "decode" else tile
                key = (kind, same, problem.block, problem.dtype, tokens)
                jobs.setdefault(key, (kind, problem, tile))
    return list(jobs.values())


def entry_of(
    problem: Problem, kind: Kind, tile: tiles.Tile, us: float, dense_us: float
) -> dict[str, Any]:
    """A table's entry; `dense_us` is the dense layer's time for the same tokens."""
    return {
        "kind": kind,
        "dtype": "float" if problem.dtype == torch.float32 else "half",
        "block": list(problem.block),
        "tokens": problem.tokens,
        "out_features": problem.out_features,
        "in_features": problem.in_features,
        "density": problem.density,
        "tile": asdict(tile),
        "us": round(us, 2),
        "dense_us": round(dense_us, 2),
    }


def write_table(path: Path, device: Device, entry: dict[str, Any]) -> None:
    """Add an entry, in the place of an earlier one of the same problem; whole or not at all."""
    old = tiles.read_table(path)["tiles"] if path.exists() else []
    kept = [other for other in old if _key(other) != _key(entry)]
    table = {
        "device": device.name,
        "arch": device.arch,
        "measured": True,
        "note": f"written by llmprune_kernels.tune with torch {torch.__version__}",
        "date": datetime.now(UTC).date().isoformat(),
        "tiles": [*kept, entry],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump(table, file, indent=1)
    os.replace(file.name, path)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    named = [entry.get(name) for name in ("kind", "dtype", *tiles.NUMBERS)]
    return (*named, tuple(entry.get("block", ())))


def _pairs(text: str, name: str) -> list[tuple[int, int]]:
    pairs = [tuple(int(side) for side in part.split("x")) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"every {name} must be written as ROWSxCOLUMNS, got {text}")
    return [(pair[0], pair[1]) for pair in pairs]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llmprune_kernels.tune", description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help=f"OUTxIN,... (default {SHAPES})")
    parser.add_argument("--blocks", default=BLOCKS, help=f"ROWSxCOLUMNS,... (default {BLOCKS})")
    parser.add_argument("--tokens", default=TOKENS, help=f"default {TOKENS}")
    parser.add_argument("--densities", default=DENSITIES, help=f"default {DENSITIES}")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument(
        "--kinds", default=",".join(tiles.KINDS), help="of kernel, default all that a problem has"
    )
    parser.add_argument("--budget-s", type=float, default=600.0, help="seconds, default 600")
    parser.add_argument(
        "--processes", type=int, default=workers(), help="that compile, default all CPUs but two"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
