"""A pruned model spelled as a Llama: one set of weight names for DeciLM and llama.cpp.

Llama, Mistral, Qwen2 and Phi-3 compute the same function; they differ in biases and in which
projections are fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmprune.architectures import ARCHITECTURES
from llmprune.architectures.table import parse_axes
from llmprune.errors import InputError
from llmprune.padded import own_weights, pad_weight
from llmprune.units import LayerWidths, UnitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OTHERWISE = {
    "qwen3": "its q and k projections are followed by a norm",
    "gpt2": "it has LayerNorm, learned positions and an MLP without a gate",
}
LLAMA = ARCHITECTURES["llama"]
READ_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")


@dataclass(frozen=True)
class LlamaForm:
    """Weights under Llama's names and the counts of every layer.

    `weights` has no head where it is tied, and nothing for a sublayer that is gone.
    """

    layers: tuple[LayerWidths, ...]
    hidden_size: int
    head_dim: int
    weights: Mapping[str, Tensor]

    def layer_weights(self, index: int) -> dict[str, Tensor]:
        """The weights of one layer by their names inside it."""
        prefix = f"model.layers.{index}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.weights.items()
            if name.startswith(prefix)
        }

    @property
    def layer_names(self) -> set[str]:
        """The names inside a layer of all weights that any layer has."""
        return {name for index in range(len(self.layers)) for name in self.layer_weights(index)}

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths and both sublayers."""
        first = self.layers[0]
        whole = first.attention and first.mlp
        return whole and all(layer == first for layer in self.layers)


def llama_form(model: PreTrainedModel, shape: UnitMap) -> LlamaForm:
    """Spell a model as a Llama.

    Raises:
        InputError: The model computes something else; the message says what.
    """
    refusal = why_not_llama(model.config, shape)
    if refusal is not None:
        raise InputError(f"can't be written as a Llama: {refusal}")
    layers = tuple(shape.layer(index) for index in range(shape.num_layers))
    return LlamaForm(
        layers=layers,
        hidden_size=shape.dense.hidden_size,
        head_dim=shape.head_dim,
        weights=dict(_unfused(own_weights(model), shape)),
    )


def widened(form: LlamaForm, layers: Sequence[LayerWidths]) -> LlamaForm:
    """The same function with wider layers: zeros for what `form` does not have.

    A sublayer that `form` lacks and `layers` has is zeros under a norm of ones, with the biases
    that other layers have.
    """
    prefix = "model.layers."
    weights = {name: v for name, v in form.weights.items() if not name.startswith(prefix)}
    kind = form.weights["model.norm.weight"]
    biases = {name for name in form.layer_names if name.endswith(".bias")}
    for index, target in enumerate(layers):
        own = form.layer_weights(index)
        for local, axes in LLAMA.layer_weights.items():
            sublayer = target.attention if _is_attention(local) else target.mlp
            if not sublayer or (local.endswith(".bias") and local not in biases):
                continue
            parsed = parse_axes(axes)
            if local in own:
                value = pad_weight(own[local], parsed, form.layers[index], target, form.head_dim)
            else:
                sizes = [_size(axis[0], target, form) for axis in parsed]
                value = kind.new_full(sizes, float(local.endswith("norm.weight")))
            weights[f"{prefix}{index}.{local}"] = value
    return replace(form, layers=tuple(layers), weights=weights)


def _is_attention(local: str) -> bool:
    return local.startswith((LLAMA.attention.module, LLAMA.attention.norm))


def _size(space: str, layer: LayerWidths, form: LlamaForm) -> int:
    sizes = {
        "hidden": form.hidden_size,
        "query": layer.num_attention_heads * form.head_dim,
        "key_value": layer.num_key_value_heads * form.head_dim,
        "mlp": layer.intermediate_size,
    }
    return sizes[space]


def why_not_llama(config: Any, shape: UnitMap) -> str | None:
    """The first thing about a model that a Llama does not compute, None where there is none."""
    family = shape.architecture.family
    if family in OTHERWISE:
        return f"{family} is no Llama ({OTHERWISE[family]})"
    if config.hidden_act != "silu":
        return f"the activation must be silu, it is {config.hidden_act}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return (
            f"it attends to a sliding window of {window} tokens (set sliding_window to null in "
            "config.json if every text is shorter)"
        )
    rope = config.rope_parameters
    if "rope_type" not in rope:
        return "its layers rotate positions in different ways"
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if part not in (None, 1.0):
        return f"only {part:g} of every head is rotated (partial_rotary_factor)"
    return None


def _unfused(weights: Mapping[str, Tensor], shape: UnitMap) -> Iterator[tuple[str, Tensor]]:
    """Split Phi-3's fused projections; other weights have Llama's names already."""
    for name, value in weights.items():
        if name.endswith(("qkv_proj.weight", "gate_up_proj.weight")):
            layer = shape.layer(int(name.split(".")[2]))
            queries = layer.num_attention_heads * shape.head_dim
            keys = layer.num_key_value_heads * shape.head_dim
            parts = {"q": queries, "k": keys, "v": keys}
            if "gate_up" in name:
                parts = dict.fromkeys(("gate", "up"), layer.intermediate_size)
            stem = name.rsplit(".", 2)[0]
            for part, piece in zip(parts, value.split(list(parts.values())), strict=True):
                yield f"{stem}.{part}_proj.weight", piece
        else:
            yield name, value
