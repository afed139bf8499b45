from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from llmprune.errors import InputError
from llmprune.pipeline import prune
from llmprune.publication import public_recipe
from llmprune.recipe import Recipe
from llmprune.run_folder import RunFolder
from llmprune.tracking import configuration, tracked

TOKEN = "hf_" + "aB3" * 10
GATE_STEPS, RECOVERY_STEPS = 6, 4


@pytest.fixture
def recipe(saved_folder, tmp_path):
    """A run of two tasks with the trackers that are asked for."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat the mat sat on the cat " * 200)

    def of(*trackers, **changes):
        data = {
            "model": {"source": str(saved_folder)},
            "calibration": {"dataset": str(text), "num_rows": 8, "row_length": 16},
            "prune": {"mlp_channels": {"sparsity": 0.5}},
            "gates": {"steps": GATE_STEPS},
            "recovery": {"steps": RECOVERY_STEPS},
            "training": {"save_every": 2},
            "tracking": {"trackers": list(trackers), "project": "tests"},
            "evaluation": {
                "perplexity": [{"dataset": str(text), "window": 16, "max_windows": 4}],
                "speed": None,
                "prompt": f"the cat {TOKEN}",
            },
        }
        return Recipe.parse({**data, **changes})

    return of


@pytest.fixture(autouse=True)
def unverified(monkeypatch):
    """Verification takes a process of its own and tells trackers nothing."""
    monkeypatch.setattr("llmprune.pipeline.verify", lambda folder: None)


@pytest.fixture
def wandb(monkeypatch):
    """The package of a tracker as Accelerate sees it, without its service."""
    import accelerate.tracking

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py", name="wandb")
    module.runs, module.kept = [], {}
    module.Error = type("Error", (Exception,), {})
    module.config = types.SimpleNamespace(
        update=lambda values, allow_val_change: module.kept.update(values)
    )

    class Run:
        def __init__(self, **options):
            self.options, self.rows, self.is_over = options, [], False
            module.runs.append(self)

        def log(self, values, step):
            self.rows.append((step, values))

        def finish(self):
            self.is_over = True

    module.init = lambda **options: Run(**options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    names = [*accelerate.tracking._available_trackers, accelerate.tracking.LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", names)
    return module


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def expected_rows(folder):
    """What trackers must have been told, by the log: (step, figures), recovery after the gates."""
    before = {"gates": 0, "recovery": GATE_STEPS}
    return [
        (
            before[row["phase"]] + row["step"],
            {f"{row['phase']}/{k}": v for k, v in row.items() if k not in ("phase", "step")},
        )
        for row in log_of(folder)
    ]


def stop_at(task, step):
    def on_progress(name, done, total):
        if (name, done) == (task, step):
            raise KeyboardInterrupt

    return on_progress


def test_the_log_has_loss_budget_temperature_and_rates_without_any_tracker(recipe, tmp_path):
    prune(recipe(), tmp_path / "run")
    rows = log_of(tmp_path / "run")
    gates = [row for row in rows if row["phase"] == "gates"]
    recovery = [row for row in rows if row["phase"] == "recovery"]
    assert [row["step"] for row in gates] == list(range(1, GATE_STEPS + 1))
    assert [row["step"] for row in recovery] == list(range(1, RECOVERY_STEPS + 1))
    assert all(row["budget"] == pytest.approx(0.5) for row in gates)
    heat = [row["temperature"] for row in gates]
    assert heat == sorted(heat)
    assert heat[-1] == pytest.approx(30.0)
    assert {row["logits_learning_rate"] for row in gates} == {0.02}
    # the step's own gates: soft at first, decided at last, and always what the budget allows
    assert all(row["mlp_channels_mean"] == pytest.approx(0.5, abs=1e-3) for row in gates)
    decided = [row["mlp_channels_open"] + row["mlp_channels_closed"] for row in gates]
    assert decided[-1] > decided[0]
    assert "mlp_channels_open" not in recovery[-1]
    assert recovery[-1]["weights_learning_rate"] == pytest.approx(1e-5)
    assert not (tmp_path / "run" / "tracking").exists()


def test_a_tracker_is_told_what_the_log_is_told_and_then_the_outcome(recipe, wandb, tmp_path):
    pruned = prune(recipe("wandb"), tmp_path / "run")
    (run,) = wandb.runs
    assert run.is_over
    assert run.options["project"] == "tests"
    assert run.options["name"] == "run"
    *rows, (last, outcome) = run.rows
    assert rows == expected_rows(tmp_path / "run")
    assert [step for step, _ in rows] == list(range(1, GATE_STEPS + RECOVERY_STEPS + 1))
    assert last == GATE_STEPS + RECOVERY_STEPS + 1
    text = pruned.report.perplexities[0]
    ratio = text.pruned.value / text.dense.value
    assert outcome["evaluation/perplexity_ratio/text.txt"] == pytest.approx(ratio)
    assert outcome["evaluation/parameters_ratio"] < 1


def test_trackers_get_the_recipe_without_tokens_and_paths(recipe, wandb, tmp_path):
    known = recipe("wandb")
    prune(known, tmp_path / "run")
    assert wandb.kept == configuration(known)
    assert wandb.kept["gates.steps"] == GATE_STEPS
    assert wandb.kept["prune.mlp_channels.sparsity"] == 0.5
    assert wandb.kept["model.source"] == "local:tiny-llama"
    assert wandb.kept["evaluation.prompt"] == "the cat (hidden)"
    told = json.dumps([wandb.kept, [values for _, values in wandb.runs[0].rows]])
    assert TOKEN not in told
    assert str(tmp_path) not in told


def test_the_users_own_token_is_hidden_whatever_its_form(recipe, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "open sesame")
    known = recipe(evaluation={"prompt": "say open sesame", "speed": None})
    assert configuration(known)["evaluation.prompt"] == "say (hidden)"


@pytest.mark.parametrize(
    ("task", "step", "goes_on_from"), [("gates", 5, 5), ("recovery", 2, GATE_STEPS + 1)]
)
def test_a_resumed_run_goes_on_in_the_run_of_its_tracker(
    recipe, wandb, tmp_path, task, step, goes_on_from
):
    known, folder = recipe("wandb"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        prune(known, folder, on_progress=stop_at(task, step))
    assert wandb.runs[0].is_over
    wandb.kept.clear()
    prune(known, folder, resume=True)
    first, second = wandb.runs
    assert second.options["id"] == first.options["id"]
    assert second.options["resume"] == "allow"
    assert wandb.kept == {}, "what the run is was told when it began"
    assert second.rows[0][0] == goes_on_from
    whole = {**dict(first.rows), **dict(second.rows[:-1])}
    assert list(whole.items()) == expected_rows(folder)


def test_a_run_that_was_refused_and_is_begun_again_has_a_run_of_its_own(recipe, wandb, tmp_path):
    known, folder = recipe("wandb"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        prune(known, folder, on_progress=stop_at("load the dense model", 0))
    prune(known, folder)
    first, second = wandb.runs
    assert first.options["id"] != second.options["id"]


def test_several_seeds_are_told_one_after_another(recipe, wandb, tmp_path):
    known = recipe("wandb", gates={"steps": 3, "seeds": 2})
    prune(known, tmp_path / "run")
    steps = [step for step, values in wandb.runs[0].rows if "gates/loss" in values]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_tracker_whose_package_is_missing_is_refused_before_any_work(
    recipe, tmp_path, monkeypatch
):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"must be installed, trackio is not; `pip install trac"):
        prune(recipe("trackio"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_package_is_no_package(recipe, tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    # what is installed here does not matter
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="trackio is not"):
        prune(recipe("trackio"), tmp_path / "run")


def test_a_tracker_that_will_not_start_says_why_without_the_token(recipe, wandb, tmp_path):
    def refuse(**options):
        raise wandb.Error(f"no login for {TOKEN}")

    wandb.init = refuse
    with pytest.raises(InputError, match=r"wandb must start, got: no login for \(hidden\)"):
        prune(recipe("wandb"), tmp_path / "run")


def test_only_the_main_process_has_trackers(recipe, tmp_path):
    known = recipe("wandb")
    folder = RunFolder.begin(tmp_path / "run", known, resume=False)
    # an accelerator of another process: whatever else is asked of it fails
    with tracked(types.SimpleNamespace(is_main_process=False), known, folder):
        pass
    assert not folder.tracking.exists()


def test_a_published_recipe_tells_nobody(recipe):
    public = public_recipe(recipe("wandb"), "")
    assert public.tracking.trackers == ()
    assert public.tracking.project == "llmprune"


@pytest.mark.parametrize("project", ["", "a/b", "..", "a b"])
def test_a_project_is_a_name(recipe, project):
    with pytest.raises(InputError, match=r"tracking\.project"):
        recipe(tracking={"project": project})


# the real packages


def events_of(folder):
    """(tag, step) -> every value that TensorBoard would show, after its purging."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def expected_events(folder):
    rows = expected_rows(folder)
    return {(tag, step): [pytest.approx(v)] for step, row in rows for tag, v in row.items()}


