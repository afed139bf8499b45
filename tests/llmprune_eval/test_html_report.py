"""The HTML report: well-formed, self-contained, complete, and true to the files that it shows."""

import itertools
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune.units import map_units
from llmprune_eval.html_report import write_report
from llmprune_eval.markup import Markup, element
from llmprune_eval.pictures.axes import Scale, spread_out
from llmprune_eval.pictures.kept_units import kept_model
from llmprune_eval.pictures.score_map import ScoredGroup
from llmprune_eval.report import figure_rows
from tests.llmprune.tiny import FAMILIES, plan_for, tiny_model
from tests.llmprune_eval import chromium
from tests.llmprune_eval.page_checks import check_page
from tests.llmprune_eval.run_files import (
    LAYERS,
    PROMPT,
    a_comparison,
    a_report,
    block_run,
    per_layer_run,
    unit_run,
    write_run,
)

RUNS = {"unit": unit_run, "per_layer": per_layer_run, "blocks": block_run}
HEADINGS = [
    "What was kept",
    "Dense and pruned",
    "Perplexity against parameters",
    "Evaluation on tasks",
    "Latency",
    "Scores and the cut",
    "Training",
    "Samples",
    "How to repeat it",
]
# what `llmprune bench` and `llmprune eval` leave, if they are run
RESULTS = ("bench.json", "eval/evaluation.json")
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Parsed(HTMLParser):
    """A page's elements, tables and text; fails at once where an element is not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.elements, self.text = [], [], []
        self.tables, self.headings, self.absent = {}, [], []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append((tag, dict(attributes), []))
        if tag == "tr":
            self.tables[self.caption].append([])

    def handle_endtag(self, tag):
        opened, attributes, words = self.stack.pop()
        assert tag == opened
        text = "".join(words).strip()
        if self.stack:
            self.stack[-1][2].extend(words)
        if tag == "caption":
            self.caption = text
            self.tables[text] = []
        if tag in ("td", "th"):
            self.tables[self.caption][-1].append(text)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), text))
        if attributes.get("class") == "absent":
            self.absent.append(text)

    def handle_data(self, data):
        self.text.append(data)
        if self.stack:
            self.stack[-1][2].append(data)


def report_of(folder, *, compare=None):
    file = write_report(folder, comparison=compare)
    return Parsed(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("name", RUNS)
def test_every_part_of_a_run_is_shown(name, tmp_path):
    page, file = report_of(write_run(tmp_path / "run", RUNS[name]()))
    assert file == tmp_path / "run" / "report.html"
    assert [text for level, text in page.headings if level == 2] == HEADINGS
    assert page.headings[0] == (1, "tiny-llama, pruned")
    levels = [level for level, _ in page.headings]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert page.absent == ["Warning: the dense model misses its published figure of piqa."]
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    named = [p for p in pictures if p.get("aria-hidden") != "true"]
    assert len(named) >= 10
    assert all(p["role"] == "img" and len(p["aria-label"]) > 10 for p in named)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", RUNS)
def test_the_page_asks_for_nothing_outside_itself(name, tmp_path):
    page, file = report_of(write_run(tmp_path / "run", RUNS[name]()))
    html = file.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not {"script", "iframe", "object", "img"} & {tag for tag, _ in page.elements}
    links = [attributes.get("href", "") for _, attributes in page.elements]
    assert all(link in ("", "data:,") for link in links)
    assert "default-src 'none'" in html


def test_text_of_users_is_escaped_and_paths_are_not_shown(tmp_path):
    folder = write_run(tmp_path / "run", unit_run())
    comparison = tmp_path / "comparison.json"
    comparison.write_text(a_comparison())
    page, file = report_of(folder, compare=comparison)
    html = file.read_text(encoding="utf-8")
    words = "".join(page.text)
    assert f"{PROMPT} <script>alert(1)</script>" in words
    assert "<script" not in html
    assert "<processor>" in words
    assert "Wanda, <structured>" in words
    assert "/secret" not in html
    assert "wiki.train.txt" in words


def test_tables_hold_the_numbers_of_the_files(tmp_path):
    page, _ = report_of(write_run(tmp_path / "run", unit_run()))
    report = a_report()
    shown = [tuple(row) for row in page.tables["Figures of both models"][1:]]
    assert shown == [tuple(row) for row in figure_rows(report)]
    latency = {row[0]: row[1:] for row in page.tables["Latency in milliseconds"][1:]}
    found = report.speed.models["pruned"].prefill
    expected = [f"{value:.1f} ms" for value in (found.median_ms, found.min_ms, found.max_ms)]
    assert latency["prefill, pruned"] == expected
    assert page.tables["Perplexity of wiki.test"][2][-2] == f"{29.96:.2f}"
    kinds = {row[0]: row[1:] for row in page.tables["Units by kind"][1:]}
    assert kinds["MLP channels"] == ["120", "240", "50.0 %"]
    assert kinds["KV groups"] == ["6", "12", "50.0 %"]
    assert kinds["query heads"] == ["12", "24", "50.0 %"]
    assert len(page.tables["Units that every layer keeps"]) == LAYERS + 1
    losses = {row[0]: row[1:] for row in page.tables["Losses, smoothed"][1:]}
    assert losses["calibration of the gates"][0] == "40"
    # the NaN and the half of a line are no steps
    assert losses["recovery"][0] == "100"
    facts = dict(page.tables["Verification"])
    assert facts["verdict"].startswith("passed")
    assert "kv cache 1.5e-14" in facts["largest difference, float64"]
    assert dict(page.tables["The run"])["taken from"] == "owner/tiny-llama@0123"
    assert dict(page.tables["Measured with"])["date"] == "2026-01-02"


def test_times_on_a_busy_processor_are_warned_of_and_the_device_is_named(tmp_path):
    folder = write_run(tmp_path / "run", unit_run(), without=RESULTS)
    whole = a_report()
    dense = whole.speed.models["dense"]
    slowed = replace(dense, prefill=replace(dense.prefill, waited=0.3))
    speed = replace(whole.speed, models={**whole.speed.models, "dense": slowed})
    busy = whole.model_copy(update={"speed": speed})
    (folder / "report.json").write_text(busy.to_json())
    page, _ = report_of(folder)
    (told, _) = page.absent
    assert "prefill: too noisy to conclude; other programs had the processor for 30%" in told
    words = "".join(page.text)
    assert words.count("too noisy to conclude") == 2
    assert "16 decode steps, <processor>, float32" in words


def test_a_layer_that_is_gone_keeps_nothing(tmp_path):
    page, _ = report_of(write_run(tmp_path / "run", per_layer_run()))
    rows = page.tables["Units that every layer keeps"][1:]
    assert rows[0] == ["0", "2 of 4", "2 of 2", "40 of 40"]
    assert rows[1] == ["1", "no attention", "0 of 2", "40 of 40"]
    assert rows[2] == ["2", "2 of 4", "1 of 2", "40 of 40"]
    assert rows[3] == ["3", "no attention", "0 of 2", "no MLP"]
    assert rows[4][3] == "7 of 40"
    assert rows[5][3] == "no MLP"
    assert "units in the running" in [text for _, text in page.headings]


def test_blocks_are_counted_by_projection(tmp_path):
    page, _ = report_of(write_run(tmp_path / "run", block_run()))
    rows = {row[0]: row[1:] for row in page.tables["Blocks by kind of projection"][1:]}
    assert rows["down_proj"] == ["6", "16 x 16", "96", "192", "50.0 %"]
    assert list(rows) == ["gate_proj", "up_proj", "down_proj"]
    assert page.tables["Share of the blocks kept in every layer"][1] == ["0"] + ["50.0 %"] * 3


MISSING = {
    "scores.json": "has no scores",
    "log.jsonl": "has no log",
    "verification.json": "was not verified",
    "report.json": "No perplexity was measured",
    "plan.json": "has no plan yet",
    "eval/evaluation.json": "was not evaluated on tasks",
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("missing", MISSING)
def test_what_is_missing_is_said_in_a_sentence(name, missing, tmp_path):
    folder = write_run(tmp_path / "run", RUNS[name](), without=[missing])
    page, _ = report_of(folder)
    assert any(MISSING[missing] in sentence for sentence in page.absent)
    assert [text for level, text in page.headings if level == 2] == HEADINGS


def test_a_recipe_alone_makes_a_report(tmp_path):
    page, _ = report_of(write_run(tmp_path / "run", unit_run(), without=[*MISSING, *RESULTS]))
    assert len(page.absent) == len(HEADINGS)


def test_figures_that_were_not_measured_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", unit_run(), without=RESULTS)
    bare = a_report().model_copy(update={"speed": None, "latency": None, "samples": {}})
    (folder / "report.json").write_text(bare.to_json())
    page, _ = report_of(folder)
    assert any("No latency" in sentence for sentence in page.absent)
    assert any("No sample" in sentence for sentence in page.absent)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be a folder that prune wrote, got no recipe\.yaml"):
        write_report(tmp_path)
    folder = write_run(tmp_path / "run", unit_run())
    (folder / "verification.json").write_text("{}")
    with pytest.raises(InputError, match=r"verification\.json: must be what .* wrote"):
        write_report(folder)
    (folder / "plan.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match=r"plan\.json"):
        write_report(folder)


def test_a_comparison_on_the_same_text_stands_beside_the_run(tmp_path):
    folder = write_run(tmp_path / "run", unit_run())
    comparison = tmp_path / "comparison.json"
    comparison.write_text(a_comparison())
    page, _ = report_of(folder, compare=comparison)
    rows = page.tables["Perplexity of wiki.test"][1:]
    assert [row[0] for row in rows] == [
        "dense",
        "this run",
        "Wanda, <structured>",
        "Wanda, <structured>",
        "control: prior",
        "random",
    ]
    assert rows[2][1:] == ["half", "refit", "", "81.00 M", "33.25", "1.655"]
    assert rows[1][2:4] == ["recovered", "1,536"]
    assert "1 above 4 times the dense figure are in the table only" in "".join(page.text)


@pytest.mark.parametrize("change", [{"text": "other.test"}, {"dense": 21.0}])
def test_a_comparison_on_another_text_or_model_is_not_mixed_in(change, tmp_path):
    folder = write_run(tmp_path / "run", unit_run())
    comparison = tmp_path / "comparison.json"
    comparison.write_text(a_comparison(**change))
    page, _ = report_of(folder, compare=comparison)
    assert len(page.tables["Perplexity of wiki.test"]) == 3
    assert any("No block of the comparison" in sentence for sentence in page.absent)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": 1, "blocks": 2}'])
def test_what_is_no_comparison_is_refused(text, tmp_path):
    file = tmp_path / "comparison.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"comparison\.json"):
        write_report(write_run(tmp_path / "run", unit_run()), comparison=file)


def test_the_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    from llmprune import cli

    folder = write_run(tmp_path / "run", unit_run())
    out = tmp_path / "new" / "page.html"
    monkeypatch.setattr(sys, "argv", ["llmprune", "report", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "wrote" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    assert (tmp_path / "new" / "page.md").read_text().startswith("# ")
    assert not {"report.html", "README.md"} & {file.name for file in folder.iterdir()}
    monkeypatch.setattr(sys, "argv", ["llmprune", "report", str(folder), "--out", "card.md"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2


# the pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_agrees_with_the_cut(family):
    model = tiny_model(family)
    unit_map = map_units(model)
    plan = plan_for(model, UNIT_KINDS, differ=True)
    kept = kept_model(PrunePlan.from_json(plan.to_json()))
    widths = plan.widths(unit_map)
    assert sum(kept.hidden_channels) == widths.hidden_size
    for layer, expected in zip(kept.layers, widths.layers, strict=True):
        assert layer.is_there == (expected is not None)
        if expected is None:
            continue
        assert (layer.attention, layer.mlp) == (expected.attention, expected.mlp)
        if expected.attention:
            assert sum(layer.heads) == expected.num_attention_heads
            assert sum(layer.kv_groups) == expected.num_key_value_heads
        if expected.mlp:
            assert sum(layer.mlp_channels) == expected.intermediate_size


def test_the_cut_lies_between_who_stays_and_who_goes():
    group = ScoredGroup(0, (3.0, 1.0, 2.0, 5.0), (True, False, False, True))
    assert group.cut == 2.5
    assert group.num_across == 0
    crossed = ScoredGroup(0, (3.0, 1.0, 4.0, 5.0), (True, False, False, True))
    assert crossed.cut == 4.0
    assert crossed.num_across == 0
    over = ScoredGroup(0, (3.0, 1.0, 9.0, 5.0), (True, False, False, True))
    assert over.num_across == 1
    assert ScoredGroup(0, (1.0, 2.0), (True, True)).cut is None


@pytest.mark.parametrize(
    ("low", "high", "is_log"),
    [(0, 1, False), (-3e-7, 5e-7, False), (0.0, 46080.0, False), (1e-4, 1e5, True), (28, 33, True)],
)
def test_ticks_are_few_and_inside(low, high, is_log):
    scale = Scale(low, high, 0.0, 100.0, is_log)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)
    assert [scale(tick) for tick in ticks] == sorted(scale(tick) for tick in ticks)


def test_labels_stand_apart():
    places = spread_out([10, 11, 12, 90, 99], 15, 0, 100)
    assert all(b - a >= 15 for a, b in itertools.pairwise(places))
    assert max(places) <= 100


def test_an_element_escapes_all_but_markup():
    made = element("p", "a < b", Markup("<b>c</b>"), aria_label='"d"', class_="e", hidden=None)
    assert made == '<p aria-label="&quot;d&quot;" class="e">a &lt; b<b>c</b></p>'


def test_scores_that_are_no_numbers_are_drawn(tmp_path):
    recipe, plan, scores = unit_run()
    scores.scores["layers.0.mlp_channels"][0] = float("nan")
    scores.scores["layers.1.mlp_channels"][:] = 0.5
    report_of(write_run(tmp_path / "run", (recipe, plan, scores)))


def test_a_model_of_many_layers_and_heads_is_drawn(tmp_path):
    recipe, plan, _ = unit_run()
    model = dict(plan.model) | {"num_hidden_layers": 126, "num_attention_heads": 128}
    wide = PrunePlan(model | {"num_key_value_heads": 8}, {"layers": tuple(range(100))})
    scores = unit_run()[2]
    page, _ = report_of(write_run(tmp_path / "run", (recipe, wide, scores)))
    assert len(page.tables["Units that every layer keeps"]) == 127


# in a browser

NO_BROWSER = pytest.mark.skipif(chromium.PROGRAM is None, reason="chromium is not installed")


@pytest.mark.slow
@NO_BROWSER
@pytest.mark.parametrize("name", RUNS)
def test_a_browser_shows_every_picture_and_complains_of_nothing(name, tmp_path, browser):
    folder = write_run(tmp_path / "run", RUNS[name]())
    comparison = tmp_path / "comparison.json"
    comparison.write_text(a_comparison())
    file = write_report(folder, comparison=comparison)
    check_page(browser, file)
    grounds = set()
    for scheme in ("light", "dark"):
        browser.open(file, width=1200, scheme=scheme)
        grounds.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


@pytest.mark.slow
@NO_BROWSER
def test_a_browser_that_has_something_to_complain_of_is_heard(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text("<script>throw Error('x')</script><img src='missing.png'>")
    browser.open(page, width=390)
    methods = {event["method"] for event in browser.complaints()}
    assert methods >= {"Runtime.exceptionThrown", "Log.entryAdded"}
    assert len(browser.requested()) == 2
