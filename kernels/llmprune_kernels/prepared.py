"""Products of C++ on weights of layers, with what does not change from call to call.

At inference every call finds the processor's caches full of weights, and code has to be read from
memory again. What Python did around the products of one MLP of SmolLM2-135M took 147 us a token,
the products 552 us (AMD EPYC, one thread, beside other programs, 2026-11-26). So weights are
checked, and a way is chosen, when they are new: a call asks no more than whether they are still the
same tensors at the same addresses, and takes 69 us. Their numbers may change at any time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from llmprune_kernels import native
from llmprune_kernels.dispatch import OVERRIDE, choose_backend
from llmprune_kernels.work import Work

# Numbers of rows and threads that a layer remembers; prompts come in any length.
_MAX_CHOICES = 64


class PreparedProduct:
    """x W^T + bias of one layer, or the gated MLP of three: gate, up and down."""

    __slots__ = ("_chosen", "_kept", "_product", "_works")

    def __init__(self, layers: Sequence[Any]) -> None:
        """Takes layers as `can_prepare` wants them.

        Raises:
            ValueError: They do not fit each other.
        """
        weights = [(layer.values, layer.index) for layer in layers]
        dtype, bias = layers[0].values.dtype, layers[-1].bias
        if len(layers) == 1:
            self._product = native.linear_product(dtype, weights[0], bias)
        else:
            gate, up, down = weights
            self._product = native.gated_mlp_product(dtype, gate, up, down, bias)
        self._kept = [[_Kept.of(tensor) for tensor in _tensors(layer)] for layer in layers]
        self._works = [Work.of(values, values, index, num_rows=1) for values, index in weights]
        self._chosen: dict[tuple[int, int, str | None], bool] = {}

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the layers have the same tensors at the same addresses, and no dense copies."""
        for layer, kept in zip(layers, self._kept, strict=True):
            if layer._buffers.get("dense") is not None:
                return False
            for tensor, (was, place, _) in zip(_tensors(layer), kept, strict=True):
                if tensor is not was or (tensor is not None and tensor.data_ptr() != place):
                    return False
        return True

    def __call__(self, x: Tensor) -> Tensor | None:
        """The product; None where x does not fit, or C++ is not chosen for it."""
        product, shape = self._product, x.shape
        if x.dtype != product.dtype or not x.is_cpu or type(x) not in (Tensor, Parameter):
            return None
        if not shape or shape[-1] != product.in_size:
            return None
        key = (x.numel() // product.in_size, torch.get_num_threads(), os.environ.get(OVERRIDE))
        chosen = self._chosen.get(key)
        if chosen is None:
            if len(self._chosen) >= _MAX_CHOICES:
                self._chosen.clear()
            chosen = self._chosen[key] = self._is_chosen(*key[:2])
        return native.run(product, x) if chosen else None

    def _is_chosen(self, num_rows: int, threads: int) -> bool:
        works = {work._replace(num_rows=num_rows, threads=threads) for work in self._works}
        return all(choose_backend(work).backend == "native" for work in works)


class _Kept(NamedTuple):
    """A tensor and where its numbers are; while there is an alias, no others can be there."""

    tensor: Tensor | None
    place: int
    alias: Tensor | None

    @staticmethod
    def of(tensor: Tensor | None) -> _Kept:
        if tensor is None:
            return _Kept(None, 0, None)
        return _Kept(tensor, tensor.data_ptr(), tensor.detach())


def run_prepared(holder: Any, layers: tuple[Any, ...], x: Tensor) -> Tensor | None:
    """The product of `layers` by what `holder._prepared` has, made anew where it is of others.

    To be asked where `ops.is_watched` says that nothing is. None as for `PreparedProduct`, where
    something learns, and where the layers can't be prepared.
    """
    if torch.is_grad_enabled() and _learns(x, layers):
        return None
    prepared = holder._prepared
    if prepared is None or not prepared.is_of(layers):
        if not can_prepare(layers):
            holder._prepared = None
            return None
        prepared = holder._prepared = PreparedProduct(layers)
    return prepared(x)


def can_prepare(layers: Sequence[Any]) -> bool:
    """Whether weights of BlockSparseLinear are plain numbers that C++ can read together."""
    for layer in layers:
        values, bias = layer._parameters.get("values"), layer._parameters.get("bias")
        if type(values) is not Parameter or type(bias) not in (Parameter, type(None)):
            return False
        if layer._buffers["dense"] is not None or not (values.is_cpu and values.is_contiguous()):
            return False
        if bias is not None and not bias.is_contiguous():
            return False
    is_of_one_block = len(layers) == 1 or layers[0].block == layers[1].block
    return is_of_one_block and native.supports(layers[0].values.dtype)


def _learns(x: Tensor, layers: Sequence[Any]) -> bool:
    tensors = (tensor for layer in layers for tensor in _tensors(layer)[:2])
    return x.requires_grad or any(one is not None and one.requires_grad for one in tensors)


def _tensors(layer: Any) -> tuple[Tensor | None, ...]:
    """Read from where a module keeps them: as its attributes they take five times as long."""
    parameters, buffers = layer._parameters, layer._buffers
    return (
        parameters.get("values"),
        parameters.get("bias"),
        buffers.get("row_ptr"),
        buffers.get("col"),
    )
