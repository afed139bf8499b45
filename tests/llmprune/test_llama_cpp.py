"""Exported GGUF files, run in llama.cpp itself."""

from __future__ import annotations

import numpy
import pytest
import torch

from tests.llmprune import tiny
from tests.llmprune.test_compensation import means_of
from tests.llmprune.test_export import GGUF_VOCAB, byte_tokenizer, gguf_of, plan_of
from tests.llmprune.tiny import logits, plan_for, tiny_model

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama.cpp is not installed (pip install llama-cpp-python builds it)"
)
PROMPTS = ("the cat", "the 12 <think> thé", "  th e\n\n121")
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def _byte_vocabulary(monkeypatch):
    monkeypatch.setattr(tiny, "VOCAB", GGUF_VOCAB)


class LlamaCpp:
    """llama.cpp on one file, everything in float32."""

    def __init__(self, path):
        float32 = llama_cpp.GGML_TYPE_F32
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=64,
            logits_all=True,
            type_k=float32,
            type_v=float32,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )

    def logits(self, tokens):
        """Logits of one row, (length,) -> (length, vocab_size)."""
        self.llama.reset()
        self.llama.eval(tokens)
        return torch.from_numpy(numpy.array(self.llama.scores[: len(tokens)]))

    def greedy(self, tokens):
        """The next tokens, through llama.cpp's KV cache."""
        self.llama.reset()
        found = []
        self.llama.eval(tokens)
        for _ in range(NEW_TOKENS):
            found.append(int(numpy.argmax(self.llama.scores[self.llama.n_tokens - 1])))
            self.llama.eval(found[-1:])
        return found


def greedy(model, tokens):
    row = torch.tensor([tokens])
    # a random model likes to end at once
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        return model.generate(row, use_cache=True, **options)[0, len(tokens) :].tolist()


def assert_llama_cpp_computes_the_same(path, model, tolerance=1e-4):
    """Logits to `tolerance` of the largest, and the same greedy tokens."""
    model = model.float()
    runner, tokenizer = LlamaCpp(path), byte_tokenizer()
    for prompt in PROMPTS:
        tokens = tokenizer(prompt).input_ids
        assert runner.llama.tokenize(prompt.encode(), add_bos=True, special=True) == tokens
        expected = logits(model, torch.tensor([tokens]))[0]
        scale = float(expected.abs().max())
        assert float((runner.logits(tokens) - expected).abs().max()) < tolerance * scale
        assert runner.greedy(tokens) == greedy(model, tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_llama_cpp_computes_what_a_uniform_model_computes(family, tmp_path):
    model = tiny_model(family, tied=family == "llama")
    kinds = ("mlp_channels",) if family == "gpt2" else ("kv_groups", "mlp_channels", "layers")
    path, narrow = gguf_of(tmp_path, model, plan_for(model, kinds), form="uniform")
    # llama.cpp looks GELU up in a table of float16
    assert_llama_cpp_computes_the_same(path, narrow, 1e-3 if family == "gpt2" else 1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("first_lost", [False, True])
def test_llama_cpp_computes_what_a_model_with_differing_layers_computes(
    family, first_lost, tmp_path
):
    model = tiny_model(family, layers=4)
    plan = plan_of(
        model,
        attention_sublayers=(1, 2) if first_lost else (0, 2, 3),
        mlp_sublayers=(0, 1, 3) if first_lost else (0, 1, 2),
        **{"layers.2.kv_groups": (1,), "layers.1.mlp_channels": (0, 4, 5)},
    )
    means = None if family == "phi3" else means_of(model)
    path, narrow = gguf_of(tmp_path, model, plan, means=means)
    assert_llama_cpp_computes_the_same(path, narrow)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_llama_cpp_rotates_positions_as_the_model_does(kind, tmp_path):
    model = tiny_model("llama")
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 16}
    model.config.rope_parameters = rope
    path, narrow = gguf_of(tmp_path, model, plan_for(model, ("mlp_channels",)), form="uniform")
    assert_llama_cpp_computes_the_same(path, narrow)
