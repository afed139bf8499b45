"""Kernels compiled for GPUs that are not here: what the compiler made of them.

A kernel with spills, with serialized matrix instructions, with one-element loads or with a shallow
pipeline computes the same numbers, slowly; only these tests would notice.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("an interpreted kernel can't be compiled", allow_module_level=True)

import triton

from llmprune_kernels import densify, matmul, tiles
from llmprune_kernels.tiles import SHARED_BYTES, Device, Problem, Tile

_spec = importlib.util.spec_from_file_location(
    "compiling", Path(__file__).with_name("compiling.py")
)
compiling = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compiling)

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
ARCHS = ("sm_80", "sm_90", "sm_100")
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
DTYPES = {"half": torch.bfloat16, "float": torch.float32}
# the table was made with Triton 3.9; before, two registers were spilled in one of its tiles
SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 8
# the block that an entry for any columns (or rows) is compiled with: merged, as the default is
NARROW = 32


@pytest.fixture
def in_loop_kernel(monkeypatch: pytest.MonkeyPatch):
    """The control of the benchmark's comparison."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import in_loop_kernel

    return in_loop_kernel.in_loop_kernel


def shipped(arch: str) -> list:
    """Entries of the default table, and of the measured ones of an architecture."""
    tables = [tiles.read_table(path) for path in sorted(tiles.SHIPPED.glob("tiles-*.json"))]
    found = [entry for table in tables if table["arch"] == arch for entry in table["tiles"]]
    return [*tiles.read_table(tiles.SHIPPED / "default.json")["tiles"], *found]


def entries(arch: str) -> list:
    """(kind, width, block, tile) of every entry of the shipped tables, fitted to a GPU."""
    device = Device("none", arch, 132)
    found: dict = {}
    for entry in shipped(arch):
        kind = entry["kind"]
        if arch not in entry.get("arch", [arch]) or (kind == "tma" and arch == "sm_80"):
            continue
        block = tuple(side or NARROW for side in entry["block"])
        dtype = DTYPES[entry["dtype"]]
        problem = Problem(entry.get("tokens", 512), 4096, 4096, 0.5, block, dtype)
        tile = tiles.fit(kind, Tile(**entry["tile"]), problem, device)
        # how many share a row is no number of the compiler's
        found.setdefault((kind, entry["dtype"], block, replace(tile, items=1)))
    return [
        pytest.param(arch, *case, id=f"{arch}-{number}-{case[0]}-{case[1]}-{case[2]}")
        for number, case in enumerate(found)
    ]


def compiled(arch, kind, width, block, tile):
    """Every kernel that the launchers of a kind run with a tile."""
    return [
        compiling.Compiled(
            kernel,
            arch,
            constants,
            dtype=compiling.NAMES[DTYPES[width]],
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            types=types,
        )
        for _, kernel, constants, types in compiling.launches(kind, tile, block, DTYPES[width])
    ]


def check(binary, kind, width, block, tile):
    # a gate, or others' sums, are read when all sums are held: a few registers, once a program
    reads = kind == "tma" and (binary.is_gated or binary.is_shared)
    assert binary.stack_bytes <= (128 if reads else SPILLED)
    assert binary.shared_bytes <= SHARED_BYTES[binary.arch]
    # a few barriers beside the buffers
    assert binary.shared_bytes <= max(
        tiles.shared_bytes(kind, tile, block, DTYPES[width]) + 256, 32 << 10
    )
    # items that share a tile count themselves done; nothing is summed by atomics
    assert binary.uses_atomics == binary.is_shared
    assert not re.search(r"^\s*(@%\w+ )?(atom|red)\.\S*\.b?f(16|32)", binary.ptx, re.MULTILINE)
    if tile.block_m == 1:
        return
    assert binary.buffers
    assert min(binary.buffers) >= tile.num_stages - 1
    if kind == "tma":
        assert binary.count("cp.async.bulk.tensor") > 0
    else:
        assert binary.count("cp.async.c") > 0
        # what was fetched ahead stays under way; a loop that waits for all of it has no depth
        assert max(binary.waits) >= min(1, tile.num_stages - 2)
        # bias is read once; blocks and tokens never one element at a time
        assert binary.count("ld.global.b16") <= 2
    if width == "half":
        assert binary.count(MATRIX[binary.arch]) or binary.count("mma.sync")
    if binary.count("wgmma"):
        assert "C7511" not in binary.assembler_log