def test_tensorboard_shows_every_step_once_also_of_a_run_that_was_killed(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    known, folder = recipe("tensorboard"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        # the state of step 4 is kept; step 5 is done, and told, again
        prune(known, folder, on_progress=stop_at("gates", 5))
    prune(known, folder, resume=True)
    found = events_of(folder / "tracking" / "tests")
    shown = {key: values for key, values in found.items() if not key[0].startswith("evaluation/")}
    assert shown == expected_events(folder)
    assert ("evaluation/parameters_ratio", GATE_STEPS + RECOVERY_STEPS + 1) in found
    (configured,) = (folder / "tracking" / "tests").glob("*/hparams.yml")
    assert "mlp_channels.sparsity" in configured.read_text()
    written = b"".join(f.read_bytes() for f in Path(folder / "tracking").rglob("*") if f.is_file())
    assert TOKEN.encode() not in written
    assert str(tmp_path).encode() not in written


@pytest.mark.slow
def test_of_two_processes_one_tells_the_trackers(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    file, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(recipe("tensorboard").to_yaml())
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(root / part) for part in ("", "kernels", "eval")),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "llmprune.cli", "prune", str(file), "--out", str(folder)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert len(list((folder / "tracking" / "tests").glob("events.*"))) == 1
    found = events_of(folder / "tracking" / "tests")
    shown = {key: values for key, values in found.items() if not key[0].startswith("evaluation/")}
    assert shown == expected_events(folder)


@pytest.mark.slow
def test_wandb_and_trackio_take_a_run_without_a_network(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for package in ("wandb", "trackio"):
        pytest.importorskip(package)
    folder = tmp_path / "run"
    prune(recipe("wandb", "trackio"), folder)
    (kept,) = (folder / "tracking" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"gates/loss" in kept.read_bytes()
    assert TOKEN.encode() not in kept.read_bytes()
    told = b"".join(file.read_bytes() for file in (tmp_path / "trackio").iterdir())
    assert b"gates/loss" in told
    assert TOKEN.encode() not in told
