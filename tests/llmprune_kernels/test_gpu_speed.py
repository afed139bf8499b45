"""Which GPU kernel is expected to be fastest, from tables that are made up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llmprune_kernels import dispatch, gpu_speed, tiles
from llmprune_kernels.tiles import Device, Problem
from llmprune_kernels.work import Work

H200 = Device("NVIDIA H200", "sm_90", 132)
PREFILL = Problem(4096, 4096, 4096, 0.5, (128, 32), torch.bfloat16)
TILE = {"block_m": 128, "num_warps": 8, "num_stages": 3}


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """Gives a function that writes a measured table of (kind, tokens, us, dense us, density)."""
    monkeypatch.setenv(tiles.TABLES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "none")
    gpu_speed.estimate.cache_clear()

    def write(*rows, measured=True):
        entries = [
            {
                "kind": kind,
                "dtype": "half",
                "block": [128, 32],
                "tokens": tokens,
                "density": density,
                "tile": TILE,
                "us": us,
                "dense_us": dense_us,
            }
            for kind, tokens, us, dense_us, density in rows
        ]
        content = {"device": "d", "measured": measured, "tiles": entries}
        (tmp_path / "tiles-nvidia-h200.json").write_text(json.dumps(content))
        gpu_speed.estimate.cache_clear()

    yield write
    gpu_speed.estimate.cache_clear()


def test_without_a_table_a_roofline_decides_and_says_so():
    few = gpu_speed.estimate(replace(PREFILL, tokens=16), H200)
    many = gpu_speed.estimate(PREFILL, H200)
    assert (few.kernel, many.kernel) == ("decode", "matmul")
    assert not few.measured_on
    assert few.speedup == pytest.approx(1.7)
    assert many.speedup == pytest.approx(1.14)


def test_the_fastest_measured_kernel_is_taken(table):
    table(("matmul", 4096, 100.0, 120.0, 0.5), ("tma", 4096, 80.0, 120.0, 0.5))
    assert gpu_speed.estimate(PREFILL, H200) == gpu_speed.Estimate("tma", 1.5, "d")
    older = replace(H200, arch="sm_80")
    assert gpu_speed.estimate(PREFILL, older).kernel == "matmul"
    single = replace(PREFILL, dtype=torch.float32)
    assert not gpu_speed.estimate(single, H200).measured_on


def test_a_denser_problem_is_slower_in_proportion(table):
    table(("matmul", 4096, 60.0, 120.0, 0.5))
    assert gpu_speed.estimate(replace(PREFILL, density=0.8), H200).speedup == pytest.approx(1.25)


def test_an_entry_says_nothing_of_far_other_numbers_of_tokens(table):
    table(("matmul", 4096, 60.0, 120.0, 0.5))
    assert gpu_speed.estimate(replace(PREFILL, tokens=1024), H200).measured_on
    assert not gpu_speed.estimate(replace(PREFILL, tokens=512), H200).measured_on
    # but many tokens speak for any number of more
    assert gpu_speed.estimate(replace(PREFILL, tokens=1 << 20), H200).speedup == pytest.approx(2.0)
    table(("matmul", 1024, 60.0, 120.0, 0.5))
    assert not gpu_speed.estimate(replace(PREFILL, tokens=8192), H200).measured_on


def test_between_few_and_many_tokens_both_kernels_are_asked(table):
    table(("decode", 64, 20.0, 30.0, 0.5), ("matmul", 128, 25.0, 30.0, 0.5))
    assert gpu_speed.estimate(replace(PREFILL, tokens=64), H200).kernel == "decode"
    table(("decode", 64, 40.0, 30.0, 0.5), ("matmul", 128, 25.0, 30.0, 0.5))
    assert gpu_speed.estimate(replace(PREFILL, tokens=64), H200).kernel == "matmul"
    # more than its tile holds
    assert gpu_speed.estimate(replace(PREFILL, tokens=65), H200).kernel == "matmul"


def test_a_table_that_nobody_measured_is_not_believed(table):
    table(("matmul", 4096, 60.0, 120.0, 0.5), measured=False)
    assert not gpu_speed.estimate(PREFILL, H200).measured_on


@pytest.mark.parametrize(("tokens", "times"), [(1, 3.63), (512, 1.91), (2048, 1.26), (4096, 1.11)])
def test_writing_the_weight_out_takes_as_long_as_on_an_h200(tokens, times):
    """14336x4096, density 0.5, measured: kernels/benchmarks/results/nvidia-h200.md."""
    tall = replace(PREFILL, out_features=14336, tokens=tokens)
    assert 1 / gpu_speed.densify_speedup(tall) == pytest.approx(times, rel=0.05)


def test_a_gpu_without_a_table_asks_one_of_its_architecture(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tiles, "SHIPPED", shipped)
    entry = {"kind": "tma", "dtype": "half", "tokens": 4096, "density": 0.5, "tile": TILE}
    for arch, us in (("sm_90", 50.0), ("sm_80", 25.0)):
        one = {"device": arch, "arch": arch, "measured": True}
        one["tiles"] = [entry | {"us": us, "dense_us": 100.0}]
        (shipped / f"tiles-{arch}.json").write_text(json.dumps(one))
    other = replace(H200, name="NVIDIA H100")
    assert gpu_speed.estimate(PREFILL, other) == gpu_speed.Estimate("tma", 2.0, "sm_90")
    newer = replace(other, arch="sm_100")
    assert not gpu_speed.estimate(PREFILL, newer).measured_on


@pytest.fixture
def h200(monkeypatch):
    """Choices as on an H200, with the shipped tables."""
    monkeypatch.undo()
    monkeypatch.setattr(gpu_speed, "this_device", lambda: H200)
    for cached in (gpu_speed.estimate, dispatch._on_gpu):
        cached.cache_clear()
    yield
    for cached in (gpu_speed.estimate, dispatch._on_gpu):
        cached.cache_clear()


def choice(tokens, density=0.5, block=(128, 32), shape=(14336, 4096)):
    work = Work("cuda", torch.bfloat16, tokens, shape[1], shape[0], block, density)
    return dispatch.choose_backend(work)


@pytest.mark.usefixtures("h200")
def test_an_h200_runs_what_was_fastest_there(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv(tiles.TABLES_VARIABLE, str(tmp_path))
    for tokens, kernel, least in ((1, "decode", 1.7), (16, "decode", 1.6), (64, "tma", 1.6)):
        found = choice(tokens)
        assert (found.backend, found.kernel) == ("triton", kernel)
        assert found.speedup >= least
        assert "times on NVIDIA H200" in found.reason
    for tokens in (512, 4096, 1 << 17):
        assert choice(tokens).kernel == "tma"
    for block, least in (((64, 64), 1.1), ((128, 64), 1.6)):
        found = choice(4096, block=block)
        assert found.kernel == "tma"
        assert found.speedup >= least
    # half as fast as dense: writing the weight out is faster
    assert choice(4096, block=(32, 32)).backend == "densify"


@pytest.mark.usefixtures("h200")
def test_the_less_slow_of_two_slow_ways_runs(tmp_path, monkeypatch):
    """At 512 tokens writing the weight out takes twice as long as the dense product."""
    pytest.importorskip("triton")
    monkeypatch.setenv(tiles.TABLES_VARIABLE, str(tmp_path))
    found = choice(512, density=0.75, shape=(4096, 4096))
    assert found.backend == "triton"
    assert 0.7 < found.speedup < 1.0
    assert choice(512, density=1.0, block=(32, 32)).backend == "densify"


@pytest.mark.usefixtures("h200")
def test_a_dtype_that_no_kernel_has_is_multiplied_densely():
    pytest.importorskip("triton")
    work = Work("cuda", torch.float64, 4096, 4096, 14336, (128, 32), 0.5)
    assert dispatch.choose_backend(work).backend == "densify"


@pytest.mark.usefixtures("h200")
def test_two_kinds_of_gpu_are_asked_each(monkeypatch):
    pytest.importorskip("triton")
    assert choice(4096).kernel == "tma"
    monkeypatch.setattr(gpu_speed, "this_device", lambda: replace(H200, name="x", arch="sm_80"))
    assert choice(4096).kernel == "matmul"
