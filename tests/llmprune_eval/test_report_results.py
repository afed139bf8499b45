"""The HTML report: what `llmprune bench` and `eval` left in a run, and the gates of its log."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from llmprune.errors import InputError
from llmprune_eval import bench_table, quality_report
from llmprune_eval.card_file import write_card
from llmprune_eval.html_report import write_report
from llmprune_eval.report import to_markdown
from llmprune_eval.results_of_run import read_bench, read_evaluation
from llmprune_eval.training_log import GateShares, read_log
from tests.llmprune_eval.run_files import a_log, a_report, gates_of, unit_run, write_run
from tests.llmprune_eval.test_html_report import RESULTS, Parsed


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", unit_run())


def page_of(folder):
    return Parsed(write_report(folder).read_text(encoding="utf-8"))


def pictures_of(page):
    found = [attributes for tag, attributes in page.elements if tag == "svg"]
    return [p["aria-label"] for p in found if p.get("aria-hidden") != "true"]


def words_of(page):
    return "".join(page.text)


# bench


def test_every_point_of_bench_has_bars_and_the_table_is_that_of_bench(run):
    page = page_of(run)
    labels = pictures_of(page)
    for point in ("batch 1, context 128", "batch 1, context 2048"):
        assert f"first token, {point}: dense 80.0 ms; pruned 40.0 ms" in labels
        assert f"decode step, {point}: dense 16.0 ms; pruned 8.0 ms" in labels
    shown = page.tables["Latency, memory and load time"]
    assert shown[0] == ["", "dense", "pruned", "pruned / dense"]
    assert [tuple(row) for row in shown[1:]] == bench_table.table_rows(read_bench(run))
    assert "x 0.500 (0.450 to 0.550) faster" in words_of(page)
    assert "x 0.900 (0.700 to 1.200) too noisy" in words_of(page)
    assert "Some CPU" in words_of(page)


def test_bars_of_bench_have_whiskers_over_the_middle_half_of_the_rounds(run):
    html = write_report(run).read_text(encoding="utf-8")
    (svg,) = re.findall(r"<svg[^>]*first token, batch 1, context 128:.*?</svg>", html)
    bars = re.findall(r'<rect[^>]* class="(dense|pruned)"|class="(dense|pruned)"', svg)
    assert [a or b for a, b in bars] == ["dense", "pruned"]
    whiskers = re.findall(r'<line class="whisker" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', svg)
    dense, pruned = (tuple(map(float, whiskers[index])) for index in (0, 3))
    # quartiles of 0.9, 1 and 1.1 times the median
    zero = float(re.search(r'<rect[^>]*? x="([\d.]+)"', svg)[1])
    assert (pruned[0] - zero) / (dense[0] - zero) == pytest.approx(0.5, abs=0.01)
    assert (dense[1] - zero) / (dense[0] - zero) == pytest.approx(1.05 / 0.95, abs=0.01)


def test_warnings_of_bench_stand_above_its_bars(run):
    file = run / "bench.json"
    report = read_bench(run).model_copy(update={"warnings": ("other <programs> ran",)})
    file.write_text(report.to_json())
    page = page_of(run)
    assert "Warning: other <programs> ran." in page.absent


def test_pictures_of_many_points_are_folded(run):
    report = read_bench(run)
    points = tuple(report.points[0].model_copy(update={"context": 2**n}) for n in range(1, 8))
    (run / "bench.json").write_text(report.model_copy(update={"points": points}).to_json())
    page = page_of(run)
    assert "3 more" in words_of(page)
    assert sum("batch 1, context" in label for label in pictures_of(page)) == 14


def test_bench_alone_makes_the_latency_section(run):
    (run / "report.json").unlink()
    page = page_of(run)
    assert not any("No latency" in sentence for sentence in page.absent)
    assert "Measured by llmprune bench" in [text for _, text in page.headings]


# eval


def test_tasks_are_paired_in_a_picture_and_a_table(run):
    page = page_of(run)
    evaluation = read_evaluation(run)
    (label,) = [label for label in pictures_of(page) if label.startswith("Pruned minus")][:1]
    assert "piqa -3.5 (-7.5 to +0.5); hellaswag -9.0 (-14.0 to -4.0)" in label
    # a ratio of perplexities is no difference in points
    assert "lambada" not in label
    shown = [tuple(row) for row in page.tables["Figures of llmprune eval"]]
    assert shown == [
        quality_report.columns_of(evaluation),
        *quality_report.table_rows(evaluation),
    ]
    assert "-3.5 (-7.5 to +0.5), p 0.14, not conclusive" in words_of(page)
    assert "piqa: 200 documents, not all there are, 0-shot" in words_of(page)


def test_a_test_that_decides_nothing_is_a_ring(run):
    html = write_report(run).read_text(encoding="utf-8")
    svg = re.findall(r"<svg[^>]*Pruned minus dense.*?</svg>", html)[0]
    assert re.findall(r'<circle[^>]*class="(\w+)"', svg) == ["undecided", "pruned"]


def test_an_evaluation_of_one_text_alone_has_a_table_and_no_picture(run):
    file = run / "eval" / "evaluation.json"
    report = read_evaluation(run).model_copy(update={"tasks": ()})
    file.write_text(report.to_json())
    page = page_of(run)
    assert not any(label.startswith("Pruned minus") for label in pictures_of(page))
    assert page.tables["Figures of llmprune eval"][2][0] == "perplexity wiki.test (in-domain)"


# the card


def test_the_card_has_every_table_that_the_run_has(run):
    file = write_card(run)
    assert file == run / "README.md"
    text = file.read_text()
    assert to_markdown(a_report()).strip() in text
    assert quality_report.to_markdown(read_evaluation(run)).strip() in text
    assert bench_table.to_markdown(read_bench(run)).strip() in text
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings == ["Evaluation", "Latency and memory", "Load it", "Repeat it"]


def test_the_card_of_a_run_that_was_not_measured_is_not_written(run):
    (run / "report.json").unlink()
    assert write_card(run) is None
    assert not (run / "README.md").exists()


def test_the_card_leaves_out_results_of_another_model(run):
    (run / "model" / "model.safetensors").write_text("other")
    text = write_card(run).read_text()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == ["Load it", "Repeat it"]


# of another model


def test_results_of_another_model_are_left_out_and_the_page_says_so(run):
    (run / "model" / "model.safetensors").write_text("other")
    page = page_of(run)
    told = [sentence for sentence in page.absent if "is left out" in sentence]
    assert [sentence.partition(" ")[0] for sentence in told] == list(RESULTS)
    assert "Latency, memory and load time" not in page.tables
    assert "Figures of llmprune eval" not in page.tables
    assert str(run.parent) not in words_of(page)


def test_results_without_a_model_are_left_out(run):
    for file in (run / "model").iterdir():
        file.unlink()
    (run / "model").rmdir()
    assert sum("is left out" in sentence for sentence in page_of(run).absent) == 2


@pytest.mark.parametrize("name", RESULTS)
def test_damaged_results_are_refused(run, name):
    (run / name).write_text("{}")
    with pytest.raises(InputError, match=rf"{name.rpartition('/')[2]}"):
        write_report(run)


# gates


def test_gates_of_every_kind_are_drawn_with_their_figures(run):
    page = page_of(run)
    labels = pictures_of(page)
    expected = "share of the gates by step; at the last, 40.0 % open, 40.0 % closed, mean 0.500"
    assert f"gates, MLP channels: {expected}" in labels
    assert any(label.startswith("gates, KV groups: ") for label in labels)
    rows = page.tables["Gates by kind and step"]
    assert [row[1] for row in rows[1:6]] == ["1", "11", "21", "30", "40"]
    assert rows[1] == ["MLP channels", "1", "1.0 %", "98.0 %", "0.0 %", "1.0 %", "0.500"]
    assert "Budget of the gates: 0.988 of the units at first, 0.500 at last" in labels


def test_a_budget_that_stays_is_a_sentence(run):
    lines = [json.loads(line) for line in a_log().splitlines()[:40]]
    text = "\n".join(json.dumps({**line, "budget": 0.5}) for line in lines)
    (run / "log.jsonl").write_text(text)
    page = page_of(run)
    assert "budget allows 50.0 % of the units from the first step on" in words_of(page)
    assert not any(label.startswith("Budget") for label in pictures_of(page))


def test_a_log_without_gates_says_so(run):
    rows = [{"phase": "gates", "step": s, "loss": 1.0, "budget": 0.5} for s in (1, 2)]
    (run / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert any("has no gates" in sentence for sentence in page_of(run).absent)


def test_recovery_alone_has_no_gates_to_speak_of(run):
    rows = [{"phase": "recovery", "step": s, "loss": 1.0} for s in (1, 2)]
    (run / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    page = page_of(run)
    assert not any("has no gates" in sentence for sentence in page.absent)


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_gates_of_any_number_of_steps_are_drawn(run, steps):
    rows = [
        {"phase": "gates", "step": s, "loss": 1.0, "budget": 0.5, **gates_of("layers", 0.25)}
        for s in range(1, steps + 1)
    ]
    (run / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    file = write_report(run)
    page = Parsed(file.read_text(encoding="utf-8"))
    (label,) = [label for label in pictures_of(page) if label.startswith("gates, layers")]
    assert "25.0 % open" in label
    (svg,) = re.findall(r"<svg[^>]*gates, layers.*?</svg>", file.read_text(encoding="utf-8"))
    assert len(svg) < 40_000
    # the bands fill the whole width
    numbers = [float(x) for x in re.findall(r"[ML](\d+\.\d) ", svg)]
    assert max(numbers) - min(numbers) > 250


def test_bands_lie_upon_one_another(run):
    html = write_report(run).read_text(encoding="utf-8")
    (svg,) = re.findall(r"<svg[^>]*gates, MLP.*?</svg>", html)
    bands = re.findall(r'<path d="M([^"]*)" class="([\w-]+)"', svg)
    assert [class_ for _, class_ in bands][:4] == ["open", "half-open", "half-closed", "closed"]
    ends = []
    for points, class_ in bands[:4]:
        heights = [float(point.split()[1].rstrip("Z")) for point in points.split("L")]
        half = len(heights) // 2
        # the last step: the end of the top, and where the way back begins
        ends.append((heights[half - 1], heights[half], class_))
    for (top, _, _), (_, bottom, _) in itertools.pairwise(ends):
        assert top == bottom
    # 40 % of 172 pixels above the ground
    assert ends[0][0] == pytest.approx(180 - 0.4 * 172, abs=0.1)
    assert ends[0][1] == 180
    assert ends[3][0] == 8


def test_a_log_is_read_line_by_line(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text(a_log())
    log = read_log(file)
    assert set(log.losses) == {"gates", "recovery"}
    assert set(log.gates) == {"mlp_channels", "kv_groups"}
    assert log.gates["mlp_channels"][0] == GateShares(1, 0.01, 0.99, 0.01, 0.5)
    assert log.budget[-1] == (40, 0.5)
    assert len(log.losses["recovery"]) == 100
    assert read_log(tmp_path / "none.jsonl").losses == {}
