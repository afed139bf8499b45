"""What a model of given widths costs: parameters, FLOPs a token, KV-cache bytes a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmprune.units import UnitMap, Widths

CostName = Literal["decoder_parameters", "parameters", "flops", "kv_bytes"]

# Attention's share of a token's FLOPs grows with its context; this is the context assumed.
FLOPS_CONTEXT = 512


@dataclass(frozen=True)
class Cost:
    """The cost of one shape.

    Attributes:
        parameters: All parameters, a tied head counted once.
        decoder_parameters: Those inside decoder layers.
        flops: Floating-point operations of one token at a context of `FLOPS_CONTEXT` tokens: two
            for each weight of a projection (the head included), four a context token and head
            channel for attention.
        kv_bytes: Key-value cache of one token in a 16-bit type, bytes.
    """

    parameters: int
    decoder_parameters: int
    flops: int
    kv_bytes: int


def measure_cost(unit_map: UnitMap, widths: Widths | None = None) -> Cost:
    """The cost of the mapped model cut to `widths` (its own where that is None)."""
    widths = widths or unit_map.dense
    total = decoder = matmul = 0
    head = f"{unit_map.architecture.head}.weight"
    embeddings = {f"{name}.weight" for name in unit_map.architecture.embeddings}
    for parameter in unit_map.parameters:
        shape = unit_map.shape_under(parameter, widths)
        if shape is None:
            continue
        count = math.prod(shape)
        total += count
        decoder += count if parameter.layer is not None else 0
        if len(shape) > 1 and parameter.name not in embeddings:
            matmul += count
        if unit_map.tied_head and parameter.name == _input_embedding(unit_map):
            matmul += count
    assert unit_map.tied_head or head in {p.name for p in unit_map.parameters}
    attending = [layer for layer in widths.kept_layers if layer.attention]
    query = sum(layer.num_attention_heads for layer in attending) * unit_map.head_dim
    key_value = sum(layer.num_key_value_heads for layer in attending) * unit_map.head_dim
    return Cost(
        parameters=total,
        decoder_parameters=decoder,
        flops=2 * matmul + 4 * FLOPS_CONTEXT * query,
        kv_bytes=2 * 2 * key_value,
    )


def _input_embedding(unit_map: UnitMap) -> str:
    return f"{unit_map.architecture.embeddings[0]}.weight"
