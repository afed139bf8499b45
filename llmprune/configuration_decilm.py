"""The config of a DeciLM checkpoint: a Llama's, and `block_configs`, one entry a layer.

This file travels with exported checkpoints and imports only transformers: the runtimes that serve
`DeciLMForCausalLM` bring the model and read `config.block_configs[i].attention.no_op` and its like
as attributes, which JSON alone does not give.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class Block(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@strict
class DeciLMConfig(LlamaConfig):
    """`LlamaConfig` with `block_configs`; `qkv_bias` puts biases on q, k and v alone."""

    model_type = "nemotron-nas"
    block_configs: list[Any] | None = None
    qkv_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the blocks objects."""
        super().__post_init__(**kwargs)
        self.block_configs = [
            Block({name: Block(part) for name, part in block.items()})
            for block in self.block_configs or []
        ]
