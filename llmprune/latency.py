"""LatencyTable: milliseconds of a model's sublayers by their counts, measured where the run is.

Small models of equal layers are timed beside the dense model, round by round in turn: attention
alone for a grid of (KV groups, heads a group), MLP alone for a grid of channels, neither, and the
whole vocabulary without layers. What lies between grid points is interpolated, and everything
scaled so that the dense model's sum is what the dense model took.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from llmprune.cost import total_cost
from llmprune.cut_config import per_layer_config
from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.recipe import Budget, Recipe, UnitKind
from llmprune.units import LayerWidths, UnitMap, Widths, query_heads_per_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLE_FORMAT = "llmprune-latency/1"
# Points along each axis of the grid.
MOST_CHANNELS, MOST_HEADS = 8, 4
# Channel counts on the grid are multiples of this, as those of a plan for speed should be.
CHANNEL_STEP = 8
# A timed model has layers of about this many parameters together, and at most four: enough for
# its layers to outlast the overhead of a forward pass, and for their weights not to stay in cache.
TIMED_PARAMETERS, MOST_LAYERS = 16e6, 4
# Rows of the timed models' embeddings, unless it is the vocabulary that is timed.
SMALL_VOCABULARY = 64

# Name -> model and a budget, to name -> median milliseconds of its phase, models timed in turn.
Measure = Callable[[Mapping[str, Any], Budget], Mapping[str, float]]


@dataclass(frozen=True)
class LatencyTable:
    """What a shape takes, as a sum over its sublayers; a `ShapeCost` at the dense hidden size.

    Attributes:
        phase, batch_size, context: What was timed.
        device, dtype: Where, and in which type.
        dense_ms: The dense model, measured in the same rounds.
        scale: What all else was multiplied by, for the dense sum to be `dense_ms`.
        rest_ms: Embeddings, final norm and head.
        kv_groups, heads: The attention grid: KV groups, and query heads in each.
        attention_ms: One attention with its norm, by KV groups and heads in each.
        channels: The MLP grid.
        mlp_ms: One MLP with its norm, by channels.
    """

    phase: str
    batch_size: int
    context: int
    device: str
    dtype: str
    dense_ms: float
    scale: float
    rest_ms: float
    kv_groups: tuple[int, ...]
    heads: tuple[int, ...]
    attention_ms: tuple[tuple[float, ...], ...]
    channels: tuple[int, ...]
    mlp_ms: tuple[float, ...]

    def rest(self, hidden_size: int) -> float:
        """What is in no decoder layer."""
        return self.rest_ms

    def attention(self, index: int, num_heads: int, num_kv_heads: int, hidden_size: int) -> float:
        """Any layer's attention with so many query and key-value heads."""
        per_group = num_heads / num_kv_heads
        by_groups = [float(np.interp(per_group, self.heads, row)) for row in self.attention_ms]
        return float(np.interp(num_kv_heads, self.kv_groups, by_groups))

    def mlp(self, index: int, num_channels: int, hidden_size: int) -> float:
        """Any layer's MLP with so many channels."""
        return float(np.interp(num_channels, self.channels, self.mlp_ms))

    def fits(self, budget: Budget, dtype: str) -> bool:
        """Whether this is what a budget asks for, of a model of such a type."""
        asked = (budget.phase, budget.batch_size, budget.context, dtype)
        return asked == (self.phase, self.batch_size, self.context, self.dtype)

    def promise(self, recipe: Recipe, widths: Widths) -> Promise:
        """What a plan of such widths will take, for the report to hold against."""
        assert recipe.budget is not None
        return Promise(recipe.budget, self.dense_ms, total_cost(self, widths))

    def save(self, file: Path) -> None:
        """Write the table as JSON."""
        save_text(json.dumps({"format": TABLE_FORMAT, **asdict(self)}, indent=1) + "\n", file)

    @staticmethod
    def read(file: Path) -> LatencyTable:
        """Read a saved table.

        Raises:
            InputError: The file is not one.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.pop("format") != TABLE_FORMAT:
                raise KeyError("format")
            for name in ("kv_groups", "heads", "channels", "mlp_ms"):
                data[name] = tuple(data[name])
            data["attention_ms"] = tuple(map(tuple, data["attention_ms"]))
            return LatencyTable(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{file.name}: must be a latency table, got {error!r}; delete it"
            ) from error


@dataclass(frozen=True)
class Promise:
    """What a plan will take by the table that it was chosen by, milliseconds.

    Attributes:
        budget: The latency budget.
        dense_ms: The dense model, when the table was measured.
        pruned_ms: The plan's shape by the table.
    """

    budget: Budget
    dense_ms: float
    pruned_ms: float


def table_for(
    file: Path | None,
    model: Callable[[], PreTrainedModel],
    unit_map: UnitMap,
    recipe: Recipe,
    *,
    measure: Measure,
) -> LatencyTable | None:
    """The table that a recipe's budget needs; None where it is no latency.

    Args:
        file: Read where it holds what the budget asks for; otherwise the new table is saved there.
            None: nothing is kept.
        model: Gives the dense model (its weights don't matter), on the device to time on.
        unit_map: Of it.
        recipe: Its `budget` and the kinds of `prune` are used.
        measure: Times models.

    Raises:
        InputError: The file is no table.
    """
    budget = recipe.budget
    if budget is None or budget.sparsity is not None:
        return None
    if file is not None and file.is_file():
        table = LatencyTable.read(file)
        if table.fits(budget, recipe.model.dtype):
            return table
    table = measure_table(model(), unit_map, budget, recipe.prune.rules(), measure)
    if file is not None:
        table.save(file)
    return table


def measure_table(
    model: PreTrainedModel,
    unit_map: UnitMap,
    budget: Budget,
    kinds: Iterable[UnitKind],
    measure: Measure,
) -> LatencyTable:
    """Time the model and small models of its layers.

    Args:
        model: The dense model, on the device to time on, in the type to time in.
        unit_map: Of it.
        budget: Says what is timed.
        kinds: Kinds that may go; other counts are timed as they are.
        measure: Times models.
    """
    layer = unit_map.layer(0)
    groups, heads = _attention_grid(layer, set(kinds))
    channels = _grid(layer.intermediate_size, MOST_CHANNELS, CHANNEL_STEP)
    channels = channels if "mlp_channels" in set(kinds) else [layer.intermediate_size]
    count = _timed_layers(unit_map)
    build = _Builder(model, unit_map, count)
    models: dict[str, Any] = {"dense": model, "none": build.small(), "head": build.whole_head()}
    for size in product(groups, heads):
        models[f"attention {size}"] = build.small(attention=size)
    for size_of_mlp in channels:
        models[f"mlp {size_of_mlp}"] = build.small(mlp=size_of_mlp)
    ms = measure(models, budget)

    def each(name: str) -> float:
        # the least that a clock tells apart: noise must not make a sublayer free
        return max((ms[name] - ms["none"]) / count, 1e-6)

    attention = np.array([[each(f"attention {(g, h)}") for h in heads] for g in groups])
    attention = np.apply_along_axis(_rising, 1, np.apply_along_axis(_rising, 0, attention))
    mlp = _rising(np.array([each(f"mlp {size}") for size in channels]))
    rest = ms["head"]
    scale = ms["dense"] / (rest + unit_map.num_layers * float(attention[-1, -1] + mlp[-1]))
    return LatencyTable(
        phase=budget.phase,
        batch_size=budget.batch_size,
        context=budget.context,
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        dense_ms=ms["dense"],
        scale=scale,
        rest_ms=rest * scale,
        kv_groups=tuple(groups),
        heads=tuple(heads),
        attention_ms=tuple(map(tuple, (attention * scale).tolist())),
        channels=tuple(channels),
        mlp_ms=tuple((mlp * scale).tolist()),
    )


class _Builder:
    """Builds random models of `num_layers` equal layers like those of the dense model."""

    def __init__(self, model: PreTrainedModel, unit_map: UnitMap, num_layers: int) -> None:
        self.model = model
        self.unit_map = unit_map
        self.num_layers = num_layers

    def small(self, *, attention: tuple[int, int] | None = None, mlp: int | None = None) -> Any:
        """A model of a small vocabulary whose layers have such an attention, such an MLP, or no."""
        dense = self.unit_map.layer(0)
        groups, heads = attention or (1, 1)
        layer = LayerWidths(
            num_attention_heads=groups * heads,
            num_key_value_heads=groups,
            intermediate_size=mlp or dense.intermediate_size,
            attention=attention is not None,
            mlp=mlp is not None,
        )
        return self._build(layer, self.num_layers, SMALL_VOCABULARY)

    def whole_head(self) -> Any:
        """A model of the whole vocabulary, and no work in its one layer."""
        layer = LayerWidths(1, 1, 1, attention=False, mlp=False)
        return self._build(layer, 1, self.model.config.vocab_size)

    def _build(self, layer: LayerWidths, num_layers: int, vocab_size: int) -> Any:
        from llmprune.modeling_pruned import CLASSES

        total = self.unit_map.num_layers
        layers = [layer if index < num_layers else None for index in range(total)]
        widths = Widths(self.unit_map.dense.hidden_size, tuple(layers))
        config = per_layer_config(self.model.config, self.unit_map, widths)
        config.vocab_size = vocab_size
        config.pad_token_id = None
        config.dtype = self.model.dtype
        model_class: Any = CLASSES[self.unit_map.architecture.family][2]
        attention = self.model.config._attn_implementation
        with torch.device(self.model.device):
            return model_class._from_config(config, attn_implementation=attention).eval()


def _attention_grid(layer: LayerWidths, kinds: set[UnitKind]) -> tuple[list[int], list[int]]:
    """KV groups and heads a group to time."""
    ratio, groups = query_heads_per_group(layer), layer.num_key_value_heads
    if ratio == 1:
        named = kinds & {"heads", "kv_groups"}
        return (_grid(groups, 2 * MOST_HEADS, 1) if named else [groups]), [1]
    return (
        _grid(groups, MOST_HEADS, 1) if "kv_groups" in kinds else [groups],
        _grid(ratio, MOST_HEADS, 1) if "heads" in kinds else [ratio],
    )


def _grid(largest: int, points: int, step: int) -> list[int]:
    """Ascending counts up to `largest`, in even steps, multiples of `step` but for the last."""
    counts = {max(step, round(largest * n / points / step) * step) for n in range(1, points)}
    return [*sorted(count for count in counts if count < largest), largest]


def _timed_layers(unit_map: UnitMap) -> int:
    inside = [p for p in unit_map.parameters if p.layer == 0]
    each = sum(math.prod(p.shape) for p in inside)
    return max(1, min(MOST_LAYERS, unit_map.num_layers, int(TIMED_PARAMETERS // each)))


def _rising(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest sequence that never falls: more work that took less time is noise."""
    return np.asarray(isotonic_regression(values).x)
