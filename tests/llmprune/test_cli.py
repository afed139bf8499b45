from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from llmprune import InputError, cli, load_pruned, training
from llmprune.pipeline import Pruned
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from llmprune.weight_blocks import BlockPlan
from tests.llmprune_eval.run_files import a_report

ROOT = Path(__file__).parents[2]
SENTENCE = "the cat sat on the mat\n"


@pytest.fixture
def recipe_file(tiny_folder, tmp_path):
    """A recipe that takes a second: 2 rounds of 2 layers, half the MLP channels."""
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 100)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"source": str(tiny_folder)},
                "calibration": {"dataset": str(text), "num_rows": 8, "row_length": 16},
                "prune": {"mlp_channels": {"sparsity": 0.5}},
                "gates": {"steps": 4},
                "evaluation": {"speed": None, "prompt": "the cat"},
            }
        )
    )
    return file


def call(monkeypatch, *arguments):
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def call_elsewhere(*arguments, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "llmprune.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), **options)


def refusal(monkeypatch, capfd, *arguments):
    """The one line on stderr of a command that the user got wrong."""
    capfd.readouterr()
    assert call(monkeypatch, *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("llmprune: ")
    assert "Traceback" not in lines[0]
    return lines[0].removeprefix("llmprune: ")


def assert_only_whole_files(folder):
    """No temporary files, and every file there reads as what its name says."""
    if not folder.exists():
        return
    for file in folder.rglob("*"):
        assert ".tmp" not in file.name
        if file.suffix == ".yaml":
            Recipe.read(file)
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".jsonl":
            assert all(json.loads(line) for line in file.read_text().splitlines())
        if file.suffix == ".safetensors":
            load_file(file)
        if file.name == "plan.json":
            PrunePlan.read(file)


# what answers at once


def test_help_answers_without_torch():
    code = "import sys\nsys.argv = ['llmprune', '--help']\nfrom llmprune import cli\n"
    code += "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
    code += (
        "slow = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)\n"
    )
    code += "assert not slow, slow\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert child.returncode == 0, child.stderr
    commands = ("inspect", "prune", "plan", "verify", "eval", "bench", "compare")
    for command in (*commands, "report", "export", "push"):
        assert command in child.stdout
    # seconds of the processor, which other programs don't add to; about 0.2 on two cores
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 2


def test_a_wrong_recipe_is_refused_without_torch(tmp_path):
    code = "import sys\nsys.argv = ['llmprune', 'prune', 'absent.yaml']\nfrom llmprune import cli\n"
    code += "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert stop.code == 2\n"
    code += "assert 'torch' not in sys.modules\n"
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == "llmprune: absent.yaml: no such recipe file\n"


def test_inspect_prints_json(monkeypatch, capfd, tiny_folder):
    assert call(monkeypatch, "inspect", tiny_folder, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["model"]["num_attention_heads"] == 4
    assert found["model"]["intermediate_size"] == 24
    assert found["kinds"]


def test_inspect_needs_no_weights(monkeypatch, capfd, tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "inspect", tiny_folder) == 0
    shown = capfd.readouterr().out
    for kind in ("heads", "kv_groups", "mlp_channels", "hidden_channels", "layers"):
        assert kind in shown


def test_a_dry_run_trains_and_writes_nothing(monkeypatch, capfd, recipe_file, tmp_path):
    def never(*args, **options):
        raise AssertionError("a dry run must not train")

    monkeypatch.setattr(training.Batches, "train_step", never)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, "prune", recipe_file, "--dry-run", "--out", tmp_path / "out") == 0
    assert "24" in capfd.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_refuses_what_a_run_refuses(monkeypatch, capfd, recipe_file):
    line = refusal(
        monkeypatch,
        capfd,
        "prune",
        recipe_file,
        "--dry-run",
        "--set",
        "prune.mlp_channels.multiple_of=25",
    )
    assert "prune.mlp_channels.multiple_of must fit into the 24 units" in line


# the way through


@pytest.mark.slow
def test_a_run_leaves_a_verified_model_that_every_command_takes(
    monkeypatch, capfd, recipe_file, tmp_path
):
    out = tmp_path / "out"
    assert call(monkeypatch, "prune", recipe_file, "--out", out) == 0
    names = {file.name for file in out.iterdir()}
    assert names >= {"recipe.yaml", "scores.json", "plan.json", "model", "report.json", "README.md"}
    assert names >= {"verification.json", "log.jsonl", "report.html"}
    assert not {name for name in names if name.startswith((".", "gates", "weights"))}
    assert_only_whole_files(out)
    plan = PrunePlan.read(out / "plan.json")
    assert len(plan.kept["layers.0.mlp_channels"]) == 12
    assert json.loads((out / "model" / "config.json").read_text())["intermediate_size"] == 12
    capfd.readouterr()
    assert call(monkeypatch, "verify", out) == 0
    assert "LlamaForCausalLM reloads" in capfd.readouterr().out
    text = tmp_path / "other.txt"
    text.write_text("the mat sat on the cat\n" * 50)
    assert call(monkeypatch, "eval", out, "--text", text, "--window", "16", "--json") == 0
    json.loads(capfd.readouterr().out)
    assert call(monkeypatch, "inspect", out / "model", "--json") == 0
    assert json.loads(capfd.readouterr().out)["model"]["intermediate_size"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("form", ["uniform", "per_layer"])
def test_a_compensated_run_cuts_what_the_gates_computed_and_keeps_biases(
    monkeypatch, recipe_file, tmp_path, form
):
    out = tmp_path / "run"
    options = ["--set", "compensation=mean", "--set", f"export.format={form}"]
    assert call(monkeypatch, "prune", recipe_file, "--out", out, *options) == 0
    verification = json.loads((out / "verification.json").read_text())
    assert verification["reference"] == "gated"
    assert call(monkeypatch, "verify", out) == 0
    biases = {
        n: v for n, v in load_file(out / "model" / "model.safetensors").items() if "bias" in n
    }
    assert any("down_proj.bias" in name and value.abs().max() > 0 for name, value in biases.items())
    # without compensation the same plan leaves none
    plain = tmp_path / "plain"
    assert call(monkeypatch, "prune", recipe_file, "--out", plain) == 0
    assert not any("bias" in n for n in load_file(plain / "model" / "model.safetensors"))


def test_a_run_timed_on_a_busy_machine_ends_with_a_warning(
    monkeypatch, capfd, recipe_file, tmp_path
):
    whole = a_report()
    dense = whole.speed.models["dense"]
    slowed = replace(dense, prefill=replace(dense.prefill, waited=0.3))
    speed = replace(whole.speed, models={**whole.speed.models, "dense": slowed})
    busy = whole.model_copy(update={"speed": speed})
    for report, is_told in ((busy, True), (whole, False)):
        found = Pruned(tmp_path, None, report)
        monkeypatch.setattr("llmprune.pipeline.prune", lambda *a, found=found, **o: found)
        assert call(monkeypatch, "prune", recipe_file, "--out", tmp_path / "out") == 0
        told = " ".join(capfd.readouterr().err.split())
        words = "WARNING: prefill: too noisy to conclude; other programs had the processor for 30%"
        assert (words in told) is is_told


def test_a_plan_written_by_hand_is_cut(monkeypatch, capfd, recipe_file, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert call(monkeypatch, "prune", recipe_file, "--out", first) == 0
    plan = PrunePlan.read(first / "plan.json")
    mine = {"layers.0.mlp_channels": tuple(range(7)), "layers.1.mlp_channels": tuple(range(7))}
    second.mkdir()
    shutil.copy(first / "recipe.yaml", second)
    (second / "plan.json").write_text(PrunePlan(model=plan.model, kept=mine).to_json())
    assert call(monkeypatch, "prune", recipe_file, "--out", second, "--resume") == 0
    assert json.loads((second / "model" / "config.json").read_text())["intermediate_size"] == 7
    assert not (second / "scores.json").exists()


# another budget from the same scores


@pytest.fixture
def scored(recipe_file, tmp_path, monkeypatch):
    """A run that has its scores, of heads and channels under a budget, and nothing after them."""
    folder = tmp_path / "scored"
    arguments = ["--set", "prune.mlp_channels.sparsity=null", "--set", "budget.sparsity=0.2"]
    arguments += ["--set", "prune.heads.sparsity=null", "--set", "budget.tolerance=0.05"]

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llmprune.unit_pruning.choose", stop)
        assert call(patched, "prune", recipe_file, "--out", folder, *arguments) == 130
    assert {file.name for file in folder.iterdir()} == {"recipe.yaml", "scores.json", "log.jsonl"}
    return folder


@pytest.mark.slow
def test_a_new_plan_from_the_scores_of_a_run_is_cut(monkeypatch, capfd, scored, tmp_path):
    out = tmp_path / "other"
    before = (scored / "recipe.yaml").read_bytes()
    shown = ("--budget", "sparsity=0.5", "--budget", "of=flops", "--out", out)
    assert call(monkeypatch, "plan", scored, *shown) == 0
    assert "MLP channels a layer" in capfd.readouterr().out
    assert {file.name for file in out.iterdir()} == {"recipe.yaml", "scores.json", "plan.json"}
    assert (scored / "recipe.yaml").read_bytes() == before
    recipe = Recipe.read(out / "recipe.yaml")
    assert (recipe.budget.sparsity, recipe.budget.of) == (0.5, "flops")
    assert call(monkeypatch, "prune", out / "recipe.yaml", "--out", out, "--resume") == 0
    size = json.loads((out / "model" / "config.json").read_text())["intermediate_size"]
    plan = PrunePlan.read(out / "plan.json")
    assert size == len(plan.kept["layers.0.mlp_channels"]) < 24
    line = refusal(monkeypatch, capfd, "plan", out, "--budget", "sparsity=0.2")
    assert "name a new folder with --out" in line


def test_a_plan_in_place_replaces_recipe_and_plan(monkeypatch, scored):
    assert call(monkeypatch, "plan", scored, "--budget", "sparsity=0.4") == 0
    first = PrunePlan.read(scored / "plan.json")
    assert call(monkeypatch, "plan", scored, "--budget", "sparsity=0.2") == 0
    again = PrunePlan.read(scored / "plan.json")
    assert Recipe.read(scored / "recipe.yaml").budget.sparsity == 0.2
    name = "layers.0.mlp_channels"
    assert set(first.kept[name]) < set(again.kept[name])


def test_a_new_plan_needs_no_weights(monkeypatch, scored, tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    assert call(monkeypatch, "plan", scored, "--budget", "sparsity=0.3") == 0


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("sparsity", "--budget takes dotted.key=value, got 'sparsity'"),
        ("sparsty=0.5", "unknown key budget.sparsty"),
        ("sparsity=1.5", "budget.sparsity"),
        ("sparsity=0.99", "budget: sparsity 0.99 of decoder_parameters must be met"),
        ("allocation=importance", "scores: must be importances"),
    ],
)
def test_a_wrong_budget_is_refused_and_changes_nothing(
    monkeypatch, capfd, scored, tmp_path, budget, message
):
    before = {file.name: file.read_bytes() for file in scored.iterdir()}
    for options in ((), ("--out", tmp_path / "other")):
        line = refusal(monkeypatch, capfd, "plan", scored, "--budget", budget, *options)
        assert message in line
    assert not (tmp_path / "other").exists()
    assert {file.name: file.read_bytes() for file in scored.iterdir()} == before


def test_a_plan_needs_scores(monkeypatch, capfd, scored):
    (scored / "scores.json").unlink()
    line = refusal(monkeypatch, capfd, "plan", scored, "--budget", "sparsity=0.3")
    assert "must hold scores.json to plan from" in line


@pytest.mark.slow
@pytest.mark.parametrize("form", ["uniform", "per_layer"])
@pytest.mark.parametrize("method", ["sequential_attention", "magnitude"])
def test_importances_decide_over_the_budget_and_a_new_plan_agrees(
    monkeypatch, recipe_file, tmp_path, method, form
):
    out = tmp_path / "out"
    settings = {
        "prune.mlp_channels.sparsity": "null",
        "prune.heads.sparsity": "null",
        "budget": "{sparsity: 0.3, allocation: importance, tolerance: 0.05}",
        "method": method,
        "export.format": form,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert call(monkeypatch, "prune", recipe_file, "--out", out, *options) == 0
    plan = PrunePlan.read(out / "plan.json")
    report = json.loads((out / "report.json").read_text())
    kept = report["pruned"]["decoder_parameters"] / report["dense"]["decoder_parameters"]
    assert 0.65 <= kept <= 0.7
    again = tmp_path / "again"
    arguments = ("--budget", "sparsity=0.3", "--out", again)
    assert call(monkeypatch, "plan", out, *arguments) == 0
    if method == "magnitude" or form == "per_layer":
        assert PrunePlan.read(again / "plan.json") == plan


def pretended(models, budget, on_round=None):
    """Milliseconds by parameters, as if every one took as long."""
    return {n: sum(p.numel() for p in model.parameters()) / 100 for n, model in models.items()}


@pytest.mark.slow
def test_a_latency_budget_is_promised_and_measured_again(monkeypatch, capfd, recipe_file, tmp_path):
    monkeypatch.setattr("llmprune_eval.speed.phase_ms", pretended)
    out, other = tmp_path / "out", tmp_path / "other"
    budget = "budget={latency: 0.8, context: 16, tolerance: 0.03, allocation: importance}"
    options = ["--set", "prune.mlp_channels.sparsity=null", "--set", budget]
    options += ["--set", "method=magnitude"]
    assert call(monkeypatch, "prune", recipe_file, "--dry-run", *options) == 0
    assert "prefill of 1 x 16 tokens" in capfd.readouterr().out
    assert call(monkeypatch, "prune", recipe_file, "--out", out, *options) == 0
    latency = json.loads((out / "report.json").read_text())["latency"]
    promised = latency["predicted"]["pruned"] / latency["predicted"]["dense"]
    assert 0.77 <= promised <= 0.8
    assert latency["measured"]["pruned"] > 0
    assert "prefill budget, predicted" in (out / "README.md").read_text()
    # another goal, from the same table
    monkeypatch.setattr("llmprune_eval.speed.phase_ms", None)
    assert call(monkeypatch, "plan", out, "--budget", "latency=0.9", "--out", other) == 0
    assert (other / "latency.json").read_text() == (out / "latency.json").read_text()
    kept = [PrunePlan.read(f / "plan.json").kept["layers.0.mlp_channels"] for f in (out, other)]
    assert len(kept[0]) < len(kept[1])
    # another phase, timed anew
    monkeypatch.setattr("llmprune_eval.speed.phase_ms", pretended)
    last = tmp_path / "last"
    arguments = ("--budget", "latency=0.85", "--budget", "phase=decode", "--out", last)
    assert call(monkeypatch, "plan", other, *arguments) == 0
    assert json.loads((last / "latency.json").read_text())["phase"] == "decode"


# what a user can get wrong


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prune.chanels.sparsity=0.5", "unknown key prune.chanels"),
        ("gates.stepps=3", "unknown key gates.stepps"),
        ("prune.mlp_channels.sparsity=1.0", "less than 1, got 1.0"),
        ("prune.mlp_channels.sparsity=-0.1", "greater than or equal to 0, got -0.1"),
        ("prune.mlp_channels.sparsity=much", "prune.mlp_channels.sparsity"),
        ("calibration.num_rows=0", "calibration.num_rows"),
        ("gates.sparsify=0.3", "dense + sparsify + sparse must be 1"),
        ("budget.sparsity=0.5", "budget has no kind to act on"),
        ("prune.mlp_channels.scope=model", "needs export.format: per_layer"),
        ("nonsense", "--set takes dotted.key=value, got 'nonsense'"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(
    monkeypatch, capfd, recipe_file, tmp_path, setting, message
):
    out = tmp_path / "out"
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", out, "--set", setting)
    assert message in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["prune.mlp_channels.multiple_of=25"], "multiple_of must fit into the 24 units"),
        (
            ["prune.mlp_channels.sparsity=null", "budget.sparsity=0.9"],
            "the nearest that mlp_channels can reach is",
        ),
        (["prune.layers.sparsity=0.1"], "sparsity must remove something"),
        (["prune.attention_sublayers.sparsity=0.5"], "use export.format: per_layer"),
        (["calibration.row_length=5000"], "must fill a row of 5000 tokens"),
        (["calibration.num_rows=5000"], "calibration.num_rows must be at most"),
        (["calibration.dataset=absent.txt"], "absent.txt"),
        (["model.source=./absent"], "absent"),
    ],
)
def test_what_the_model_or_the_text_can_not_do_is_refused(
    monkeypatch, capfd, recipe_file, tmp_path, settings, message
):
    out = tmp_path / "out"
    options = [part for setting in settings for part in ("--set", setting)]
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", out, *options)
    assert message in line
    assert_only_whole_files(out)
    assert {file.name for file in out.iterdir()} <= {"recipe.yaml"}


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_text_is_refused(monkeypatch, capfd, recipe_file, tmp_path, content):
    (tmp_path / "text.txt").write_text(content)
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", tmp_path / "out")
    assert "text.txt" in line or "calibration" in line


def test_truncated_weights_are_refused(monkeypatch, capfd, recipe_file, tiny_folder, tmp_path):
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", tmp_path / "out")
    assert "model.safetensors" in line
    assert_only_whole_files(tmp_path / "out")


def test_an_unsupported_model_type_is_refused(
    monkeypatch, capfd, recipe_file, tiny_folder, tmp_path
):
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=8, num_attention_heads=2, **sizes)
    OPTForCausalLM(config).save_pretrained(tiny_folder)
    for arguments in (("inspect", tiny_folder), ("prune", recipe_file, "--out", tmp_path / "out")):
        line = refusal(monkeypatch, capfd, *arguments)
        assert "model_type must be one of gpt2, llama" in line
        assert "got 'opt'" in line


def hand_written(recipe_file, out, plan):
    out.mkdir()
    (out / "recipe.yaml").write_text(Recipe.read(recipe_file).to_yaml())
    (out / "plan.json").write_text(plan)


MODEL = {
    "family": "llama",
    "hidden_size": 16,
    "head_dim": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


@pytest.mark.parametrize(
    ("model", "kept", "message"),
    [
        ({"hidden_size": 32}, {}, "plan: must be for this model, which has hidden_size 16"),
        ({"num_hidden_layers": 5}, {"layers": [0, 4]}, "must be for this model"),
        ({}, {"layers.0.mlp_channels": [3, 99]}, "must be ascending indices in [0, 24)"),
        ({}, {"layers.7.mlp_channels": [3]}, "kept.layers.7.mlp_channels must name a unit group"),
        ({}, {"layers.0.heads": [0, 1, 2]}, "same number of query heads"),
        ({}, {"layers.0.mlp_channels": []}, "must keep at least one unit"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(
    monkeypatch, capfd, recipe_file, tmp_path, model, kept, message
):
    out = tmp_path / "out"
    plan = {"format": "llmprune-plan/1", "model": MODEL | model, "kept": kept}
    hand_written(recipe_file, out, json.dumps(plan))
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", out, "--resume")
    assert message in line
    assert {file.name for file in out.iterdir()} == {"recipe.yaml", "plan.json"}


@pytest.mark.parametrize("plan", ["", "{", "[]", '{"format": "llmprune-plan/1"}'])
def test_a_plan_that_is_none_is_refused_by_file(monkeypatch, capfd, recipe_file, tmp_path, plan):
    hand_written(recipe_file, tmp_path / "out", plan)
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", tmp_path / "out", "--resume")
    assert "out/plan.json: " in line


def test_an_output_folder_with_other_files_is_refused_and_left_alone(
    monkeypatch, capfd, recipe_file, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for options in ((), ("--resume",)):
        line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", out, *options)
        assert "--out must be empty or new" in line
        assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("")
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", file)
    assert "must be a folder" in line
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", file / "inside")
    assert "--out can't be made" in line or "must be a folder" in line


def test_another_run_is_not_overwritten_nor_taken_up(monkeypatch, capfd, recipe_file, tmp_path):
    out = tmp_path / "out"
    hand_written(recipe_file, out, "{}")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", out)
    assert "already holds a run; take it up with --resume" in line
    other = ("--resume", "--set", "seed=1")
    line = refusal(monkeypatch, capfd, "prune", recipe_file, "--out", out, *other)
    assert "--resume needs the recipe that began the run" in line
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("command", ["verify", "eval", "bench"])
def test_a_folder_that_prune_did_not_write_is_refused(monkeypatch, capfd, tmp_path, command):
    line = refusal(monkeypatch, capfd, command, tmp_path)
    assert "must be a folder that prune wrote" in line


@pytest.mark.slow
def test_a_changed_model_fails_verification(monkeypatch, capfd, recipe_file, tmp_path):
    out = tmp_path / "out"
    assert call(monkeypatch, "prune", recipe_file, "--out", out) == 0
    file = out / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    line = refusal(monkeypatch, capfd, "verify", out)
    assert "must give the recorded logits within 0.0001" in line
    file.write_bytes(file.read_bytes()[:-8])
    assert "must load with stock transformers" in refusal(monkeypatch, capfd, "verify", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        # what is too long first: the recipe; the state of the gates; the weights
        (200, []),
        (1500, ["training.save_every=1"]),
        (9000, ["training.save_every=1"]),
        # the log, a line at a time
        (2500, ["gates.steps=100", "training.save_every=1000"]),
    ],
)
def test_a_full_disk_leaves_whole_files_and_the_run_can_go_on(
    recipe_file, tmp_path, limit, settings
):
    """No file may grow beyond the limit: a write fails as it does on a full disk."""

    def fill_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ("prune", recipe_file, "--out", out, *options)
    child = call_elsewhere(*arguments, preexec_fn=fill_disk)
    assert child.returncode == 2, child.stderr
    assert "Traceback" not in child.stderr
    last = child.stderr.splitlines()[-1]
    assert last.startswith("llmprune: ")
    assert "could not be written" in last
    assert_only_whole_files(out)
    child = call_elsewhere(*arguments, "--resume")
    assert child.returncode == 0, child.stderr
    assert (out / "README.md").is_file()
    assert_only_whole_files(out)


@pytest.mark.slow
def test_a_refusal_is_one_line_on_stderr_and_nothing_else(recipe_file, tmp_path):
    settings = {
        "prune.mlp_channels.multiple_of=25": "multiple_of",
        "calibration.row_length=5000": "5000 tokens",
    }
    for setting, message in settings.items():
        out = tmp_path / setting[:5]
        child = call_elsewhere("prune", recipe_file, "--out", out, "--set", setting)
        assert child.returncode == 2
        assert len(child.stderr.splitlines()) == 1
        assert message in child.stderr


# weight blocks


@pytest.fixture
def block_recipe(recipe_file, tmp_path):
    """Half of the MLP's and attention's blocks of 16 x 16, of a model that they fit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = yaml.safe_load(recipe_file.read_text())
    source = Path(data["model"]["source"])
    config = LlamaConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 64, None
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "head_dim": 8})).save_pretrained(source)
    data["prune"] = {"weight_blocks": {"block": [16, 16], "sparsity": 0.5}}
    data["evaluation"]["speed"] = {"context": 8, "new_tokens": 1, "rounds": 3}
    recipe_file.write_text(yaml.safe_dump(data))
    return recipe_file


def test_a_dry_run_shows_the_blocks(monkeypatch, capfd, block_recipe):
    monkeypatch.setenv("COLUMNS", "120")
    assert call(monkeypatch, "prune", block_recipe, "--dry-run") == 0
    shown = capfd.readouterr().out
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert projection in shown
    assert "0.500" in shown


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["nothing", "recovery.steps=2", "reconstruction.num_rows=4"])
def test_blocks_become_zeros_of_a_stock_model_that_runs_without_them(
    monkeypatch, capfd, block_recipe, tmp_path, trains
):
    out = tmp_path / "out"
    options = [] if trains == "nothing" else ["--set", trains]
    assert call(monkeypatch, "prune", block_recipe, "--out", out, *options) == 0
    verification = json.loads((out / "verification.json").read_text())
    assert verification["reference"] == ("gated" if trains == "nothing" else "final")
    assert verification["model_class"] == "LlamaForCausalLM"
    assert verification["block_sparse"]["float64"] < 1e-9
    weights = load_file(out / "model" / "model.safetensors")
    up = weights["model.layers.0.mlp.up_proj.weight"]
    assert (up == 0).sum() == up.numel() // 2
    stock = AutoModelForCausalLM.from_pretrained(out / "model")
    sparse = load_pruned(out, block_sparse=True)
    tokens = torch.arange(8)[None] % 8
    torch.testing.assert_close(sparse(tokens).logits, stock(tokens).logits)
    assert sum(p.numel() for p in sparse.parameters()) < sum(p.numel() for p in stock.parameters())
    capfd.readouterr()
    short = ("--context", "8", "--new-tokens", "4", "--rounds", "3")
    assert call(monkeypatch, "bench", out, *short) == 0
    assert "block-sparse prefill:" in " ".join(capfd.readouterr().out.split())


@pytest.mark.slow
def test_another_sparsity_comes_from_the_same_scores(monkeypatch, capfd, block_recipe, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    options = ["--set", "prune.weight_blocks.rows=free"]
    assert call(monkeypatch, "prune", block_recipe, "--out", out, *options) == 0
    line = refusal(monkeypatch, capfd, "plan", out, "--budget", "sparsity=0.25")
    assert "already holds a model" in line
    line = refusal(monkeypatch, capfd, "plan", out, "--budget", "block=[32, 32]", "--out", other)
    assert "only sparsity and rows can change" in line
    assert call(monkeypatch, "plan", out, "--budget", "sparsity=0.25", "--out", other) == 0
    plan = BlockPlan.read(other / "plan.json")
    assert plan.density == pytest.approx(0.75, abs=0.02)
    assert call(monkeypatch, "prune", other / "recipe.yaml", "--out", other, "--resume") == 0
    assert json.loads((other / "verification.json").read_text())["block_sparse"] is not None


def test_a_model_without_blocks_is_not_loaded_as_block_sparse(tiny_folder):
    with pytest.raises(InputError, match="needs a model that weight blocks were pruned from"):
        load_pruned(tiny_folder, block_sparse=True)
