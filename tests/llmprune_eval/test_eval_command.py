"""`llmprune eval` as a user calls it, on a run folder and on models."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from llmprune import cli, cli_measure
from llmprune.recipe import Recipe
from tests.llmprune_eval.tiny_tasks import save_data, save_model


@pytest.fixture(autouse=True)
def no_pip_list(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def run_folder(tmp_path):
    """What prune leaves, as far as eval reads it."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20)
    recipe = {
        "model": {"source": str(save_model(tmp_path / "dense-model"))},
        "calibration": {"dataset": str(text)},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
        "evaluation": {
            "perplexity": [{"dataset": str(text), "window": 16}],
            "published": {"piqa": {"acc": 0.999}},
        },
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.parse(recipe).to_yaml())
    save_model(folder / "model", intermediate_size=12, seed=1)
    save_data(tmp_path / "data")
    return folder


def call(monkeypatch, *arguments):
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["llmprune", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def refusal(monkeypatch, capfd, *arguments):
    capfd.readouterr()
    assert call(monkeypatch, *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line.removeprefix("llmprune: ")


def test_a_run_is_compared_with_its_dense_model_and_warned_of_first(
    monkeypatch, capfd, run_folder, tmp_path
):
    monkeypatch.setattr(cli_measure, "console", Console(width=140))
    options = ("--tasks", "piqa,winogrande", "--data", tmp_path / "data", "--limit", 6)
    assert call(monkeypatch, run_folder, *options) == 0
    shown = capfd.readouterr()
    assert "WARNING: piqa acc: the dense model has" in shown.err
    for word in ("perplexity text.txt (in-domain)", "piqa acc_norm", "winogrande acc", "pruned"):
        assert word in shown.out
    # the folder of the run is named, as it was asked for; no other path is
    assert str(tmp_path) not in shown.out.replace(str(run_folder), "")
    report = json.loads((run_folder / "eval" / "evaluation.json").read_text())
    assert list(report["models"]) == ["dense", "pruned"]
    assert report["models"]["dense"]["name"] == "dense-model"
    assert report["models"]["pruned"]["name"] == "run"
    assert report["tasks"][0]["metrics"]["acc"]["difference"]["num_documents"] == 6
    markdown = (run_folder / "eval" / "evaluation.md").read_text()
    assert markdown.startswith("**WARNING: ")
    assert str(tmp_path) not in markdown + json.dumps(report)
    assert (run_folder / "eval" / "pruned" / "piqa.lm-eval.json").is_file()


def test_json_is_all_that_stands_on_stdout(monkeypatch, capfd, run_folder, tmp_path):
    options = ("--tasks", "lambada_openai", "--data", tmp_path / "data", "--json")
    assert call(monkeypatch, run_folder, *options) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["tasks"][0]["metrics"]["perplexity"]["difference"]["kind"] == "ratio"


def test_any_model_is_evaluated_alone_or_against_a_baseline(
    monkeypatch, capfd, run_folder, tmp_path
):
    options = ("--tasks", "piqa", "--data", tmp_path / "data", "--out", tmp_path / "out", "--json")
    assert call(monkeypatch, run_folder / "model", *options) == 0
    alone = json.loads(capfd.readouterr().out)
    assert list(alone["models"]) == ["model"]
    assert alone["tasks"][0]["metrics"]["acc"]["difference"] is None
    baseline = ("--baseline", tmp_path / "dense-model")
    assert call(monkeypatch, run_folder / "model", *options, *baseline) == 0
    both = json.loads(capfd.readouterr().out)
    assert list(both["models"]) == ["dense", "pruned"]
    figures = both["tasks"][0]["metrics"]["acc"]["figures"]
    assert figures["pruned"] == alone["tasks"][0]["metrics"]["acc"]["figures"]["model"]
    assert not (run_folder / "model" / "eval").exists()


def test_dtype_is_of_both_models_and_by_default_the_stored_one(
    monkeypatch, capfd, run_folder, tmp_path
):
    options = ("--tasks", "piqa", "--data", tmp_path / "data", "--limit", 2, "--json")
    for extra, wanted in (((), "float32"), (("--dtype", "bfloat16"), "bfloat16")):
        assert call(monkeypatch, run_folder, *options, *extra) == 0
        models = json.loads(capfd.readouterr().out)["models"]
        assert {model["dtype"] for model in models.values()} == {wanted}


def test_what_can_not_be_evaluated_is_refused(monkeypatch, capfd, run_folder, tmp_path):
    model, data = run_folder / "model", tmp_path / "data"
    assert "nothing to measure" in refusal(monkeypatch, capfd, model)
    assert "--data must be a folder" in refusal(
        monkeypatch, capfd, model, "--tasks", "piqa", "--data", tmp_path / "absent"
    )
    assert "--window must be at least 2, got 1" in refusal(
        monkeypatch, capfd, model, "--text", tmp_path / "text.txt", "--window", 1
    )
    assert "no such folder or file" in refusal(
        monkeypatch, capfd, tmp_path / "absent", "--tasks", "piqa", "--data", data
    )
    assert "must be quick, full or a YAML file" in refusal(
        monkeypatch, capfd, model, "--suite", "half"
    )
    (run_folder / "model" / "config.json").unlink()
    assert "holds no model yet" in refusal(monkeypatch, capfd, run_folder)


def test_the_shipped_suites_are_in_the_package():
    import tomllib

    root = Path(__file__).parents[2]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = root / "eval" / "llmprune_eval" / "suites"
    patterns = packaged["package-data"]["llmprune_eval"]
    (pattern,) = [one for one in patterns if one.endswith(".yaml")]
    files = {file.name for file in (root / "eval" / "llmprune_eval").glob(pattern)}
    assert files == {"quick.yaml", "full.yaml"} == {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        assert yaml.safe_load(file.read_text())["name"] == file.stem
