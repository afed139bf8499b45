"""Which backend runs on which processor; the processors are made up."""

import json
from types import SimpleNamespace

import pytest
import torch

from llmprune_kernels import cpu, cpu_table, dispatch, processor
from llmprune_kernels.ops import block_sparse_linear
from llmprune_kernels.work import Work
from tests.llmprune_kernels import blocks

EPYC = ("AuthenticAMD", "avx2 fma avx512f avx512_bf16")
CASCADE_LAKE = ("GenuineIntel", "avx2 fma avx512f")
SAPPHIRE_RAPIDS = ("GenuineIntel", "avx2 fma avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16")
GRANITE_RAPIDS = (SAPPHIRE_RAPIDS[0], SAPPHIRE_RAPIDS[1] + " amx_fp16")


@pytest.fixture
def on(tmp_path, monkeypatch):
    """Gives a function: what runs from now on is asked about another processor."""

    def forget():
        processor._identity.cache_clear()
        cpu_table.speedup.cache_clear()
        dispatch._on_cpu.cache_clear()

    def pretend(identity, native=None):
        vendor, flags = identity
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n" * 2)
        monkeypatch.setattr(processor, "CPUINFO", path)
        forget()
        if native:
            monkeypatch.setattr(dispatch.native, "is_available", lambda: True)
            monkeypatch.setattr(dispatch.native, "supports", lambda dtype: True)
            monkeypatch.setattr(dispatch.native, "instruction_set", lambda: native)

    yield pretend
    forget()


def work(dtype, num_rows, density=0.5, threads=1):
    return Work("cpu", dtype, num_rows, 2048, 2048, (64, 64), density, threads)


@pytest.mark.parametrize(
    ("identity", "kinds"),
    [
        (EPYC, ("other", "avx512_bf16", "none")),
        (CASCADE_LAKE, ("intel", "none", "none")),
        (SAPPHIRE_RAPIDS, ("intel", "amx", "avx512_fp16")),
        (GRANITE_RAPIDS, ("intel", "amx", "amx")),
    ],
)
def test_a_processor_says_what_dense_products_run_on(on, identity, kinds):
    on(identity)
    assert tuple(processor.dense_kinds().values()) == kinds
    assert processor.dense_kind(torch.float64) == kinds[0]


def test_a_processor_that_cannot_be_asked_has_nothing(on, tmp_path, monkeypatch):
    on(EPYC)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "missing")
    processor._identity.cache_clear()
    assert tuple(processor.dense_kinds().values()) == ("other", "none", "none")


def test_a_dense_product_on_tiles_is_left_alone_by_kernels_without(on):
    """Measured with AMX in the dense product only: 2.5, 0.76 and 0.19 times as fast as it."""
    for found in ("portable", "avx2", "avx512", "avx512_bf16"):
        on(SAPPHIRE_RAPIDS, found)
        assert dispatch.choose_backend(work(torch.bfloat16, 1)).backend == "native"
        for num_rows in (2, 16, 512):
            assert dispatch.choose_backend(work(torch.bfloat16, num_rows)).backend != "native"
    on(EPYC, "avx512_bf16")
    for num_rows in (1, 16, 512):
        assert dispatch.choose_backend(work(torch.bfloat16, num_rows)).backend == "native"


def test_shipped_tables_say_what_each_kind_of_processor_runs(on):
    dtypes = (torch.float32, torch.bfloat16)
    for identity, found in ((EPYC, "avx512_bf16"), (SAPPHIRE_RAPIDS, "amx")):
        on(identity, found)
        for dtype in dtypes:
            for num_rows in (1, 16, 512):
                assert dispatch.choose_backend(work(dtype, num_rows)).backend == "native"
    # MKL is several times as fast on the second
    for identity, is_faster in ((EPYC, True), (SAPPHIRE_RAPIDS, False)):
        on(identity, "avx512_bf16")
        choice = dispatch.choose_backend(work(torch.float32, 512, 1.0))
        assert (choice.speedup > 1) == is_faster
        assert ("slower than dense" in choice.reason) != is_faster


