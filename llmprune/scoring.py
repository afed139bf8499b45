"""score_units(name, ...): every way to score units that trains nothing, by its name in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from llmprune.baselines import (
    Metric,
    magnitude_scores,
    metric_scores,
    random_scores,
    taylor_scores,
)
from llmprune.compensation import UnitMeans
from llmprune.integrated import integrated_scores
from llmprune.recipe import Method, UnitKind
from llmprune.recipe_training import Prior
from llmprune.statistics import ActivationStatistics, collect_statistics
from llmprune.units import UnitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# task, what it goes over -> the same, telling how far it is
Over = Callable[[str, Sequence[Tensor]], Iterable[Tensor]]

# Rows that go through the model at a time where only a forward pass is needed.
FORWARD_BATCH = 4


def score_units(
    name: Method | Prior,
    model: PreTrainedModel,
    unit_map: UnitMap,
    rows: Tensor,
    *,
    kinds: Collection[UnitKind],
    seed: int = 0,
    means: UnitMeans | None = None,
    statistics: ActivationStatistics | None = None,
    over: Over = lambda task, items: items,
) -> dict[str, Tensor]:
    """Importance of every unit of the named kinds, float64, not negative.

    Args:
        name: A method or a prior of a recipe, but `sequential_attention` and `none`.
        model: The dense model.
        unit_map: Its units.
        rows: Token rows, shape (num_rows, length), int64.
        kinds: Kinds to score.
        seed: Of `random`, and of the labels that `fisher` draws.
        means: What closed gates leave behind, for those that look at gates; None for zeros.
        statistics: Of these rows, where they are at hand (with Gram matrices for `omp`).
        over: Progress.
    """
    if name == "random":
        return random_scores(unit_map, kinds, seed)
    if name == "magnitude":
        return magnitude_scores(model, unit_map, kinds)
    task = f"{name} scores"
    if name == "taylor":
        batches = over(task, rows.split(FORWARD_BATCH))
        return taylor_scores(model, unit_map, batches, kinds, means=means)
    if name in ("taylor_squared", "fisher"):
        return taylor_scores(
            model,
            unit_map,
            over(task, rows.split(1)),
            kinds,
            order=2,
            labels="model" if name == "fisher" else "text",
            means=means,
            seed=seed,
        )
    if name == "integrated":
        return integrated_scores(model, unit_map, over(task, rows.split(1)), kinds, means=means)
    metric = next(one for one in get_args(Metric) if one == name)
    if statistics is None:
        batches = over(task, rows.split(FORWARD_BATCH))
        statistics = collect_statistics(model, unit_map, batches, with_grams=metric == "omp")
    return metric_scores(metric, model, unit_map, statistics, kinds)


def unit_means(
    model: PreTrainedModel,
    unit_map: UnitMap,
    rows: Tensor,
    over: Over = lambda task, items: items,
) -> UnitMeans:
    """What every write projection of the dense model reads on average over the rows."""
    with torch.no_grad():
        batches = over("mean activations", rows.split(FORWARD_BATCH))
        return collect_statistics(model, unit_map, batches).means()
