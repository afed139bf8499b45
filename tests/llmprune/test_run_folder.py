import json

import pytest

from llmprune.errors import InputError
from llmprune.recipe import Recipe
from llmprune.run_folder import RunFolder, identity_of, settle_precision


def recipe_of(**changes):
    data = {"model": {"source": "a/b"}, "prune": {"mlp_channels": {"sparsity": 0.5}}}
    return Recipe.parse({**data, **changes})


def test_a_new_folder_holds_the_recipe(tmp_path):
    folder = RunFolder.begin(tmp_path / "deep" / "run", recipe_of(), resume=False)
    assert folder.read_recipe() == recipe_of()


def test_a_run_is_not_begun_over_another(tmp_path):
    RunFolder.begin(tmp_path, recipe_of(), resume=False).file("scores.json").write_text("{}")
    with pytest.raises(InputError, match="--resume"):
        RunFolder.begin(tmp_path, recipe_of(), resume=False)
    assert RunFolder.begin(tmp_path, recipe_of(), resume=True).path == tmp_path
    with pytest.raises(InputError, match="recipe that began"):
        RunFolder.begin(tmp_path, recipe_of(seed=1), resume=True)


def test_a_run_that_was_refused_at_once_is_begun_again_with_a_mended_recipe(tmp_path):
    RunFolder.begin(tmp_path, recipe_of(), resume=False)
    mended = recipe_of(seed=1)
    assert RunFolder.begin(tmp_path, mended, resume=False).read_recipe() == mended


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        RunFolder.begin(tmp_path, recipe_of(), resume=resume)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="got a file"):
        RunFolder.begin(tmp_path / "run", recipe_of(), resume=False)


def test_what_a_kill_left_in_the_middle_of_a_save_is_removed(tmp_path):
    RunFolder.begin(tmp_path, recipe_of(), resume=False).file("scores.json").write_text("{}")
    (tmp_path / ".plan.json.tmp123").write_text("half")
    (tmp_path / ".model.tmp123").mkdir()
    (tmp_path / ".model.tmp123" / "config.json").write_text("{}")
    RunFolder.begin(tmp_path, recipe_of(), resume=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipe.yaml", "scores.json"]


def test_the_log_forgets_the_steps_that_a_resumed_run_does_again(tmp_path):
    folder = RunFolder.begin(tmp_path, recipe_of(), resume=False)
    for step in (1, 2, 3, 4):
        folder.add_to_log("gates", step, {"loss": 0.5})
    folder.forget_steps("gates", 3)
    folder.forget_steps("recovery", 1)
    rows = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [("gates", 1), ("gates", 2)]


def test_auto_precision_is_settled_once_and_kept(tmp_path, monkeypatch):
    recipe = recipe_of(training={"mixed_precision": "auto"})
    monkeypatch.setattr("llmprune.precision.faster_precision", lambda: "bf16")
    settled = settle_precision(recipe, tmp_path)
    assert settled.training.mixed_precision == "bf16"
    RunFolder.begin(tmp_path, settled, resume=False)
    monkeypatch.setattr("llmprune.precision.faster_precision", lambda: "no")
    assert settle_precision(recipe, tmp_path) == settled


def test_auto_precision_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several processes"):
        settle_precision(recipe_of(training={"mixed_precision": "auto"}), tmp_path)


def test_identity_follows_what_the_gates_saw_and_nothing_else():
    first = identity_of(recipe_of(), "rows", "origin")
    assert identity_of(recipe_of(recovery={"steps": 9}), "rows", "origin") == first
    assert identity_of(recipe_of(evaluation={"prompt": "x"}), "rows", "origin") == first
    for other in (
        identity_of(recipe_of(seed=1), "rows", "origin"),
        identity_of(recipe_of(gates={"steps": 9}), "rows", "origin"),
        identity_of(recipe_of(), "other rows", "origin"),
        identity_of(recipe_of(), "rows", "other origin"),
    ):
        assert other != first
