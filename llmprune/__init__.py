"""Structured pruning of Hugging Face causal language models with SequentialAttention++."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmprune.checkpoint import load_pruned
    from llmprune.errors import InputError
    from llmprune.pipeline import prune
    from llmprune.recipe import Recipe

__all__ = ["InputError", "Recipe", "load_pruned", "prune"]

# Where each name lives; imported on first use, since torch and transformers take seconds.
_HOMES = {
    "InputError": "llmprune.errors",
    "Recipe": "llmprune.recipe",
    "load_pruned": "llmprune.checkpoint",
    "prune": "llmprune.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