FAST = [
    ("sm_80", "matmul", "half", (128, 32), Tile(128, 8, 4)),
    ("sm_90", "matmul", "half", (128, 32), Tile(256, 8, 3)),
    ("sm_90", "decode", "half", (128, 32), Tile(16, 4, 4)),
    ("sm_100", "tma", "half", (64, 64), Tile(128, 4, 4)),
    ("sm_90", "tma", "half", (128, 32), Tile(256, 8, 6, 32, persistent=True, swap=True)),
]


@pytest.mark.parametrize(("arch", "kind", "width", "block", "tile"), FAST)
def test_kernel_is_fast_code(arch, kind, width, block, tile):
    for binary in compiled(arch, kind, width, block, tile):
        check(binary, kind, width, block, tile)
        assert binary.count(MATRIX[arch]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kind", "width", "block", "tile"), [case for arch in ARCHS for case in entries(arch)]
)
def test_every_shipped_tile_is_fast_code(arch, kind, width, block, tile):
    for binary in compiled(arch, kind, width, block, tile):
        check(binary, kind, width, block, tile)


@pytest.mark.slow
@pytest.mark.parametrize("block", [(64, 16), (64, 64), (128, 128)])
@pytest.mark.parametrize("kind", ["matmul", "grad_input", "swiglu"])
def test_blocks_that_are_merged_or_split_keep_the_pipeline(kind, block):
    device = Device("none", "sm_90", 132)
    tile = tiles.choose_tile(kind, device, Problem(512, 4096, 4096, 0.5, block, torch.bfloat16))
    for binary in compiled("sm_90", kind, "half", block, tile):
        check(binary, kind, "half", block, tile)
        assert binary.count("wgmma.mma_async") > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matmul", "decode", "grad_input", "grad_values", "swiglu"])
def test_kernels_compile_for_amd_without_spills(kind):
    device = Device("none", "gfx942", 304)
    problem = Problem(16 if kind == "decode" else 512, 4096, 4096, 0.5, (64, 32), torch.bfloat16)
    tile = tiles.choose_tile(kind, device, problem)
    for binary in compiled("gfx942", kind, "half", (64, 32), tile):
        assert binary.count("mfma") > 0
        assert binary.count("vgpr_spill_count: 0") == 1
        assert binary.shared_bytes <= SHARED_BYTES["gfx942"]


def test_densify_moves_sixteen_bytes_at_a_time():
    binary = compiling.Compiled(
        densify.densify_kernel,
        "sm_90",
        {"BN": 128, "BK": 32},
        dtype="bf16",
        num_warps=4,
        num_stages=1,
        aligned=("in_features",),
    )
    assert binary.count("ld.global.v4") > 0
    assert binary.count("st.global.v4") > 0
    assert binary.count("ld.global.b16") == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_an_index_loaded_inside_the_loop_loses_the_pipeline(arch, in_loop_kernel):
    """What `check` asks of the depth: a kernel that loads its index in the loop fails it."""
    tile, block = Tile(128, 8, 4), (128, 32)
    constants = matmul.constants(tile, block, torch.bfloat16, ragged=False)
    depth = {}
    for kernel in (matmul.linear_kernel, in_loop_kernel):
        bias = {"HAS_BIAS": False} if kernel is matmul.linear_kernel else {}
        binary = compiling.Compiled(
            kernel, arch, constants | bias, dtype="bf16", num_warps=8, num_stages=tile.num_stages
        )
        # without a pipeline there are no buffers at all
        depth[kernel] = min(binary.buffers, default=0)
    assert depth[matmul.linear_kernel] >= tile.num_stages - 1 > depth[in_loop_kernel]
