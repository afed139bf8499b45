"""Exported GGUF files, run in llama.cpp itself: by llama-cpp-python, and by xllamacpp's server.

The first gives the logits of every position and is built from source; the second comes as a wheel
and gives tokens and their log-probabilities. Either is enough, and what is not there is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import urllib.request

import numpy
import pytest
import torch

from tests.llmprune import tiny
from tests.llmprune.test_compensation import means_of
from tests.llmprune.test_export import GGUF_VOCAB, byte_tokenizer, gguf_of, plan_of
from tests.llmprune.tiny import logits, plan_for, tiny_model

pytestmark = pytest.mark.slow
PROMPTS = ("the cat", "the 12 <think> thé", "  th e\n\n121")
NEW_TOKENS = 12
# a random model likes to end at once: this token is never taken
END = 2
# a letter of its own: the server tells nothing of tokens that are part of a character
LETTER = byte_tokenizer().convert_tokens_to_ids("a")


@pytest.fixture(autouse=True)
def _byte_vocabulary(monkeypatch):
    monkeypatch.setattr(tiny, "VOCAB", GGUF_VOCAB)


class LlamaCppPython:
    """llama.cpp on one file, everything in float32, by its C interface."""

    def __init__(self, path):
        llama_cpp = importlib.import_module("llama_cpp")
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

    def tokens(self, prompt):
        return self.llama.tokenize(prompt.encode(), add_bos=True, special=True)

    def difference(self, tokens, expected):
        """Largest difference of its logits from those of a row, (length, vocab_size)."""
        self.llama.reset()
        self.llama.eval(tokens)
        found = torch.from_numpy(numpy.array(self.llama.scores[: len(tokens)]))
        return float((found - expected).abs().max())

    def greedy(self, tokens):
        """The next tokens, through llama.cpp's KV cache."""
        self.llama.reset()
        found = []
        self.llama.eval(tokens)
        for _ in range(NEW_TOKENS):
            scores = numpy.array(self.llama.scores[self.llama.n_tokens - 1])
            scores[END] = -numpy.inf
            found.append(int(numpy.argmax(scores)))
            self.llama.eval(found[-1:])
        return found


class Xllamacpp:
    """llama.cpp's own server on one file, everything in float32, in this process."""

    def __init__(self, path):
        xllamacpp = importlib.import_module("xllamacpp")
        float32 = xllamacpp.ggml_type.GGML_TYPE_F32
        # with it log-probabilities are off by up to 0.005
        no_flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = 64, 1
        params.cache_type_k = params.cache_type_v = float32
        params.flash_attn_type = no_flash
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.verbosity, params.warmup = -1, False
        self.server = xllamacpp.Server(params)

    def tokens(self, prompt):
        return self._ask("tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]

    def difference(self, tokens, expected):
        """Of the log-probabilities of the next token, from those by a row's logits."""
        letter = {"logit_bias": [[LETTER, 1e6]], "n_probs": GGUF_VOCAB}
        # of the logits as they are, whatever token is taken
        (first,) = self._complete(tokens, n_predict=1, **letter)["completion_probabilities"]
        found = {row["id"]: row["logprob"] for row in first["top_logprobs"]}
        wanted = torch.log_softmax(expected[-1], -1)
        assert len(found) == len(wanted)
        return max(abs(found[index] - float(value)) for index, value in enumerate(wanted))

    def greedy(self, tokens):
        """The next tokens, through llama.cpp's KV cache."""
        return self._complete(tokens)["tokens"]

    def _complete(self, tokens, *, n_predict=NEW_TOKENS, **options):
        options |= {"temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        return self._ask(
            "completion", prompt=tokens, n_predict=n_predict, return_tokens=True, **options
        )

    def _ask(self, what, **content):
        body = json.dumps(content).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{what}", body, kind)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


RUNNERS = {
    "llama_cpp": (LlamaCppPython, "pip install llama-cpp-python builds it"),
    "xllamacpp": (Xllamacpp, "pip install xllamacpp"),
}


@pytest.fixture(params=RUNNERS)
def run(request):
    """Opens a GGUF file in llama.cpp."""
    runner, how = RUNNERS[request.param]
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"llama.cpp is not installed as {request.param} ({how})")
    return runner


def greedy(model, tokens):
    row = torch.tensor([tokens])
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "suppress_tokens": [END]}
    with torch.no_grad():
        return model.generate(row, use_cache=True, **options)[0, len(tokens) :].tolist()


def assert_it_computes_the_same(runner, model, tolerance=1e-4):
    """Logits to `tolerance` of the largest, and the same greedy tokens."""
    model, tokenizer = model.float(), byte_tokenizer()
    for prompt in PROMPTS:
        tokens = tokenizer(prompt).input_ids
        assert runner.tokens(prompt) == tokens
        expected = logits(model, torch.tensor([tokens]))[0]
        assert runner.difference(tokens, expected) < tolerance * float(expected.abs().max())
        assert runner.greedy(tokens) == greedy(model, tokens)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_llama_cpp_computes_what_a_uniform_model_computes(run, family, tmp_path):
    model = tiny_model(family, tied=family == "llama")
    kinds = ("mlp_channels",) if family == "gpt2" else ("kv_groups", "mlp_channels", "layers")
    path, narrow = gguf_of(tmp_path, model, plan_for(model, kinds), form="uniform")
    # llama.cpp looks GELU up in a table of float16
    assert_it_computes_the_same(run(path), narrow, 1e-3 if family == "gpt2" else 1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("first_lost", [False, True])
def test_llama_cpp_computes_what_a_model_with_differing_layers_computes(
    run, family, first_lost, tmp_path
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
    assert_it_computes_the_same(run(path), narrow)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_llama_cpp_rotates_positions_as_the_model_does(run, kind, tmp_path):
    model = tiny_model("llama")
    rope = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 16}
    model.config.rope_parameters = rope
    path, narrow = gguf_of(tmp_path, model, plan_for(model, ("mlp_channels",)), form="uniform")
    assert_it_computes_the_same(run(path), narrow)
