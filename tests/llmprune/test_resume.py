from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STEPS = 40
RECOVERY_STEPS = 30

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(saved_folder):
    """What every run here shares: enough work a step to be stopped between two."""
    return {
        "model": {"source": str(saved_folder)},
        "calibration": {"num_rows": 64, "row_length": 128},
        "prune": {"mlp_channels": {"sparsity": 0.5}, "kv_groups": {"sparsity": 0.5}},
        "gates": {"steps": STEPS, "batch_size": 8},
        "recovery": {"steps": RECOVERY_STEPS, "batch_size": 8},
        "training": {"save_every": 3},
        "evaluation": {"speed": None, "prompt": "the cat"},
    }


VARIANTS = {
    "capped": {},
    "plus_plus": {
        "variant": "plus_plus",
        "train": "all",
        "dense": 0.2,
        "sparsify": 0.6,
        "sparse": 0.2,
        "cycles": 2,
    },
    "lora": {"train": "lora"},
}


def command(recipe, out, *options):
    return [sys.executable, "-m", "llmprune.cli", "prune", str(recipe), "--out", str(out), *options]


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def run(recipe, out, *options):
    child = subprocess.run(
        command(recipe, out, *options), capture_output=True, text=True, env=environment()
    )
    assert child.returncode == 0, child.stderr


def num_rows(log, phase):
    if not log.exists():
        return 0
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return sum(row["phase"] == phase for row in rows)


def run_until(recipe, out, phase, rows, *options):
    """Run until so many more steps of a phase are logged, then kill -9."""
    log = out / "log.jsonl"
    wanted = num_rows(log, phase) + rows
    child = subprocess.Popen(
        command(recipe, out, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        while num_rows(log, phase) < wanted:
            assert child.poll() is None, f"ended before {phase} had {rows} steps more"
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def write_recipe(base, file, gates):
    text = file.with_suffix(".txt")
    text.write_text("the cat sat on the mat\n the mat sat on the cat cat\n" * 800)
    data = {**base, "gates": base["gates"] | gates}
    data["calibration"] = base["calibration"] | {"dataset": str(text)}
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_any_point_resumes_to_the_same_plan_and_model(base, variant, tmp_path):
    recipe = write_recipe(base, tmp_path / "recipe.yaml", VARIANTS[variant])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(recipe, whole)
    # before the first state, between two states, and in the recovery
    run_until(recipe, stopped, "gates", 1)
    assert not (stopped / "plan.json").exists()
    run_until(recipe, stopped, "gates", 11, "--resume")
    assert not (stopped / "plan.json").exists()
    run_until(recipe, stopped, "gates", 8, "--resume")
    run_until(recipe, stopped, "recovery", 5, "--resume")
    assert (stopped / "plan.json").exists()
    assert not (stopped / "model").exists()
    run(recipe, stopped, "--resume")
    for name in ("recipe.yaml", "scores.json", "plan.json", "model/model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    left = {file.name for file in stopped.iterdir()} - {file.name for file in whole.iterdir()}
    assert not left


def test_a_finished_run_is_taken_up_without_training(base, tmp_path):
    recipe = write_recipe(base, tmp_path / "recipe.yaml", {"steps": 3})
    out = tmp_path / "out"
    run(recipe, out)
    log = (out / "log.jsonl").read_text()
    (out / "README.md").unlink()
    run(recipe, out, "--resume")
    assert (out / "log.jsonl").read_text() == log
    assert (out / "README.md").exists()
