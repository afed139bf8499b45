"""Which tile is chosen, from which table, and how `tune` writes one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from llmprune_kernels import tiles, tune
from llmprune_kernels.bsr import BLOCK_SIDES
from llmprune_kernels.tiles import KINDS, SHARED_BYTES, Device, Problem, Tile

H200 = Device("NVIDIA H200", "sm_90", 132)
PROBLEM = Problem(512, 4096, 4096, 0.5, (128, 32), torch.bfloat16)


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """An empty place for the user's tables, and no answers of earlier tests."""
    monkeypatch.setenv(tiles.TABLES_VARIABLE, str(tmp_path))
    tiles.choose_tile.cache_clear()
    yield tmp_path
    tiles.choose_tile.cache_clear()


def write(path, *entries):
    path.write_text(json.dumps({"device": "d", "measured": True, "tiles": entries}))


def entry(tile, **changes):
    return {"kind": "matmul", "dtype": "half", "tile": asdict(tile)} | changes


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_default_table_has_a_tile_that_fits_for_every_problem(arch):
    device = Device("none", arch, 100)
    sizes = itertools.product((1, 16, 64, 100, 4096), (0.01, 1.0), BLOCK_SIDES, BLOCK_SIDES)
    for tokens, density, rows, columns in sizes:
        for kind, dtype in itertools.product(KINDS, (torch.float16, torch.float32)):
            if kind == "decode" and tokens > tiles.MAX_DECODE_TOKENS:
                continue
            problem = Problem(tokens, 4096, 4096, density, (rows, columns), dtype)
            tile = tiles.choose_tile(kind, device, problem)
            shared = tiles.shared_bytes(kind, tile, problem.block, dtype)
            assert shared <= SHARED_BYTES[arch], (kind, problem, tile)
            if kind not in ("tma", "grad_values"):
                assert tile.step <= 4 * (rows if kind == "grad_input" else columns)
            if kind == "decode":
                assert tile.block_m >= tokens
                assert tile.items >= 1


def test_default_table_says_that_nobody_measured_it():
    table = tiles.read_table(tiles.SHIPPED / "default.json")
    assert table["measured"] is False
    assert "nobody has measured" in table["note"]


def test_users_table_is_asked_before_the_default(tables):
    mine = Tile(32, 2, 2)
    other = replace(H200, name="other", arch="sm_89")
    before = tiles.choose_tile("matmul", other, PROBLEM)
    write(tables / "tiles-nvidia-h200.json", entry(mine, block=[128, 32]))
    tiles.choose_tile.cache_clear()
    assert before != mine
    assert tiles.choose_tile("matmul", H200, PROBLEM) == mine
    # what it does not hold is still found in the default
    assert tiles.choose_tile("matmul", H200, replace(PROBLEM, block=(64, 64))) != mine
    assert tiles.choose_tile("matmul", other, PROBLEM) == before


def test_nearest_entry_counts_every_number_it_names(tables):
    near, far = Tile(32, 2, 2), Tile(64, 2, 2)
    write(
        tables / "tiles-nvidia-h200.json",
        entry(far, tokens=512, in_features=1024, density=0.5),
        entry(near, tokens=256, in_features=4096, density=0.5),
        entry(Tile(128, 4, 2), tokens=512, in_features=4096, density=0.5, arch=["sm_80"]),
    )
    assert tiles.choose_tile("matmul", H200, PROBLEM) == near


def test_tile_is_made_to_fit_stages_first():
    wanted = Tile(128, 8, 5)
    small = replace(H200, arch="sm_86")
    fitted = tiles.fit("matmul", wanted, PROBLEM, small)
    assert (fitted.block_m, fitted.num_stages) == (128, 3)
    assert tiles.fit("matmul", wanted, PROBLEM, H200) == wanted


def test_decode_shares_more_when_there_are_few_rows():
    tile = Tile(8, 4, 4)
    few = Problem(1, 1024, 8192, 0.5, (128, 32), torch.float16)
    many = replace(few, out_features=65536)
    assert tiles.fit("decode", tile, few, H200).items > tiles.fit("decode", tile, many, H200).items
    # an item is never shorter than 256 inner elements
    assert tiles.fit("decode", tile, few, H200).items <= 8192 * 0.5 / 256
    assert tiles.fit("decode", tile, replace(few, density=0.01), H200).items == 1


