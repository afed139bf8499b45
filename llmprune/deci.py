"""The DeciLM layout: `DeciLMForCausalLM` with `block_configs`, which servers have a class for.

Read in the sources of vLLM, SGLang and llama.cpp's converter: a layer's MLP width is computed from
`ffn_mult` and rounded up to a multiple of 256, so narrower MLPs get zero channels; its key-value
heads are the model's query heads divided by `n_heads_in_group`; the first layer can't lack its
attention, so it gets one that adds nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError
from llmprune.llama_form import READ_BIASES, LlamaForm, llama_form, widened
from llmprune.units import LayerWidths, UnitMap, query_heads_per_group

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# MLP widths that the readers of `ffn_mult` compute are multiples of it.
MLP_MULTIPLE = 256
ARCHITECTURE = "DeciLMForCausalLM"
KEPT_KEYS = (
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def deci_form(model: PreTrainedModel, shape: UnitMap) -> LlamaForm:
    """The weights in the shapes that DeciLM's readers compute.

    Raises:
        InputError: DeciLM can't hold this model; the message says why.
    """
    refusal = _why_not(shape)
    if refusal is None:
        try:
            form = llama_form(model, shape)
        except InputError as error:
            refusal = str(error)
        else:
            refusal = _why_biases_not(form)
    if refusal is not None:
        raise InputError(
            f"--format deci can't express this model: {refusal}; use --format padded or gguf"
        )
    heads = next(layer.num_attention_heads for layer in form.layers if layer.attention)
    return widened(form, [_served(i, layer, heads) for i, layer in enumerate(form.layers)])


def deci_config(config: Any, form: LlamaForm) -> PretrainedConfig:
    """The config of a form that `deci_form` gave."""
    from llmprune.configuration_decilm import DeciLMConfig

    old = config.to_dict()
    data = {key: old[key] for key in KEPT_KEYS}
    heads = next(layer.num_attention_heads for layer in form.layers if layer.attention)
    built = DeciLMConfig(
        **data,
        num_attention_heads=heads,
        num_key_value_heads=max(layer.num_key_value_heads for layer in form.layers),
        head_dim=form.head_dim,
        intermediate_size=max(layer.intermediate_size for layer in form.layers),
        qkv_bias=any(name in form.layer_names for name in READ_BIASES),
        block_configs=[block_config(layer, form.hidden_size) for layer in form.layers],
        architectures=[ARCHITECTURE],
        dtype=config.dtype,
    )
    built.auto_map = {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    return built


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """Save a config that `deci_config` gave, with the keys that older readers look for."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(data["rope_parameters"])
    # before `rope_parameters` there were these two
    data["rope_theta"] = rope.pop("rope_theta")
    data["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def block_config(layer: LayerWidths, hidden_size: int) -> dict[str, Any]:
    """One layer's entry of `block_configs`."""
    group = query_heads_per_group(layer) if layer.attention else None
    mult = 3 * layer.intermediate_size / (2 * hidden_size) if layer.mlp else None
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": not layer.attention,
            "replace_with_linear": False,
        },
        "ffn": {"ffn_mult": mult, "no_op": not layer.mlp, "replace_with_linear": False},
    }


def _served(index: int, layer: LayerWidths, heads: int) -> LayerWidths:
    width = -(-layer.intermediate_size // MLP_MULTIPLE) * MLP_MULTIPLE
    layer = replace(layer, intermediate_size=width)
    if index == 0 and not layer.attention:
        layer = replace(layer, attention=True, num_attention_heads=heads, num_key_value_heads=1)
    return layer


def _why_not(shape: UnitMap) -> str | None:
    layers = [shape.layer(index) for index in range(shape.num_layers)]
    counts = {layer.num_attention_heads for layer in layers if layer.attention}
    if not counts:
        return "no layer has attention"
    if len(counts) > 1:
        some = ", ".join(str(count) for count in sorted(counts))
        return f"all layers must have the same number of query heads, they have {some}"
    width = counts.pop() * shape.head_dim
    if width != shape.dense.hidden_size:
        return (
            "hidden_size must be query heads times head_dim "
            f"({width // shape.head_dim} x {shape.head_dim}), it is {shape.dense.hidden_size}"
        )
    return None


def _why_biases_not(form: LlamaForm) -> str | None:
    other = sorted(
        name for name in form.layer_names if name.endswith(".bias") and name not in READ_BIASES
    )
    if other:
        return (
            f"biases are read on q, k and v only, it has {other[0]} (compensation: mean leaves it)"
        )
    return None
