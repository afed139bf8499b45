"""Streams: residual streams of calibration rows, carried through a model layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmprune.units import Branch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def even_batches(rows: Tensor, *, most: int = 8) -> tuple[Tensor, ...]:
    """Rows (num_rows, length) in batches of one size, the largest up to `most` that divides."""
    size = next(size for size in range(min(most, len(rows)), 0, -1) if len(rows) % size == 0)
    return rows.split(size)


class _CapturedError(Exception):
    """Ends a forward pass once the input that it was run for is there."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class Streams:
    """The residual stream of every batch, carried from layer to layer.

    `calls[i]` is what layer i gets besides the stream (masks, rotary tables); it is the same for
    all batches, which are alike in shape and have no padding.
    """

    def __init__(self, model: PreTrainedModel, layers: str, batches: Sequence[Tensor]) -> None:
        self.layers: Any = model.get_submodule(layers)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.values = [self._enter(model, rows.to(model.device)) for rows in batches]

    def _enter(self, model: PreTrainedModel, rows: Tensor) -> Tensor:
        first: list[Tensor] = []
        learn = not self.calls

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if not first:
                first.append(hidden)
                if not learn:
                    raise _CapturedError(hidden)
            own = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            self.calls.append((rest, own))

        handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers
        ]
        try:
            model(input_ids=rows, use_cache=False, logits_to_keep=1)
        except _CapturedError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return first[0]

    def run(self, index: int, stream: Tensor) -> Tensor:
        """One layer on one batch's stream."""
        rest, kwargs = self.calls[index]
        return self.layers[index](stream, *rest, **kwargs)

    def advance_dense(self, index: int, write: str) -> tuple[list[Tensor], list[Tensor]]:
        """Carry the streams through a layer; those after its attention and after all of it."""
        middle: list[Tensor] = []

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            middle.append(output)

        handle = self.layers[index].get_submodule(write).register_forward_hook(after)
        try:
            end = [self.run(index, stream) for stream in self.values]
        finally:
            handle.remove()
        middle = [stream + added for stream, added in zip(self.values, middle, strict=True)]
        self.values = end
        return middle, end

    def read(
        self, layer: nn.Module, index: int, branch: Branch, sublayer: Any, projection: nn.Module
    ) -> list[Tensor]:
        """What a projection of a sublayer reads from the streams as they are, (..., width)."""

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _CapturedError(args[0])

        handle = projection.register_forward_pre_hook(before)
        found = []
        try:
            for stream in self.values:
                try:
                    if branch == "attention":
                        self.run(index, stream)
                    else:
                        normed = layer.get_submodule(sublayer.norm)(stream)
                        layer.get_submodule(sublayer.module)(normed)
                except _CapturedError as captured:
                    found.append(captured.value)
        finally:
            handle.remove()
        return found

    def add(self, written: list[Tensor]) -> None:
        """Add a sublayer's output to the streams."""
        self.values = [s + w for s, w in zip(self.values, written, strict=True)]