def test_prompts_share_tiles_when_there_are_few():
    def items(problem, **tile):
        return tiles.fit("tma", Tile(128, 4, 4, **tile), problem, H200).items

    # 4 * 32 tiles for 132 processors; then 4 * 8
    assert items(PROBLEM) == 1
    few = replace(PROBLEM, out_features=1024)
    assert items(few) == 4
    # never under 512 inner elements
    assert items(replace(few, density=0.25)) == 2
    assert items(replace(few, density=0.01)) == 1
    # what a table asks for may put two on a processor, and is not carried to many tiles
    assert items(PROBLEM, items=2) == 2
    assert items(replace(PROBLEM, tokens=4096), items=2) == 1
    assert items(few, items=1) == 1


def test_programs_stay_where_there_are_more_tiles():
    values = torch.zeros(0, 128, 32, dtype=torch.bfloat16)
    large = Tile(256, 8, 6, 32, persistent=True)
    small = Tile(128, 4, 6, 32, persistent=True)
    # the stand-in of a CPU has 132 processors
    assert tiles.num_programs(large, values, 1792) == 132
    assert tiles.num_programs(small, values, 1792) == 264
    assert tiles.num_programs(small, values, 200) == 200
    # 8 stages of 16 KiB and half a tile: one fits
    assert tiles.num_programs(replace(small, num_stages=8), values, 1792) == 132
    assert tiles.fit("tma", replace(small, items=4), PROBLEM, H200).items == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a JSON object with 'tiles'"),
        ('{"tiles": [{"kind": "matmul", "dtype": "half"}]}', r"tiles\[0\]: 'tile'"),
        (
            '{"tiles": [{"kind": "matmul", "dtype": "half", "tile": {"block_m": 3, '
            '"num_warps": 4, "num_stages": 2}}]}',
            r"tiles\[0\]: tile: block_m must be a power of two, got 3",
        ),
        (
            '{"tiles": [{"kind": "other", "dtype": "half", "tile": {"block_m": 16, '
            '"num_warps": 4, "num_stages": 2}}]}',
            "unknown kind or dtype",
        ),
    ],
)
def test_broken_table_is_refused_by_file_and_entry(tables, text, message):
    path = tables / "tiles-nvidia-h200.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        tiles.choose_tile("matmul", H200, PROBLEM)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("gfx", "is_amd", "arch"),
    [("gfx942:sramecc+:xnack-", True, "gfx942"), ("NVIDIA H200", False, "sm_90")],
)
def test_an_architecture_is_that_of_the_build(gfx, is_amd, arch):
    """A build for CUDA fills AMD's field with the card's name, seen with torch 2.11."""
    found = SimpleNamespace(gcnArchName=gfx, major=9, minor=0)
    assert tiles.arch_of(found, is_amd=is_amd) == arch


def test_rows_in_parts_are_not_shared_where_there_are_enough():
    tile = Tile(8, 2, 5, rows=32)
    tall = Problem(1, 14336, 4096, 0.5, (128, 32), torch.bfloat16)
    wide = replace(tall, out_features=4096, in_features=14336)
    assert tiles.fit("decode", tile, tall, H200).items == 1
    assert tiles.fit("decode", tile, wide, H200).items > 1


@pytest.mark.parametrize("per_row", [1, 63, 64, 65, 300])
def test_one_item_is_a_whole_row_whatever_its_length(per_row):
    """A row a little longer than the one that was tuned would cost a second launch."""
    decode = pytest.importorskip("llmprune_kernels.decode")
    split, items = decode.split_rows(Tile(8, 2, 5, rows=32, items=1), (128, 32), per_row)
    assert items == 1
    assert split >= per_row
    split, items = decode.split_rows(Tile(8, 2, 5, items=4), (128, 32), per_row)
    assert items * split >= per_row
    assert items <= 4


@pytest.mark.parametrize("missing", ["us", "tokens", "density"])
def test_a_time_without_its_problem_is_refused(tables, missing):
    timed = entry(Tile(32, 2, 2), us=1.0, dense_us=2.0, tokens=16, density=0.5)
    del timed[missing]
    write(tables / "tiles-nvidia-h200.json", timed)
    with pytest.raises(ValueError, match=rf"tiles\[0\]: '{missing}'"):
        tiles.choose_tile("matmul", H200, PROBLEM)


