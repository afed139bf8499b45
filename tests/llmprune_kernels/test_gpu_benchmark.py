"""The GPU run, as far as it goes without one: what it refuses, chooses, checks and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmprune_kernels.tiles import KINDS, Problem
from llmprune_kernels.timing import COLD_BYTES, Timing, copies_needed

FOLDER = Path(__file__).parent
BENCHMARKS = FOLDER.parents[1] / "kernels" / "benchmarks"
PROBLEM = Problem(4, 1024, 2048, 0.25, (128, 32), torch.bfloat16)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def rehearse(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "LLMPRUNE_KERNELS_TABLES": str(folder),
    }
    command = [sys.executable, str(FOLDER / "rehearsal.py"), what, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_and_says_what_it_could_do(benchmarks, capsys):
    import gpu

    assert gpu.main([]) == 2
    refusal = capsys.readouterr().err
    assert "here is no GPU" in refusal
    assert "--list" in refusal
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") > 50


def test_every_kind_and_dtype_is_checked_before_anything_is_timed(benchmarks):
    from gpu_cases import correctness_cases, pattern_mask, timed_cases

    cases = correctness_cases()
    assert {kind for *_, kinds in cases for kind in kinds} == set(KINDS)
    assert {problem.dtype for problem, *_ in cases} == {
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }
    checked = {kind for *_, kinds in cases for kind in kinds}
    assert {kind for case in timed_cases() for kind in case.kinds} <= checked
    for problem, pattern, _ in cases:
        rows, columns = problem.block
        assert problem.out_features % rows == problem.in_features % columns == 0
        mask = pattern_mask(pattern, problem.out_features // rows, problem.in_features // columns)
        assert mask is None or mask.dtype == torch.bool
    assert not pattern_mask("empty", 3, 4).any()
    counts = pattern_mask("unequal", 6, 40).sum(1)
    assert counts.min() >= 1
    assert len(counts.unique()) > 3


def test_the_first_cases_show_every_section(benchmarks):
    from gpu_cases import timed_cases

    cases = timed_cases()
    sections = {case.section for case in cases}
    assert {case.section for case in cases[: len(sections) + 2]} == sections


def test_report_gives_bandwidth_and_ratios_of_the_same_problem(benchmarks, tmp_path):
    from gpu_report import Report, Row

    report = Report("NVIDIA H200", {"torch": "2"}, "2026-01-01")
    other = Problem(4, 1024, 2048, 0.5, (128, 32), torch.bfloat16)
    report.checks = [{"case": "decode", "problem": ""}]
    report.ceilings = {"read, TB/s": 4.25}
    report.rows = [
        Row("decode", other, "dense", Timing(99.0, 98.0, 100.0)),
        Row("decode", PROBLEM, "dense", Timing(10.0, 9.0, 11.0)),
        Row("decode", PROBLEM, "decode", Timing(4.0, 3.0, 5.0)),
        Row("decode", PROBLEM, "shrunk", Timing(2.0, 2.0, 2.0)),
    ]
    report.left_out = ["prefill (no time)"]
    paths = report.write(tmp_path)
    assert [path.name for path in paths] == ["nvidia-h200.json", "nvidia-h200.md"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    text = paths[1].read_text(encoding="utf-8")
    # 1024 * 2048 * 0.25 numbers of 2 bytes in 4 us; 10 / 4 of dense, 2 / 4 of the same nonzeros
    line = next(line for line in text.splitlines() if "| decode |" in line)
    assert "| 4.0 | 3.0-5.0 | 0.26 | 1 | 2.50 | 0.50 |" in line
    assert "1 of 1 checks" in text
    assert "prefill (no time)" in text
    assert "4.25" in text
    read = json.loads(paths[0].read_text(encoding="utf-8"))
    assert read["rows"][2]["median_us"] == 4.0
    assert read["rows"][2]["block"] == [128, 32]


def test_sections_that_are_not_timed_again_stay_with_their_date(benchmarks, tmp_path):
    from gpu_report import Report, Row

    def begun(date, **versions):
        return Report("NVIDIA H200", {"torch": "2"} | versions, date)

    first = begun("2026-01-01")
    first.rows = [
        Row("decode", PROBLEM, "dense", Timing(10.0, 9.0, 11.0), "in a graph"),
        Row("gated", PROBLEM, "dense", Timing(20.0, 19.0, 21.0)),
    ]
    first.write(tmp_path)
    second = begun("2026-01-02")
    second.keep_others(tmp_path, {"gated"})
    second.rows.append(Row("gated", PROBLEM, "dense", Timing(8.0, 7.0, 9.0)))
    json_path, page = second.write(tmp_path)
    rows = json.loads(json_path.read_text(encoding="utf-8"))["rows"]
    assert [(row["section"], row["median_us"], row["date"]) for row in rows] == [
        ("decode", 10.0, "2026-01-01"),
        ("gated", 8.0, "2026-01-02"),
    ]
    assert rows[0]["detail"] == "in a graph"
    assert rows[0]["dtype"] == "torch.bfloat16"
    text = page.read_text(encoding="utf-8")
    assert "## decode\n\nOf 2026-01-01.\n" in text
    assert "## gated\n\n| layer" in text
    # a third run keeps the dates of both
    third = begun("2026-01-03")
    third.keep_others(tmp_path, {"prefill"})
    assert [row.date for row in third.rows] == ["2026-01-01", "2026-01-02"]
    with pytest.raises(ValueError, match="time all sections"):
        begun("2026-01-03", triton="4").keep_others(tmp_path, {"gated"})
    other = Report("another", {}, "2026-01-03")
    other.keep_others(tmp_path, {"gated"})
    assert other.rows == []


def test_weights_are_copied_until_they_do_not_fit_in_a_cache():
    assert copies_needed(1 << 30) == 4
    assert copies_needed(COLD_BYTES // 8) == 8
    assert copies_needed(0) == copies_needed(1) == 64


def test_a_time_is_the_median_of_its_rounds():
    assert Timing.of([3.0, 1.0, 50.0]) == Timing(3.0, 1.0, 50.0)


@pytest.mark.slow
def test_rehearsed_run_checks_times_and_writes(tmp_path):
    done = rehearse("run", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    assert len(report["checks"]) > 10
    assert all(check["problem"] == "" for check in report["checks"])
    names = {(row["section"], row["name"]) for row in report["rows"]}
    assert ("blocks", "index in the loop") in names
    assert ("blocks", "carried index") in names
    assert ("decode", "shrunk") in names
    assert ("prefill", "densify + dense") in names
    assert ("backward: dx", "grad_input") in names
    assert ("gated", "swiglu") in names


@pytest.mark.slow
def test_rehearsed_run_of_one_section_times_no_other(tmp_path):
    done = rehearse("gated", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    assert len(report["checks"]) > 10
    assert {row["section"] for row in report["rows"]} == {"gated"}


@pytest.mark.slow
def test_rehearsed_run_times_nothing_when_a_kernel_is_wrong(tmp_path):
    done = rehearse("wrong", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "nothing is timed" in done.stdout
    report = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    assert report["rows"] == []
    wrong = [check["case"] for check in report["checks"] if check["problem"]]
    assert wrong
    assert all(case.startswith("matmul") for case in wrong)


@pytest.mark.slow
def test_rehearsed_run_without_time_writes_what_it_left_out(tmp_path):
    done = rehearse("late", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "interpreter.json").read_text(encoding="utf-8"))
    assert report["rows"] == []
    assert len(report["left_out"]) == 8


@pytest.mark.slow
def test_rehearsed_tuning_writes_a_table_that_is_asked_first(tmp_path):
    done = rehearse("tune", tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "tiles-interpreter.json").read_text(encoding="utf-8"))
    assert table["measured"]
    assert len(table["tiles"]) == 1
