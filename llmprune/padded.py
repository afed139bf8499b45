"""A model whose layers differ, with zeros in the place of what is gone: one stock class again.

Every layer gets the largest widths that any layer has. Zero MLP channels add nothing; a zero KV
group attends to something, but its query heads' columns in the output projection are zero; a
removed sublayer comes back as zeros under a norm of ones. So the padded model computes what the
narrow one computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.architectures.table import Axis, Space, parse_axes
from llmprune.cut_config import UnfitError, uniform_config
from llmprune.errors import InputError
from llmprune.surgery import build_model, expand_units
from llmprune.units import LayerWidths, UnitMap, Widths, query_heads_per_group

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def pad_model(model: PreTrainedModel, shape: UnitMap) -> PreTrainedModel:
    """The stock model of the widest layer's widths that computes what `model` computes.

    Args:
        model: Its layers may differ, or lack sublayers; it is left as it is.
        shape: Of `model`.

    Raises:
        InputError: No stock class has that shape.
    """
    target = widest(shape)
    layers = (target,) * shape.num_layers
    config = stock_config(model, shape, layers, "padded")
    own = own_weights(model)
    state = {}
    for name, size in _parameter_shapes(config).items():
        layer, local = _place(shape, name)
        if layer is None:
            state[name] = own[name]
        elif name in own:
            axes = parse_axes(shape.architecture.layer_weights[local])
            state[name] = pad_weight(own[name], axes, shape.layer(layer), target, shape.head_dim)
        else:
            fill = 1.0 if _is_norm_scale(shape, local) else 0.0
            state[name] = torch.full(size, fill, dtype=model.dtype)
    return build_model(config, state, model)


def widest(shape: UnitMap) -> LayerWidths:
    """The smallest widths that every layer fits into.

    Query heads must share their key-value heads evenly, so their number is the most KV groups of
    any layer times the most query heads in a group. A class that derives head_dim from the hidden
    size gets as many heads as that takes.
    """
    layers = [shape.layer(index) for index in range(shape.num_layers)]
    attending = [layer for layer in layers if layer.attention]
    channels = [layer.intermediate_size for layer in layers if layer.mlp]
    groups = max((layer.num_key_value_heads for layer in attending), default=1)
    per_group = max((query_heads_per_group(layer) for layer in attending), default=1)
    if not shape.architecture.head_dim_free and per_group == 1:
        groups = max(groups, shape.dense.hidden_size // shape.head_dim)
    return LayerWidths(
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        intermediate_size=max(channels, default=1),
    )


def stock_config(
    model: PreTrainedModel, shape: UnitMap, layers: Sequence[LayerWidths], form: str
) -> PretrainedConfig:
    """The config of a stock class with these layers.

    Raises:
        InputError: There is none; the message names the export format `form` and those that can.
    """
    widths = Widths(shape.dense.hidden_size, tuple(layers))
    biased = bool(getattr(model.config, "write_bias", False))
    try:
        return uniform_config(model.config, shape, widths, biased=biased)
    except UnfitError as error:
        others = "padded, per_layer or gguf" if form == "uniform" else "per_layer or gguf"
        raise InputError(
            f"--format {form} can't express this model: {error.reason}; use --format {others}"
        ) from error


def pad_weight(
    value: Tensor, axes: Sequence[Axis], own: LayerWidths, target: LayerWidths, head_dim: int
) -> Tensor:
    """A layer's weight at the widths of `target`, zero where `own` has nothing.

    Query head i of KV group g stays head i of group g, so that it reads the keys it read.
    """
    for dim, axis in enumerate(axes):
        index, size = _positions(axis, own, target, head_dim)
        if index is None or size == value.shape[dim]:
            continue
        shape = list(value.shape)
        shape[dim] = size
        wide = value.new_zeros(shape)
        wide.index_copy_(dim, index.to(value.device), value)
        value = wide
    return value


def _positions(
    axis: Axis, own: LayerWidths, target: LayerWidths, head_dim: int
) -> tuple[Tensor | None, int]:
    """Where an axis' positions go, and how long it becomes; None for an axis that stays."""
    offset, parts = 0, []
    for space in axis:
        if space not in ("query", "key_value", "mlp"):
            return None, 0
        parts.append(_space_positions(space, own, target, head_dim) + offset)
        offset += _space_size(space, target, head_dim)
    return torch.cat(parts), offset


def _space_positions(space: Space, own: LayerWidths, target: LayerWidths, head_dim: int) -> Tensor:
    if space == "mlp":
        return torch.arange(own.intermediate_size)
    if space == "key_value":
        return expand_units(torch.arange(own.num_key_value_heads), head_dim)
    narrow, wide = query_heads_per_group(own), query_heads_per_group(target)
    heads = torch.arange(own.num_attention_heads)
    return expand_units(heads // narrow * wide + heads % narrow, head_dim)


def _space_size(space: Space, widths: LayerWidths, head_dim: int) -> int:
    if space == "mlp":
        return widths.intermediate_size
    heads = widths.num_attention_heads if space == "query" else widths.num_key_value_heads
    return heads * head_dim


def own_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model by name, a tied head left out."""
    return {name: value.detach() for name, value in model.named_parameters()}


def _parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    empty.tie_weights()
    return {name: tuple(value.shape) for name, value in empty.named_parameters()}


def _place(shape: UnitMap, name: str) -> tuple[int | None, str]:
    prefix = f"{shape.architecture.layers}."
    if not name.startswith(prefix):
        return None, name
    index, _, local = name.removeprefix(prefix).partition(".")
    return int(index), local


def _is_norm_scale(shape: UnitMap, local: str) -> bool:
    architecture = shape.architecture
    norms = (
        architecture.attention.norm,
        architecture.mlp.norm,
        "self_attn.q_norm",
        "self_attn.k_norm",
    )
    return local in [f"{norm}.weight" for norm in norms]
