"""How the CPU benchmark takes and writes its figures; nothing is timed for its time here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from llmprune_kernels import cpu, cpu_table, dispatch
from llmprune_kernels.work import Work

FILE = Path(__file__).parents[2] / "kernels" / "benchmarks" / "cpu.py"
spec = importlib.util.spec_from_file_location("cpu_benchmark", FILE)
benchmark = sys.modules["cpu_benchmark"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
last_cache = benchmark.last_cache
TINY = benchmark.Case(32, 64, (16, 16), "float32", 0.5, 2)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(benchmark, "last_cache", lambda: 1 << 12)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shares(monkeypatch):
    """Gives a function: what others take of the CPUs in one measurement after the other."""

    def put(taken):
        left = list(taken)
        clock = {"busy": 0.0, "wall": 0.0}

        def measured(case, **options):
            clock["busy"] += left.pop(0) * (benchmark.os.cpu_count() or 1)
            clock["wall"] += 1.0
            ways = ("dense", "native", *cpu.WAYS)
            return {way: benchmark.Timing(len(left), 1.0, 1.0, 2.0, 0.0) for way in ways}

        monkeypatch.setattr(benchmark, "measure", measured)
        monkeypatch.setattr(benchmark, "busy", lambda: clock["busy"])
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock["wall"])
        monkeypatch.setattr(benchmark.time, "process_time", lambda: 0.0)
        return left

    return put


@pytest.mark.parametrize(
    ("threads", "taken", "kept", "unused"),
    [
        (2, [0.0, 0.5], 0.0, 1),
        (2, [0.4, 0.01, 0.0], 0.01, 1),
        (2, [0.4, 0.3, 0.2, 0.3, 0.0], 0.2, 1),
        (1, [0.4, 0.0], 0.4, 1),
    ],
)
def test_wall_time_is_taken_again_while_others_use_the_machine(
    shares, threads, taken, kept, unused
):
    left = shares(taken)
    cell = benchmark.measure_on(TINY, threads, rounds=1, sample_s=0.01)
    assert (cell["others"], len(left)) == (kept, unused)
    assert torch.get_num_threads() == threads
    # of the timings that were kept
    assert cell["timings"]["dense"]["cpu_ms"] == len(taken) - 1 - taken.index(kept)


def test_every_way_is_measured():
    cell = benchmark.measure_on(TINY, 1, rounds=1, sample_s=0.001)
    assert set(cell["timings"]) >= {"dense", *cpu.WAYS}
    assert all(timing["cpu_ms"] > 0 for timing in cell["timings"].values())


def test_weights_of_few_rows_come_from_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "last_cache", last_cache)
    for index, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(benchmark, "CACHES", tmp_path)
    # 64 MiB or more in all
    assert benchmark.num_copies(16, 8 << 20) == 8
    assert benchmark.num_copies(1, (8 << 20) + 1) == 8
    assert benchmark.num_copies(1, (8 << 20) - 1) == 9
    assert benchmark.num_copies(17, 1 << 10) == 1
    monkeypatch.setattr(benchmark, "CACHES", tmp_path / "none")
    assert benchmark.last_cache() == 32 << 20


def test_calls_take_turns():
    call = benchmark.in_turn([lambda: 1, lambda: 2, lambda: 3])
    assert [call() for _ in range(5)] == [1, 2, 3, 1, 2]


def test_busy_time_rises():
    before = benchmark.busy()
    assert before > 0
    assert benchmark.busy() >= before


def test_a_written_table_says_threads_and_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_table, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmark, "table_cases", lambda: [TINY])
    # process CPU time for one thread, wall time for two
    timings = {way: benchmark.Timing(1.0, 1.0, 1.0, 2.0, 0.0) for way in cpu.WAYS}
    timings["dense"] = benchmark.Timing(3.0, 3.0, 3.0, 1.0, 0.0)
    monkeypatch.setattr(benchmark, "measure", lambda case, **options: timings)
    benchmark.write_table([1, 2], rounds=1)
    (path,) = tmp_path.glob("cpu-*.json")
    cells = json.loads(path.read_text())["cells"]
    assert [(cell["threads"], cell["shape"]) for cell in cells] == [(1, [32, 64]), (2, [32, 64])]
    cpu_table._tables.cache_clear()
    cpu_table.speedup.cache_clear()
    try:
        for threads in (1, 2):
            work = Work("cpu", torch.float32, 2, 64, 32, (16, 16), 0.5, threads)
            for way in cpu.WAYS:
                assert cpu_table.speedup(way, work) == pytest.approx({1: 3.0, 2: 0.5}[threads])
    finally:
        cpu_table._tables.cache_clear()
        cpu_table.speedup.cache_clear()
        dispatch._on_cpu.cache_clear()
