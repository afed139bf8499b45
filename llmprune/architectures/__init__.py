"""One table per family; a new family is one more table and no new code path."""

from llmprune.architectures.gpt2 import GPT2
from llmprune.architectures.llama import LLAMA, MISTRAL
from llmprune.architectures.phi3 import PHI3
from llmprune.architectures.qwen2 import QWEN2
from llmprune.architectures.qwen3 import QWEN3
from llmprune.architectures.table import Architecture
from llmprune.errors import InputError

ARCHITECTURES: dict[str, Architecture] = {
    table.family: table for table in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GPT2)
}

# Checkpoints of `export.format: per_layer` carry their own model_type and prune again as their
# family does.
PER_LAYER_PREFIX = "pruned_"


def architecture_of(model_type: str) -> Architecture:
    """The table of a transformers `model_type`.

    Raises:
        InputError: There is none; the message lists those there are.
    """
    family = model_type.removeprefix(PER_LAYER_PREFIX)
    if family not in ARCHITECTURES:
        raise InputError(
            f"model_type must be one of {', '.join(sorted(ARCHITECTURES))}, got {model_type!r}; "
            "docs/adding-an-architecture.md tells how to add a family"
        )
    return ARCHITECTURES[family]


__all__ = ["ARCHITECTURES", "PER_LAYER_PREFIX", "Architecture", "architecture_of"]
