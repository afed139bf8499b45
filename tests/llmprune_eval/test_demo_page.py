"""The demo's recipe on a tiny model, each command as a user gives it, its page in a browser."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from llmprune import cli
from tests.llmprune_eval import chromium
from tests.llmprune_eval.page_checks import check_page
from tests.llmprune_eval.tiny_tasks import save_data, save_model

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-135m.yaml"
STEPS = 6


@pytest.fixture
def llmprune(monkeypatch):
    """The command line, in this process; it must succeed."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code

    return call


def tiny_demo(folder):
    """The demo's recipe with a tiny model, a text of a few words, and few of everything."""
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat the dog ran under a tree " * 200)
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"] = {"source": str(save_model(folder / "tiny"))}
    rows = {"dataset": str(text), "num_rows": 8, "row_length": 16}
    recipe["calibration"] = {"self_generated": recipe["calibration"]["self_generated"], **rows}
    recipe["prune"]["mlp_channels"]["multiple_of"] = 1
    recipe["budget"]["tolerance"] = 0.05
    for part, few in (("gates", STEPS), ("recovery", STEPS)):
        recipe[part]["steps"] = few
    recipe["reconstruction"]["num_rows"] = 4
    recipe["training"]["mixed_precision"] = "no"
    tasks = [{"dataset": str(text), "window": 16, "max_windows": 4}]
    recipe["evaluation"] = {"perplexity": tasks, "speed": None}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.skipif(chromium.PROGRAM is None, reason="chromium is not installed")
def test_the_page_of_the_demo_shows_all_that_its_commands_found(llmprune, tmp_path, browser, capfd):
    run = tmp_path / "run"
    llmprune("prune", tiny_demo(tmp_path), "--out", run)
    (log, *_) = (run / "log.jsonl").read_text().splitlines()
    assert {"mlp_channels_open", "mlp_channels_closed"} <= set(json.loads(log))
    llmprune("bench", run, "--context", "16,32", "--new-tokens", 2, "--rounds", 3, "--no-memory")
    data = save_data(tmp_path / "data")
    llmprune("eval", run, "--tasks", "piqa,hellaswag", "--data", data)
    assert capfd.readouterr().out.count(f"`llmprune report {run}` puts it on the page") == 2
    llmprune("report", run)
    pictures = check_page(browser, run / "report.html")
    starts = (
        "Map of 2 layers",
        "Perplexity",
        "Pruned minus dense, in points: piqa",
        "first token, batch 1, context 16: dense",
        "decode step, batch 1, context 32: dense",
        "Loss of calibration of the gates over 6 steps",
        "Loss of recovery over 6 steps",
        "gates, MLP channels: share of the gates",
    )
    for start in starts:
        assert any(name.startswith(start) for name in pictures), (start, pictures)
    card = (run / "README.md").read_text()
    assert "| piqa" in card
    assert "| **batch 1, context 32** |" in card
