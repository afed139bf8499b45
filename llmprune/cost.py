"""What a model of given widths costs: parameters, FLOPs a token, KV-cache bytes a token.

`ShapeCost` is what a budget is written in: a cost that is a sum over a model's sublayers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from llmprune.errors import InputError
from llmprune.recipe import Budget
from llmprune.units import LayerWidths, UnitMap, Widths

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


class ShapeCost(Protocol):
    """A cost of a shape that is a sum over its sublayers, given the hidden size."""

    def rest(self, hidden_size: int) -> float:
        """What is in no decoder layer."""

    def attention(self, index: int, num_heads: int, num_kv_heads: int, hidden_size: int) -> float:
        """The attention of layer `index` with so many query and key-value heads."""

    def mlp(self, index: int, num_channels: int, hidden_size: int) -> float:
        """The MLP of layer `index` with so many channels."""


def total_cost(cost: ShapeCost, widths: Widths) -> float:
    """The cost of a whole shape."""
    hidden = widths.hidden_size
    terms = [cost.rest(hidden)]
    for index, layer in enumerate(widths.layers):
        if layer is not None and layer.attention:
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            terms.append(cost.attention(index, heads, groups, hidden))
        if layer is not None and layer.mlp:
            terms.append(cost.mlp(index, layer.intermediate_size, hidden))
    return math.fsum(terms)


@dataclass(frozen=True)
class CostLimit:
    """What a shape may cost.

    Attributes:
        cost: How a shape is priced.
        dense: Price of the dense shape.
        budget: Where the limit comes from.
    """

    cost: ShapeCost
    dense: float
    budget: Budget

    @property
    def wanted(self) -> float:
        """What a shape is to cost."""
        if self.budget.latency_ms is not None:
            return self.budget.latency_ms
        if self.budget.latency is not None:
            return self.dense * self.budget.latency
        assert self.budget.sparsity is not None
        return self.dense * (1 - self.budget.sparsity)

    @property
    def tolerance(self) -> float:
        """How far from that it may end."""
        return self.budget.tolerance * self.dense

    def refusal(self, kinds: Iterable[str], reached: float) -> InputError:
        """The error of a budget that `kinds` can't meet, `reached` being the nearest cost."""
        budget = self.budget
        if budget.sparsity is not None:
            goal, nearest = f"sparsity {budget.sparsity:g} of {budget.of}", 1 - reached / self.dense
        elif budget.latency is not None:
            goal, nearest = f"latency {budget.latency:g} of the dense model's", reached / self.dense
        else:
            goal = f"latency_ms {budget.latency_ms:g} (dense: {self.dense:.2f})"
            nearest = reached
        return InputError(
            f"budget: {goal} must be met within {budget.tolerance:g}, the nearest that "
            f"{', '.join(kinds)} can reach is {nearest:.4f}; name more kinds, lower multiple_of "
            "or raise tolerance"
        )


class CountedCost:
    """One of the figures of `Cost` as a sum over sublayers.

    Given the hidden size all of them are affine in the counts of a layer, so three shapes tell the
    price of every attention and two that of every MLP.
    """

    def __init__(self, unit_map: UnitMap, of: CostName) -> None:
        self.unit_map = unit_map
        self.of = of
        self._terms: dict[tuple[LayerWidths, int], tuple[int, int, int, int, int]] = {}
        self._rest: dict[int, int] = {}

    def rest(self, hidden_size: int) -> float:
        """What is in no decoder layer."""
        if hidden_size not in self._rest:
            self._rest[hidden_size] = self._measure(hidden_size, 0, None)
        return self._rest[hidden_size]

    def attention(self, index: int, num_heads: int, num_kv_heads: int, hidden_size: int) -> float:
        """The attention of layer `index` with so many query and key-value heads."""
        base, head, group, _, _ = self._terms_of(index, hidden_size)
        return base + num_heads * head + num_kv_heads * group

    def mlp(self, index: int, num_channels: int, hidden_size: int) -> float:
        """The MLP of layer `index` with so many channels."""
        *_, base, channel = self._terms_of(index, hidden_size)
        return base + num_channels * channel

    def _terms_of(self, index: int, hidden_size: int) -> tuple[int, int, int, int, int]:
        key = (self.unit_map.layer(index), hidden_size)
        if key not in self._terms:
            rest = int(self.rest(hidden_size))

            def price(heads: int, groups: int, channels: int) -> int:
                attention = channels == 0
                layer = LayerWidths(heads, groups, channels, attention=attention, mlp=not attention)
                return self._measure(hidden_size, index, layer) - rest

            one = price(1, 1, 0)
            head, group = price(2, 1, 0) - one, price(1, 2, 0) - one
            channel = price(1, 1, 2) - price(1, 1, 1)
            self._terms[key] = (
                one - head - group,
                head,
                group,
                price(1, 1, 1) - channel,
                channel,
            )
        return self._terms[key]

    def _measure(self, hidden_size: int, index: int, layer: LayerWidths | None) -> int:
        layers: list[LayerWidths | None] = [None] * self.unit_map.num_layers
        layers[index] = layer
        widths = Widths(hidden_size=hidden_size, layers=tuple(layers))
        return int(getattr(measure_cost(self.unit_map, widths), self.of))


def _input_embedding(unit_map: UnitMap) -> str:
    return f"{unit_map.architecture.embeddings[0]}.weight"
