"""Tiny random models for the measurements, and a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.llmprune_eval import chromium


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(changes.pop("seed", 0))
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        # A wide range so that NLLs differ from window to window.
        plain = {"vocab_size": 99, "max_position_embeddings": 512, "initializer_range": 0.3}
        return LlamaForCausalLM(LlamaConfig(**(sizes | heads | plain | changes)))

    return make


@pytest.fixture
def make_gpt2() -> Callable[..., Any]:
    def make(**changes: Any) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**(sizes | {"initializer_range": 0.3} | changes)))

    return make


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(99, (203,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page