def test_no_kernel_has_tiles_of_float16(on):
    for found in ("avx512_bf16", "amx"):
        on(GRANITE_RAPIDS, found)
        assert dispatch.choose_backend(work(torch.float16, 16)).backend != "native"


@pytest.mark.parametrize(("found", "runs"), [("avx512_bf16", True), ("amx", True), ("avx2", False)])
def test_many_rows_in_bfloat16_need_its_instructions(on, found, runs):
    for identity in (EPYC, CASCADE_LAKE):
        on(identity, found)
        chosen = dispatch.choose_backend(work(torch.bfloat16, 512, 0.25))
        assert (chosen.backend == "native") == runs


def test_an_outrun_kernel_does_not_compute_the_gradient_of_the_input(on, monkeypatch):
    on(SAPPHIRE_RAPIDS, "avx512_bf16")
    monkeypatch.setattr(dispatch.native, "grad_input", lambda *a, **k: pytest.fail("was called"))
    torch.manual_seed(0)
    values, index = blocks.weight("random", torch.bfloat16, (16, 16))
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    block_sparse_linear(x, values, index).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("blocks_speed", "densify_speed", "runs_blocks", "said"),
    [
        (1.1, 0.5, True, "predicted 1.10x"),
        (0.9, 0.5, True, "slower than dense, a dense weight made anew more so: predicted 0.90x"),
        (0.4, 0.5, False, "would be slower: predicted 0.40x"),
    ],
)
def test_blocks_run_where_a_dense_weight_made_anew_is_slower(
    on, monkeypatch, blocks_speed, densify_speed, runs_blocks, said
):
    on(EPYC)
    small = Work("cpu", torch.float32, 4, 64, 64, (16, 16), 0.5)
    monkeypatch.setattr(dispatch.cpu, "predicted_speedup", lambda *a, **k: blocks_speed)
    table = SimpleNamespace(speedup=lambda way, work: densify_speed)
    monkeypatch.setattr(dispatch, "cpu_table", table)
    choice = dispatch.choose_backend(small)
    assert choice.backend in (("native", "pytorch") if runs_blocks else ("densify",))
    assert choice.speedup == (blocks_speed if runs_blocks else densify_speed)
    assert said in choice.reason


@pytest.fixture
def _two_tables(tmp_path, monkeypatch):
    """Speedups of 4 where dense products are slow, of 0.5 where they are fast."""
    for name, dense, speed in (
        ("slow", {"float32": "other", "bfloat16": "avx512_bf16"}, 4.0),
        ("fast", {"float32": "intel", "bfloat16": "amx"}, 0.5),
    ):
        cells = [
            {"dtype": dtype, "block": [64, 64], "num_rows": 1, "density": 0.5,
             "speedup": {"native": speed, **dict.fromkeys(cpu.WAYS, speed / 2)}}
            for dtype in dense
        ]  # fmt: skip
        head = {"dense": dense, "threads": 1, "shape": [2048, 2048]}
        text = json.dumps({**head, "cells": cells})
        (tmp_path / f"cpu-{name}.json").write_text(text)
    monkeypatch.setattr(cpu_table, "FOLDER", tmp_path)
    cpu_table._tables.cache_clear()
    yield
    cpu_table._tables.cache_clear()
    cpu_table.speedup.cache_clear()


@pytest.mark.usefixtures("_two_tables")
def test_a_table_holds_for_processors_whose_dense_products_run_on_the_same(on):
    on(EPYC)
    assert cpu_table.speedup("native", work(torch.float32, 1)) == 4.0
    assert cpu_table.speedup("native", work(torch.bfloat16, 1)) == 4.0
    on(SAPPHIRE_RAPIDS, "amx")
    assert cpu_table.speedup("native", work(torch.float32, 1)) == 0.5
    assert cpu_table.speedup("native", work(torch.float16, 1)) == 0.5
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.choose_backend(work(dtype, 1)).speedup == 0.5


@pytest.mark.usefixtures("_two_tables")
def test_without_a_table_the_lowest_figure_holds(on):
    on(CASCADE_LAKE)
    assert cpu_table.speedup("native", work(torch.bfloat16, 1)) == 0.5