@pytest.mark.parametrize("rows", [8, 24])
def test_rows_of_a_part_fill_a_tensor_core(rows):
    with pytest.raises(
        ValueError, match=f"rows must be 0 or a power of two from 16 on, got {rows}"
    ):
        Tile(8, 2, 5, rows=rows)


def test_tuned_entry_replaces_the_one_of_the_same_problem(tables):
    path = tiles.user_table(H200)
    for tile in (Tile(32, 2, 2), Tile(64, 4, 3)):
        tune.write_table(path, H200, tune.entry_of(PROBLEM, "matmul", tile, 10.0, 20.0))
    other = replace(PROBLEM, tokens=4096)
    tune.write_table(path, H200, tune.entry_of(other, "matmul", Tile(128, 8, 3), 1.0, 2.0))
    table = tiles.read_table(path)
    assert [entry["tile"]["block_m"] for entry in table["tiles"]] == [64, 128]
    assert table["measured"]
    assert table["tiles"][0]["dense_us"] == 20.0
    assert list(tables.iterdir()) == [path]
    assert tiles.choose_tile("matmul", H200, PROBLEM) == Tile(64, 4, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_refuses_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert "measures on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "48x32"], "block sides must be two of"),
        (["--shapes", "100x64"], "must divide the weight"),
        (["--densities", "0"], "densities in (0, 1]"),
        (["--shapes", "64"], "ROWSxCOLUMNS"),
    ],
)
def test_tune_refuses_problems_that_do_not_exist(arguments, message, capsys):
    assert tune.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_tiles_are_shared_where_there_are_few_and_stay_where_there_are_many():
    pytest.importorskip("triton")
    from llmprune_kernels.trials import candidates

    few = candidates("tma", replace(PROBLEM, out_features=1024), H200)
    assert {tile.items for tile in few} == {1, 2, 4, 8}
    assert not any(tile.persistent for tile in few)
    many = candidates("tma", replace(PROBLEM, tokens=4096, out_features=14336), H200)
    assert {tile.items for tile in many} == {1}
    staying = [tile for tile in many if tile.persistent]
    assert len(staying) > 4
    # a program that stays takes blocks one by one
    assert {tile.step for tile in staying} == {32}
    assert len(many) > len(staying)


def test_one_kind_of_kernel_is_tuned(monkeypatch, capsys):
    pytest.importorskip("triton")
    from llmprune_kernels import precompile, trials

    jobs, tuned = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "device_of", lambda device: H200)
    monkeypatch.setattr(trials.Trial, "of", lambda *given: None)
    monkeypatch.setattr(precompile, "compile_ahead", lambda given, *rest: jobs.extend(given))
    monkeypatch.setattr(trials, "fastest", lambda trial, kind, *rest: tuned.append(kind))
    problem = ["--shapes", "4096x4096", "--blocks", "128x32", "--tokens", "512"]
    assert tune.main([*problem, "--densities", "0.5", "--kinds", "tma"]) == 0
    assert tuned == ["tma"]
    assert {kind for kind, *_ in jobs} == {"tma"}
    # how many share a tile is a number of the compiler's
    assert {tile.items for *_, tile in jobs} == {1, 2, 4}
    assert tune.main([*problem, "--kinds", "tma,other"]) == 2
    assert "kinds must be of matmul, tma" in capsys.readouterr().err


def test_candidates_fit_the_gpu_and_begin_with_the_tables_answer():
    pytest.importorskip("triton")
    from llmprune_kernels.trials import candidates

    for kind in KINDS:
        problem = replace(PROBLEM, tokens=16) if kind == "decode" else PROBLEM
        found = candidates(kind, problem, H200)
        assert found[0] == tiles.choose_tile(kind, H200, problem)
        assert len(found) == len(set(found)) > 3
        for tile in found:
            shared = tiles.shared_bytes(kind, tile, problem.block, problem.dtype)
            assert shared <= SHARED_BYTES["sm_90"]


def test_package_and_tables_work_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import llmprune_kernels, llmprune_kernels.tiles, llmprune_kernels.tune\n"
        "from llmprune_kernels.triton_runtime import has_triton, is_interpreting\n"
        "assert not has_triton() and not is_interpreting()\n"
        "sys.exit(llmprune_kernels.tune.main([]))\n"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "with Triton, and here is none" in done.stderr
