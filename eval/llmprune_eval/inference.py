"""What every measurement needs of a model: eval mode, its device, how much it can take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmprune.errors import InputError


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode without gradients; each submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: Any) -> torch.device:
    """The device that takes the token ids: where the input embeddings are."""
    return model.get_input_embeddings().weight.device


def vocab_size_of(model: Any) -> int:
    """How many rows the input embeddings have; token ids must be below."""
    return model.get_input_embeddings().weight.shape[0]


def check_length(model: Any, length: int, *, what: str) -> None:
    """Check that a row of `length` tokens fits the model's positions.

    Args:
        model: A Hugging Face causal LM.
        length: Tokens in a row.
        what: What asks for that many tokens; begins the error message.

    Raises:
        InputError: `length` is above the config's `max_position_embeddings`.
    """
    check_positions(model.config, length, what=what)


def check_positions(config: Any, length: int, *, what: str) -> None:
    """As `check_length`, of a config alone."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(
            f"{what} must be at most the model's max_position_embeddings {limit}, got {length}; "
            "take fewer tokens"
        )


def check_count(name: str, value: int, least: int) -> None:
    """Check a count given by the user.

    Raises:
        InputError: `value` is below `least`.
    """
    if value < least:
        raise InputError(f"{name} must be at least {least}, got {value}; raise {name}")
