"""What is read from a measured table; the tables are made up."""

import json

import pytest
import torch

from llmprune_kernels import BlockSparseLinear, cpu, cpu_table, dispatch
from llmprune_kernels.dispatch import OVERRIDE
from llmprune_kernels.work import Work
from tests.llmprune_kernels.cases import mask_of


def cell(speeds, block=(16, 16), num_rows=1, density=0.5, **setting):
    head = {"dtype": "float32", "block": list(block), "num_rows": num_rows, "density": density}
    return {**head, **setting, "speedup": speeds}


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Gives a function: these cells are all that was ever measured, everywhere."""

    def forget():
        cpu_table._tables.cache_clear()
        cpu_table.speedup.cache_clear()
        dispatch._on_cpu.cache_clear()

    def put(cells, **head):
        head = {"dense": {"float32": "any"}, "threads": 1, "shape": [64, 64], **head}
        (tmp_path / "cpu-one.json").write_text(json.dumps({**head, "cells": cells}))
        forget()

    monkeypatch.setattr(cpu_table, "FOLDER", tmp_path)
    yield put
    forget()


@pytest.fixture
def _small_table(ship):
    ship(
        [
            cell({"native": 2.0}),
            cell({"native": 1.0}, density=1.0),
            cell({"native": 4.0}, num_rows=16),
            cell({"native": 4.0}, num_rows=16, density=1.0),
            cell({"native": 10.0}, (64, 64)),
        ]
    )


def work(num_rows=1, density=0.5, block=(16, 16), dtype=torch.float32, **setting):
    setting = {"in_features": 64, "out_features": 64, **setting}
    return Work("cpu", dtype, num_rows, block=block, density=density, **setting)


@pytest.mark.usefixtures("_small_table")
@pytest.mark.parametrize(
    ("num_rows", "density", "block", "time"),
    [
        (1, 0.5, (16, 16), 0.5),
        (1, 0.75, (16, 16), 0.75),
        (1, 0.1, (16, 16), 0.5),
        (1, 1.0, (16, 32), 1.0),
        (4, 1.0, (16, 16), 0.625),
        (500, 1.0, (16, 16), 0.25),
        (1, 0.5, (64, 32), 0.1),
    ],
)
def test_the_table_is_interpolated_in_time(num_rows, density, block, time):
    found = cpu_table.speedup("native", work(num_rows, density, block))
    assert found == pytest.approx(1 / time)


@pytest.mark.usefixtures("_small_table")
def test_a_dtype_that_was_not_measured_is_taken_for_float32():
    for dtype in (torch.float64, torch.float16):
        assert cpu_table.speedup("native", work(density=1.0, dtype=dtype)) == 1.0


def test_rows_of_as_many_threads_or_fewer_hold(ship):
    ship([cell({"native": n}, threads=threads) for threads, n in ((2, 3.0), (8, 0.5), (4, 2.0))])
    for threads, speed in ((1, 3.0), (2, 3.0), (3, 3.0), (4, 2.0), (7, 2.0), (8, 0.5), (64, 0.5)):
        assert cpu_table.speedup("native", work(threads=threads)) == speed


def test_the_nearest_weight_holds_before_the_nearest_block(ship):
    ship(
        [
            cell({"native": 3.0}, (64, 64), shape=[64, 64]),
            cell({"native": 0.5}, (16, 16), shape=[1024, 1024]),
        ]
    )
    for side, speed in ((16, 3.0), (64, 3.0), (250, 3.0), (260, 0.5), (4096, 0.5)):
        found = cpu_table.speedup("native", work(in_features=side, out_features=side))
        assert found == speed
    assert cpu_table.speedup("native", work(in_features=1024, out_features=16)) == 3.0


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"threads": 0}, "cpu-one.json: threads must be a whole number from 1 on, got 0"),
        ({"threads": None}, "threads must be .* got None"),
        ({"shape": [64]}, r"shape must be \[out_features, in_features\], got \[64\]"),
    ],
)
def test_a_table_that_does_not_say_its_threads_or_shape_is_refused(ship, changed, rule):
    ship([cell({"native": 1.0})], **changed)
    with pytest.raises(ValueError, match=rule):
        cpu_table.speedup("native", work())


def test_the_threads_of_now_and_the_shape_of_a_layer_decide(ship, monkeypatch):
    """Of two threads, or of a small layer, other rows of the table are asked."""
    monkeypatch.delenv(OVERRIDE, raising=False)
    fast, slow = (dict.fromkeys(("native", *cpu.WAYS), speed) for speed in (2.0, 0.5))
    small, large = [80, 64], [2048, 2048]
    cells = [cell(fast, threads=1, shape=small), cell(slow, threads=2, shape=small)]
    ship(cells)
    linear = torch.nn.Linear(64, 80, bias=False)
    layer = BlockSparseLinear.from_dense(linear, mask_of("half")).eval()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for choice in (layer.choice(1), dispatch.choose_backend(work_of(layer))):
                assert choice.speedup == (2.0 if threads == 1 else 0.5)
        torch.set_num_threads(1)
        ship([cell(slow, threads=1, shape=small), cell(fast, threads=1, shape=large)])
        assert layer.choice(1).speedup == 0.5
    finally:
        torch.set_num_threads(before)


def work_of(layer):
    return Work.of(torch.zeros(1, 1, layer.in_features), layer.values, layer.index)


def test_shipped_tables_can_be_read():
    assert {table.dtype for table in cpu_table._tables()} == {"float32", "bfloat16", "float16"}
    for table in cpu_table._tables():
        for settings in table.grids.values():
            assert settings
