"""What flows through a model on the calibration rows, summed over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.compensation import BRANCHES, Place, UnitMeans, write_of
from llmprune.units import Branch, UnitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ActivationStatistics:
    """What flows through a model on a set of rows, summed over tokens in float64.

    Attributes:
        sums: Sublayer -> sum of what its write projection reads, shape (in_features,).
        squares: Sublayer -> sum of squares of the same.
        grams: Sublayer -> X^T X of the same, shape (in_features, in_features), where asked for;
            products in the model's dtype, sums in float32 or wider.
        normed: Norm -> sum of squares of its output, shape (hidden_size,).
        similarity: `layers.{i}.{attention|mlp|layer}` -> sum of cosines between the residual
            stream before and after.
        num_tokens: Tokens seen.
    """

    def __init__(self) -> None:
        self.sums: dict[Place, Tensor] = {}
        self.squares: dict[Place, Tensor] = {}
        self.grams: dict[Place, Tensor] = {}
        self.normed: dict[str, Tensor] = {}
        self.similarity: dict[str, float] = {}
        self.num_tokens = 0

    def means(self) -> UnitMeans:
        """Mean activations, for mean compensation."""
        return UnitMeans({place: value / self.num_tokens for place, value in self.sums.items()})

    def mean_squares(self, place: Place) -> Tensor:
        """Mean square of what a write projection reads, shape (in_features,)."""
        return self.squares[place] / self.num_tokens

    def variances(self, place: Place) -> Tensor:
        """Variance of what a write projection reads, shape (in_features,)."""
        mean = self.sums[place] / self.num_tokens
        return (self.mean_squares(place) - mean.square()).clamp(min=0)


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    unit_map: UnitMap,
    batches: Iterable[Tensor],
    *,
    with_grams: bool = False,
) -> ActivationStatistics:
    """Run the rows through the model once; its weights and outputs are left alone.

    Args:
        model: The dense model.
        unit_map: Its units.
        batches: Token rows, each of shape (batch, length), int64.
        with_grams: Sum the Gram matrices too; they take in_features^2 numbers a sublayer.
    """
    statistics = ActivationStatistics()
    handles = _watch(model, unit_map, statistics, with_grams=with_grams)
    try:
        for rows in batches:
            model(input_ids=rows.to(model.device), use_cache=False, logits_to_keep=1)
            statistics.num_tokens += rows.numel()
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def _watch(
    model: PreTrainedModel, unit_map: UnitMap, found: ActivationStatistics, *, with_grams: bool
) -> list[Any]:
    architecture = unit_map.architecture
    handles = []

    def compare(name: str, before: Tensor, after: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        found.similarity[name] = found.similarity.get(name, 0.0) + float(cosine.sum())

    def watch_norm(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            _add(found.normed, name, output.double().square().flatten(0, -2).sum(0).cpu())

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    def watch_layer(index: int) -> None:
        stream: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stream[:] = [args[0]]

        def after_write(branch: Branch) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                _add_read(found, (index, branch), args[0], with_grams=with_grams)
                stream.append(stream[-1] + output)
                compare(f"layers.{index}.{branch}", stream[-2], stream[-1])
                if branch == "mlp":
                    compare(f"layers.{index}.layer", stream[0], stream[-1])

            return hook

        prefix = f"{architecture.layers}.{index}"
        handles.append(model.get_submodule(prefix).register_forward_pre_hook(before))
        for branch in BRANCHES:
            write = write_of(model, unit_map, (index, branch))
            handles.append(write.register_forward_hook(after_write(branch)))
            watch_norm(f"{prefix}.{getattr(architecture, branch).norm}")

    for index in range(unit_map.num_layers):
        watch_layer(index)
    watch_norm(architecture.final_norm)
    return handles


def _add_read(
    found: ActivationStatistics, place: Place, value: Tensor, *, with_grams: bool
) -> None:
    value = value.flatten(0, -2)
    exact = value.double()
    _add(found.sums, place, exact.sum(0).cpu())
    _add(found.squares, place, exact.square().sum(0).cpu())
    if with_grams:
        # a run under autocast would have the products in 16 bits, and a matrix that is not definite
        with torch.autocast(value.device.type, enabled=False):
            wide = value if value.dtype == torch.float64 else value.float()
            _add(found.grams, place, wide.T @ wide)


def _add(table: dict[Any, Tensor], name: Any, value: Tensor) -> None:
    table[name] = table[name] + value if name in table else value
