"""Decoder models whose layers differ in width, or lack their attention or MLP.

This file travels with the checkpoints that need it and imports only torch and transformers, so
that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads them anywhere;
`import llmprune` registers the same classes, and then no remote code is needed. What differs from
layer to layer stands in `config.per_layer_config`, transformers' own format: `intermediate_size`,
`num_attention_heads`, `num_key_value_heads` (the family's key for each) and
`skip: [attention | mlp]`. GPT-2 also reads `head_dim`. With `write_bias: true` the projections that
write to the residual stream have a bias in families whose own class gives them none.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.pytorch_utils import Conv1D


class LayerConfig:
    """The model's config with one layer's own values on top.

    A view, not a copy: what is set on the model's config later (the attention implementation)
    reaches every layer.
    """

    def __init__(self, config: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own, _shared=config)

    def __getattr__(self, name: str) -> Any:
        # a copy is asked for its methods before it has anything
        if "_shared" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._shared, name)


class NoHeads(nn.Module):
    """Stands where a layer's attention was: adds nothing to the residual stream.

    Transformers lets no one choose the attention implementation of a model whose file defines a
    module named Attention (`_can_set_attn_implementation`), hence the name.
    """

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Zeros of the shape of `hidden_states`, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands where a layer's MLP was: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros of the shape of `hidden_states`."""
        return torch.zeros_like(hidden_states)


class _DifferingLayers:
    """Builds the decoder layers of a base model one by one, each from its own config."""

    layers_name = "layers"
    layer_class: type[nn.Module]
    attention_name = "self_attn"
    norm_names = ("input_layernorm", "post_attention_layernorm")
    write_names: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    heads_keys: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")

    def __init__(self: Any, config: Any) -> None:
        num_layers = config.num_hidden_layers
        differences = config.__dict__.pop("_heterogeneity_spec", None)
        layer_types = getattr(config, "layer_types", None)
        # The parent builds embeddings, final norm and rotary tables, and no layer.
        config.num_hidden_layers = 0
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = num_layers
            if layer_types is not None:
                config.layer_types = layer_types
            if differences is not None:
                config.__dict__["_heterogeneity_spec"] = differences
        cache_index = 0
        layers = nn.ModuleList()
        for index in range(num_layers):
            own = config.per_layer_config[index] if config.is_heterogeneous else config
            layer = self.build_layer(own, index)
            if getattr(config, "write_bias", False):
                for name in self.write_names:
                    write = layer.get_submodule(name)
                    if write.bias is None:
                        write.bias = nn.Parameter(write.weight.new_zeros(config.hidden_size))
            skipped = set(getattr(own, "skip", None) or ())
            if "attention" in skipped:
                setattr(layer, self.attention_name, NoHeads())
                setattr(layer, self.norm_names[0], nn.Identity())
            else:
                attention = getattr(layer, self.attention_name)
                keys = {key: getattr(own, key) for key in self.heads_keys}
                attention.config = LayerConfig(config, keys)
                # The cache counts the layers that attend, so that its first entry is in use.
                attention.layer_idx = cache_index
                cache_index += 1
            if "mlp" in skipped:
                layer.mlp = NoMLP()
                setattr(layer, self.norm_names[1], nn.Identity())
            layers.append(layer)
        setattr(self, self.layers_name, layers)
        self.post_init()

    def build_layer(self, own: Any, index: int) -> nn.Module:
        """One decoder layer of the family's own class."""
        return self.layer_class(own, index)


class _AnyShape:
    """Lifts the rules of a stock config that pruned shapes break; the weights decide instead."""

    def validate_architecture(self) -> None:
        """Accept every combination of hidden size and heads."""

    def validate_rope(self) -> None:
        """Accept the dense model's rotary parameters, which a cut leaves as they are."""


