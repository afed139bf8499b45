"""The least time that a phase can take: its bytes and FLOPs against measured rates of the device.

A model (Williams et al. 2009, "Roofline"), not a measurement: weights and KV cache are read once a
pass, nothing else moves, and arithmetic hides behind memory or the other way round. What was
measured beyond it is the program around the model: Python, launches, copies of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmprune.units import layer_config
from llmprune_eval.inference import device_of

# Of a rate the best of this many is taken: a roofline is a ceiling.
REPEATS = 15
# The side of the product whose rate is taken grows until it keeps the device busy so long; a longer
# one would be interrupted by other programs every time.
_LEAST_SIDE, _MOST_SIDE, _LEAST_PRODUCT_S = 512, 8192, 1e-3
# A buffer that is read to measure bandwidth has at least and at most so many bytes.
_LEAST_BUFFER, _MOST_BUFFER = 2**20, 2**30


@dataclass(frozen=True)
class Work:
    """What a phase cannot do without: floating-point operations, and bytes that are read."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What the device gave at the start of the run.

    Attributes:
        flops_per_s: Of a large square matrix product in the model's dtype.
        bytes_per_s: Of reading a buffer as large as the model's weights, so that those of a model
            that fits the CPU's cache are expected to come from there.
        buffer_bytes: Of that buffer.
    """

    flops_per_s: float
    bytes_per_s: float
    buffer_bytes: int

    def least_ms(self, work: Work) -> float:
        """Milliseconds of the slower of arithmetic and memory."""
        return 1e3 * max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Shape:
    """What the work of a model follows from.

    Attributes:
        matrix_elements: Of all weight matrices but embeddings and head; of block-sparse layers the
            stored blocks.
        head_elements: Of the matrix that gives the logits.
        weight_bytes: Of what every pass reads: all but the embeddings, of which it reads few rows.
        query_size: Query heads times their size, summed over the layers.
        key_value_bytes: Of one token in the KV cache.
    """

    matrix_elements: int
    head_elements: int
    weight_bytes: int
    query_size: int
    key_value_bytes: int


def shape_of(model: Any) -> Shape:
    """Count what a loaded causal LM reads and multiplies; dense attention is assumed."""
    head = model.get_output_embeddings()
    head_weight = None if head is None else head.weight
    rows = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    body = [p for p in model.parameters() if id(p) not in rows and p is not head_weight]
    head_elements = 0 if head_weight is None else head_weight.numel()
    head_bytes = 0 if head_weight is None else head_elements * head_weight.element_size()
    query_size, key_value_size = _attention_sizes(model.config.get_text_config())
    return Shape(
        matrix_elements=sum(p.numel() for p in body if p.dim() > 1),
        head_elements=head_elements,
        weight_bytes=head_bytes + sum(p.numel() * p.element_size() for p in body),
        query_size=query_size,
        key_value_bytes=2 * key_value_size * model.dtype.itemsize,
    )


def prefill_work(shape: Shape, batch_size: int, context: int) -> Work:
    """Work of a forward pass over (batch_size, context) tokens with logits of the last ones.

    A token attends to itself and those before it: two operations for each channel of a query in
    the scores, and two in the sum of values.
    """
    attended = context * (context + 1) / 2
    flops = 2.0 * shape.matrix_elements * context + 2 * shape.head_elements
    flops += 4 * shape.query_size * attended
    return Work(batch_size * flops, shape.weight_bytes)


def decode_work(shape: Shape, batch_size: int, context: int, new_tokens: int) -> Work:
    """Work of the middle one of `new_tokens` steps after `context` tokens."""
    attended = context + (new_tokens + 1) / 2
    flops = 2 * (shape.matrix_elements + shape.head_elements) + 4 * shape.query_size * attended
    cache = batch_size * attended * shape.key_value_bytes
    return Work(batch_size * flops, shape.weight_bytes + cache)


def measure_rates(model: Any, shape: Shape) -> Rates:
    """Measure what the model's device gives, with this process's threads; takes about a second."""
    device, dtype = device_of(model), model.dtype
    size = min(max(shape.weight_bytes, _LEAST_BUFFER), _MOST_BUFFER)
    return Rates(
        flops_per_s=_matmul_rate(device, dtype),
        bytes_per_s=_read_rate(device, dtype, size),
        buffer_bytes=size,
    )


def _attention_sizes(config: Any) -> tuple[int, int]:
    """Elements of a token's queries, and of its keys, summed over the layers that attend."""
    query = key_value = 0
    for index in range(config.num_hidden_layers):
        own = layer_config(config, index)
        if "attention" in (getattr(own, "skip", None) or ()):
            continue
        heads = own.num_attention_heads
        # the size of a head stays when heads go, a config that leaves it out has all of them
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        query += heads * size
        key_value += (getattr(own, "num_key_value_heads", None) or heads) * size
    return query, key_value


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = _LEAST_SIDE
    while True:
        factor = torch.ones(side, side, device=device, dtype=dtype)
        seconds = _least_seconds(device, [partial(torch.matmul, factor, factor)])
        if seconds >= _LEAST_PRODUCT_S or side == _MOST_SIDE:
            return 2 * side**3 / seconds
        side *= 2


def _read_rate(device: torch.device, dtype: torch.dtype, num_bytes: int) -> float:
    """Bytes a second of the fastest of two ways to read a buffer: a sum, and matrix times vector.

    Which one comes nearer to the memory's own rate depends on device and dtype.
    """
    columns = 1024
    matrix = torch.ones(num_bytes // dtype.itemsize // columns, columns, device=device, dtype=dtype)
    vector = torch.ones(columns, device=device, dtype=dtype)
    words = matrix.view(torch.float32)
    return num_bytes / _least_seconds(device, [lambda: matrix @ vector, words.sum])


def _least_seconds(device: torch.device, ways: Iterable[Callable[[], Any]]) -> float:
    """The fastest of some calls of each way; the first of each is not counted."""
    found = []
    for way in ways:
        way()
        for _ in range(REPEATS):
            start = _now(device)
            way()
            found.append(_now(device) - start)
    return min(found)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
