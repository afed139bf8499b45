"""Least-squares refit of what reads the residual stream, where the cut takes channels out of it.

A projection that reads the stream (q, k, v, gate, up, an untied head) loses what the removed
channels told it. What they told is in part told by the channels that stay: regressing the dense
model's normed stream on its cut one gives a matrix A with `normed = A cut + rest`, and the weights
W of a reader become those that W A asks for. A head that is tied to the embedding is refitted in
the same way, and the embedding with it. What that adds to a token's streams, its offset, is small
beside the stream that a trained model's head reads (2.7 against 970 in SmolLM2-135M), and the
readers of the first layers are fitted on streams that have it.

The same regression, of the stream itself, fills in what a dense layer is to be shown in place of
the removed channels when it says what the cut layer should have added (`llmprune.reconstruction`).
SmolLM2-135M, an equal quarter of everything with 64 of 576 channels in it: docs/decisions/0018.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmprune.plan import PrunePlan
from llmprune.streams import Streams
from llmprune.surgery import CutSlices
from llmprune.units import Branch, ParameterAxes, UnitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# How often a tied head is fitted on the streams that its last fit gives.
TIED_ROUNDS = 3
# Rows of a weight that are taken to float64 at a time: heads have hundreds of thousands.
OUTPUTS_AT_ONCE = 16384


class Sides(Protocol):
    """Between the dense model's residual stream and the cut model's."""

    def begin(self, streams: Streams) -> None:
        """Take note of the cut model's stream where it enters the first layer."""

    def advance(self, index: int) -> None:
        """Go to a layer of the dense model, kept or not."""

    def refit_reads(self, layer: nn.Module, index: int, branch: Branch) -> None:
        """Refit what a sublayer of the layer that was gone to reads the stream with."""

    def filled(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Cut streams (..., kept) after that layer as a dense layer takes them, (..., hidden)."""

    def wanted(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """What cut streams should be, from the dense ones that began as the last `filled`."""


def sides_of(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    unit_map: UnitMap,
    plan: PrunePlan,
    batches: Sequence[Tensor],
    ridge: float,
) -> Sides:
    """The sides of a cut; where it takes hidden channels the head is refitted here."""
    group = unit_map.groups["hidden_channels"]
    is_whole = len(plan.kept_in(group)) == group.num_units and group.name not in plan.scale
    if is_whole:
        return _SameStream(dense.dtype)
    return _CutStream(pruned, dense, unit_map, plan, batches, ridge)


class _SameStream:
    """No hidden channel goes: nothing is to be translated."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def begin(self, streams: Streams) -> None:
        pass

    def advance(self, index: int) -> None:
        pass

    def refit_reads(self, layer: nn.Module, index: int, branch: Branch) -> None:
        pass

    def filled(self, streams: Sequence[Tensor]) -> list[Tensor]:
        return [stream.to(self.dtype) for stream in streams]

    def wanted(self, streams: Sequence[Tensor]) -> list[Tensor]:
        return list(streams)


class _CutStream:
    """Hidden channels go; the dense model's own stream says what the others tell of them."""

    def __init__(
        self,
        pruned: PreTrainedModel,
        dense: PreTrainedModel,
        unit_map: UnitMap,
        plan: PrunePlan,
        batches: Sequence[Tensor],
        ridge: float,
    ) -> None:
        device = dense.device
        self.dense, self.unit_map, self.ridge = dense, unit_map, ridge
        self.values = {name: value.detach() for name, value in dense.named_parameters()}
        self.slices = CutSlices(unit_map, plan, whole_hidden=True)
        self.hidden_size = unit_map.dense.hidden_size
        self.kept = torch.tensor(plan.kept_in(unit_map.groups["hidden_channels"]), device=device)
        self.scale = torch.tensor(plan.scale.get("hidden_channels", (1.0,)), device=device)
        self.own = Streams(dense, unit_map.architecture.layers, batches)
        self.after_attention: list[Tensor] = []
        self.before = self.own.values
        # what a token's embedding adds to every stream after the refit of a tied head
        self.offsets: list[Tensor] = []
        # what the last `filled` could not say of the kept channels
        self.unsaid: list[Tensor] = []
        self._refit_head(pruned, batches)

    def begin(self, streams: Streams) -> None:
        self.offsets = [
            cut - self._narrow(whole)
            for cut, whole in zip(streams.values, self.own.values, strict=True)
        ]

    def advance(self, index: int) -> None:
        self.before = self.own.values
        write = self.unit_map.architecture.attention.write
        self.after_attention, _ = self.own.advance_dense(index, write)

    def refit_reads(self, layer: nn.Module, index: int, branch: Branch) -> None:
        architecture = self.unit_map.architecture
        prefix = f"{architecture.layers}.{index}."
        norm = getattr(architecture, branch).norm
        streams = self.before if branch == "attention" else self.after_attention
        wanted = [self.dense.get_submodule(prefix + norm)(stream) for stream in streams]
        had = [layer.get_submodule(norm)(stream) for stream in self._cut(streams)]
        lost = [w - self._wide(h) for w, h in zip(wanted, had, strict=True)]
        reads = [
            (layer.get_submodule(p.name.removeprefix(prefix).removesuffix(".weight")), p)
            for p in _reads(self.unit_map, index, branch)
        ]
        has_bias = all(projection.bias is not None for projection, _ in reads)
        told = _Told.fit(had, lost, self.ridge, with_constant=has_bias)
        for projection, parameter in reads:
            whole = self.slices.of(parameter, self.values[parameter.name])
            told.add_to(projection, whole)

    def filled(self, streams: Sequence[Tensor]) -> list[Tensor]:
        whole = self.own.values
        had = self._cut(whole)
        lost = [w - self._wide(h / self.scale) for w, h in zip(whole, had, strict=True)]
        told = _Told.fit(had, lost, self.ridge, with_constant=True)
        found = [self._wide(stream / self.scale) + told.of(stream) for stream in streams]
        found = [stream.to(self.dense.dtype) for stream in found]
        self.unsaid = [
            cut - self._narrow(wide).to(cut) for cut, wide in zip(streams, found, strict=True)
        ]
        return found

    def wanted(self, streams: Sequence[Tensor]) -> list[Tensor]:
        return [
            self._narrow(stream).to(rest) + rest
            for stream, rest in zip(streams, self.unsaid, strict=True)
        ]

    def _refit_head(self, pruned: PreTrainedModel, batches: Sequence[Tensor]) -> None:
        """Refit the head to what the dense one makes of the dense stream.

        A tied head is the embedding, too, and that a part of every stream that the head reads: it
        is fitted anew on what it gives, and left as it was where that came nearest.
        """
        end = self.own.values
        for index in range(self.unit_map.num_layers):
            end = [self.own.run(index, stream) for stream in end]
        norm = self.unit_map.architecture.final_norm
        wanted = [self.dense.get_submodule(norm)(stream) for stream in end]
        # in the precision of what is refitted
        head: Any = pruned.get_output_embeddings()
        cut = [self._narrow(stream).to(head.weight) for stream in end]
        dense_head: Any = self.dense.get_output_embeddings()
        whole = dense_head.weight.detach()
        is_tied = self.unit_map.tied_head
        # a tied head has the scale of the embedding
        scale = self.scale.to(head.weight) if is_tied else 1.0
        has_bias = head.bias is not None
        metric = sum(part.double().T @ part.double() for part in whole.split(OUTPUTS_AT_ONCE))

        def read(offsets: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            had = [
                pruned.get_submodule(norm)(stream + offset)
                for stream, offset in zip(cut, offsets, strict=True)
            ]
            return had, [w - self._wide(h * scale) for w, h in zip(wanted, had, strict=True)]

        had, lost = read([torch.zeros_like(stream) for stream in cut])
        if not is_tied:
            _Told.fit(had, lost, self.ridge, with_constant=has_bias).add_to(head, whole)
            return
        least = sum(_error(value.double(), metric) for value in lost)
        was = head.weight.clone()
        best = was
        for _ in range(TIED_ROUNDS):
            told = _Told.fit(had, lost, self.ridge, with_constant=False)
            head.weight.copy_(was)
            told.add_to(head, whole)
            moved = head.weight - was
            had, lost = read([moved[rows.to(moved.device)] for rows in batches])
            missed = (w.double() - told.of(h) for w, h in zip(lost, had, strict=True))
            error = sum(_error(value, metric) for value in missed)
            if error < least:
                least, best = error, head.weight.clone()
        head.weight.copy_(best)

    def _narrow(self, stream: Tensor) -> Tensor:
        """The kept channels, scaled as the cut scales them."""
        return stream[..., self.kept] * self.scale.to(stream)

    def _cut(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """The cut model's streams, if all that is read from them were right."""
        return [
            self._narrow(stream).to(offset) + offset
            for stream, offset in zip(streams, self.offsets, strict=True)
        ]

    def _wide(self, stream: Tensor) -> Tensor:
        """Zeros where channels are gone."""
        wide = stream.new_zeros(*stream.shape[:-1], self.hidden_size)
        wide[..., self.kept] = stream
        return wide


def _error(missed: Tensor, metric: Tensor) -> float:
    """The squared error of the logits, summed over tokens, of an error in what the head reads.

    Args:
        missed: Shape (..., hidden), float64.
        metric: Of the head's weights W, W^T W.
    """
    return float(((missed @ metric) * missed).sum())


def _reads(unit_map: UnitMap, index: int, branch: Branch) -> Iterable[ParameterAxes]:
    """The weights of a sublayer that read the residual stream."""
    write = getattr(unit_map.architecture, branch).write
    for parameter in unit_map.parameters:
        is_here = (parameter.layer, parameter.branch) == (index, branch)
        if is_here and len(parameter.axes) == 2 and f".{write}." not in parameter.name:
            yield parameter


class _Told:
    """An affine map: what the kept channels tell of the removed ones."""

    def __init__(self, matrix: Tensor, shift: Tensor | None) -> None:
        self.matrix = matrix
        self.shift = shift

    @staticmethod
    def fit(
        had: Sequence[Tensor], lost: Sequence[Tensor], ridge: float, *, with_constant: bool
    ) -> _Told:
        """Ridge regression of what was lost on what is had, over all tokens, in float64.

        Args:
            had: Of every batch (..., kept).
            lost: Of every batch (..., hidden).
            ridge: Pull towards zero, as a share of the mean squared input.
            with_constant: Whether a constant is fitted, too.
        """
        kept = had[0].shape[-1]
        width = kept + with_constant
        gram = had[0].new_zeros(width, width, dtype=torch.float64)
        cross = had[0].new_zeros(width, lost[0].shape[-1], dtype=torch.float64)
        for value, target in zip(had, lost, strict=True):
            inputs = value.flatten(0, -2).double()
            if with_constant:
                inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
            gram.addmm_(inputs.T, inputs)
            cross.addmm_(inputs.T, target.flatten(0, -2).double())
        gram.diagonal()[:kept].add_(ridge * gram.diagonal()[:kept].mean())
        found = torch.linalg.solve(gram, cross)
        return _Told(found[:kept], found[kept] if with_constant else None)

    def of(self, stream: Tensor) -> Tensor:
        """(..., kept) -> (..., hidden), float64."""
        told = stream.double() @ self.matrix
        return told if self.shift is None else told + self.shift

    def add_to(self, projection: Any, whole: Tensor) -> None:
        """Give a projection what the dense one would make of what is told.

        Args:
            projection: An `nn.Linear`, or a Conv1D, whose weight is (inputs, outputs).
            whole: The dense weight, cut to the projection's outputs alone, of the same layout.
        """
        is_linear = isinstance(projection, nn.Linear)
        weight = projection.weight if is_linear else projection.weight.T
        parts = (whole if is_linear else whole.T).split(OUTPUTS_AT_ONCE)
        for part, own in zip(parts, weight.split(OUTPUTS_AT_ONCE), strict=True):
            own += (part.double() @ self.matrix.T).to(own)
        if self.shift is not None:
            told = torch.cat([part.double() @ self.shift for part in parts])
            projection.bias += told.to(projection.bias)