def _with_body(lm_class: Any, base_attribute: str, base_class: Any) -> Any:
    """The family's causal LM around a base model with differing layers."""

    def build(self: Any, config: Any) -> None:
        super(lm_class, self).__init__(config)
        setattr(self, base_attribute, base_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    name = f"Pruned{lm_class.__name__}"
    body = {"__init__": build, "config_class": base_class.config_class, "__module__": __name__}
    return type(name, (lm_class,), body)


@strict
class PrunedLlamaConfig(_AnyShape, LlamaConfig):
    """`LlamaConfig` with `per_layer_config`."""

    model_type = "pruned_llama"


class PrunedLlamaModel(_DifferingLayers, LlamaModel):
    """`LlamaModel` whose layers differ."""

    config_class = PrunedLlamaConfig
    layer_class = LlamaDecoderLayer


@strict
class PrunedMistralConfig(_AnyShape, MistralConfig):
    """`MistralConfig` with `per_layer_config`."""

    model_type = "pruned_mistral"


class PrunedMistralModel(_DifferingLayers, MistralModel):
    """`MistralModel` whose layers differ."""

    config_class = PrunedMistralConfig
    layer_class = MistralDecoderLayer


@strict
class PrunedQwen2Config(_AnyShape, Qwen2Config):
    """`Qwen2Config` with `per_layer_config`."""

    model_type = "pruned_qwen2"


class PrunedQwen2Model(_DifferingLayers, Qwen2Model):
    """`Qwen2Model` whose layers differ."""

    config_class = PrunedQwen2Config
    layer_class = Qwen2DecoderLayer


@strict
class PrunedQwen3Config(_AnyShape, Qwen3Config):
    """`Qwen3Config` with `per_layer_config`."""

    model_type = "pruned_qwen3"


class PrunedQwen3Model(_DifferingLayers, Qwen3Model):
    """`Qwen3Model` whose layers differ."""

    config_class = PrunedQwen3Config
    layer_class = Qwen3DecoderLayer


@strict
class PrunedPhi3Config(_AnyShape, Phi3Config):
    """`Phi3Config` with `per_layer_config`."""

    model_type = "pruned_phi3"


class PrunedPhi3Model(_DifferingLayers, Phi3Model):
    """`Phi3Model` whose layers differ."""

    config_class = PrunedPhi3Config
    layer_class = Phi3DecoderLayer


@strict
class PrunedGPT2Config(_AnyShape, GPT2Config):
    """`GPT2Config` with `per_layer_config` and a `head_dim` of its own."""

    model_type = "pruned_gpt2"
    head_dim: int | None = None


class PrunedGPT2Model(_DifferingLayers, GPT2Model):
    """`GPT2Model` whose layers differ; the attention's width is free of the hidden size."""

    config_class = PrunedGPT2Config
    layers_name = "h"
    layer_class = GPT2Block
    attention_name = "attn"
    norm_names = ("ln_1", "ln_2")
    write_names = ()
    heads_keys = ("num_attention_heads",)

    def build_layer(self, own: Any, index: int) -> nn.Module:
        """A GPT-2 block with attention of `n_head * head_dim` channels."""
        hidden_size, heads = own.n_embd, own.n_head
        width = heads * own.head_dim
        own = LayerConfig(own, {"hidden_size": heads * (hidden_size // heads)})
        layer = GPT2Block(own, index)
        attention = layer.attn
        attention.embed_dim = attention.split_size = width
        attention.head_dim = own.head_dim
        if attention.scale_attn_weights:
            stock_head_dim = hidden_size // heads
            attention.scaling *= (stock_head_dim / own.head_dim) ** 0.5
        attention.c_attn = Conv1D(3 * width, hidden_size)
        attention.c_proj = Conv1D(hidden_size, width)
        layer.ln_1 = nn.LayerNorm(hidden_size, eps=own.layer_norm_epsilon)
        layer.ln_2 = nn.LayerNorm(hidden_size, eps=own.layer_norm_epsilon)
        layer.mlp.c_fc = Conv1D(own.n_inner, hidden_size)
        layer.mlp.c_proj = Conv1D(hidden_size, own.n_inner)
        return layer


PrunedLlamaForCausalLM = _with_body(LlamaForCausalLM, "model", PrunedLlamaModel)
PrunedMistralForCausalLM = _with_body(MistralForCausalLM, "model", PrunedMistralModel)
PrunedQwen2ForCausalLM = _with_body(Qwen2ForCausalLM, "model", PrunedQwen2Model)
PrunedQwen3ForCausalLM = _with_body(Qwen3ForCausalLM, "model", PrunedQwen3Model)
PrunedPhi3ForCausalLM = _with_body(Phi3ForCausalLM, "model", PrunedPhi3Model)
PrunedGPT2LMHeadModel = _with_body(GPT2LMHeadModel, "transformer", PrunedGPT2Model)

CLASSES: dict[str, tuple[type, type, type]] = {
    "llama": (PrunedLlamaConfig, PrunedLlamaModel, PrunedLlamaForCausalLM),
    "mistral": (PrunedMistralConfig, PrunedMistralModel, PrunedMistralForCausalLM),
    "qwen2": (PrunedQwen2Config, PrunedQwen2Model, PrunedQwen2ForCausalLM),
    "qwen3": (PrunedQwen3Config, PrunedQwen3Model, PrunedQwen3ForCausalLM),
    "phi3": (PrunedPhi3Config, PrunedPhi3Model, PrunedPhi3ForCausalLM),
    "gpt2": (PrunedGPT2Config, PrunedGPT2Model, PrunedGPT2LMHeadModel),
}
