"""Vocabulary: units, the weight slices that go with them, and the map of a model's units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from llmprune.architectures import Architecture, architecture_of
from llmprune.architectures.table import Axis, Space, Sublayer, parse_axes
from llmprune.errors import InputError
from llmprune.recipe import UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Branch = Literal["attention", "mlp"]
BRANCH_KINDS: dict[UnitKind, Branch] = {"attention_sublayers": "attention", "mlp_sublayers": "mlp"}


@dataclass(frozen=True)
class WeightSlice:
    """What one unit occupies of one parameter: unit u is `offset + u * width`, `width` long."""

    parameter: str
    dim: int
    width: int
    offset: int


@dataclass(frozen=True)
class UnitGroup:
    """All units of one kind in one layer (or in the model, where `layer` is None).

    Attributes:
        kind: What the units are.
        layer: The layer they live in.
        num_units: How many there are.
        slices: Every slice that goes when a unit goes (channels, heads, KV groups).
        whole: Per unit, the parameters that go whole (sublayers, layers).
    """

    kind: UnitKind
    layer: int | None
    num_units: int
    slices: tuple[WeightSlice, ...] = ()
    whole: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        """The key of this group in plans and scores."""
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class LayerWidths:
    """The counts of one decoder layer; a missing sublayer is False."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    attention: bool = True
    mlp: bool = True


@dataclass(frozen=True)
class Widths:
    """The shape of a model: `layers[i]` is None where layer i of the dense model is gone."""

    hidden_size: int
    layers: tuple[LayerWidths | None, ...]

    @property
    def kept_layers(self) -> tuple[LayerWidths, ...]:
        """The layers that are there."""
        return tuple(layer for layer in self.layers if layer is not None)


@dataclass(frozen=True)
class ParameterAxes:
    """One parameter of the model with the space that each of its dimensions lives in."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    layer: int | None
    branch: Branch | None


@dataclass(frozen=True)
class UnitMap:
    """Every removable unit of a model, the weight slices that go with it, and the model's shape."""

    architecture: Architecture
    head_dim: int
    dense: Widths
    tied_head: bool
    parameters: tuple[ParameterAxes, ...]
    groups: Mapping[str, UnitGroup]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model."""
        return len(self.dense.layers)

    def layer(self, index: int) -> LayerWidths:
        """The dense counts of one layer."""
        widths = self.dense.layers[index]
        assert widths is not None
        return widths

    def of_kind(self, kind: UnitKind) -> tuple[UnitGroup, ...]:
        """The groups of one kind, in layer order."""
        return tuple(group for group in self.groups.values() if group.kind == kind)

    def signature(self) -> dict[str, Any]:
        """What a plan must agree on with a model to be cut from it."""
        first = self.layer(0)
        uniform = all(layer == first for layer in self.dense.layers)
        return {
            "family": self.architecture.family,
            "hidden_size": self.dense.hidden_size,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self._column("num_attention_heads", uniform),
            "num_key_value_heads": self._column("num_key_value_heads", uniform),
            "intermediate_size": self._column("intermediate_size", uniform),
        }

    def _column(self, name: str, uniform: bool) -> Any:
        column = [getattr(self.layer(index), name) for index in range(self.num_layers)]
        return column[0] if uniform else column

    def axis_size(self, axis: Axis, layer: int | None, widths: Widths) -> int:
        """The length of an axis under `widths` (dense sizes for spaces that are never cut)."""
        return sum(self.space_size(space, layer, widths) for space in axis)

    def space_size(self, space: Space, layer: int | None, widths: Widths) -> int:
        """The length of one cuttable space under `widths`."""
        if space == "hidden":
            return widths.hidden_size
        assert layer is not None, space
        counts = widths.layers[layer]
        assert counts is not None
        if space == "query":
            return counts.num_attention_heads * self.head_dim
        if space == "key_value":
            return counts.num_key_value_heads * self.head_dim
        assert space == "mlp", space
        return counts.intermediate_size

    def shape_under(self, parameter: ParameterAxes, widths: Widths) -> tuple[int, ...] | None:
        """The shape that a parameter is left with under `widths`; None where it is gone."""
        if parameter.layer is not None:
            counts = widths.layers[parameter.layer]
            if counts is None or (parameter.branch and not getattr(counts, parameter.branch)):
                return None
        return tuple(
            size if _is_fixed(axis) else self.axis_size(axis, parameter.layer, widths)
            for size, axis in zip(parameter.shape, parameter.axes, strict=True)
        )


def map_units(model: PreTrainedModel) -> UnitMap:
    """Map every removable unit of a causal language model; works on the meta device too.

    Raises:
        InputError: The family has no table, the model has a parameter that its table does not
            name (an adapter, an extra head), or a layer lacks a sublayer.
    """
    unit_map = map_shape(model)
    for index in range(unit_map.num_layers):
        layer = unit_map.layer(index)
        if not (layer.attention and layer.mlp):
            raise InputError(
                f"every layer must have its attention and MLP, layer {index} of this model has "
                f"already lost its {'mlp' if layer.attention else 'attention'}; prune the dense "
                "model instead"
            )
    return replace(unit_map, groups={group.name: group for group in _groups(unit_map)})


def map_shape(model: PreTrainedModel) -> UnitMap:
    """A `UnitMap` without groups, of any model that was pruned: layers may lack sublayers.

    Raises:
        InputError: As `map_units`, for the family and the parameters.
    """
    config = model.config
    architecture = architecture_of(config.model_type)
    widths = _read_widths(model, architecture)
    parameters = tuple(_axes_of_parameters(model, architecture))
    unit_map = UnitMap(
        architecture=architecture,
        head_dim=_head_dim(config),
        dense=widths,
        tied_head=f"{architecture.head}.weight" not in {p.name for p in parameters},
        parameters=parameters,
        groups={},
    )
    for parameter in parameters:
        expected = unit_map.shape_under(parameter, widths)
        if expected != parameter.shape:
            raise InputError(
                f"{parameter.name} must have shape {expected} by the model's config, "
                f"got {parameter.shape}"
            )
    return unit_map


def query_heads_per_group(layer: LayerWidths) -> int:
    """Query heads that read one key-value head."""
    return layer.num_attention_heads // layer.num_key_value_heads


def layer_config(config: Any, index: int) -> Any:
    """The config of one layer: its own where the checkpoint's layers differ."""
    return config.per_layer_config[index] if config.is_heterogeneous else config


def _is_fixed(axis: Axis) -> bool:
    return axis[0] in ("vocab", "position", "head_dim")


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _read_widths(model: PreTrainedModel, architecture: Architecture) -> Widths:
    config = model.config
    layers = []
    for index in range(config.num_hidden_layers):
        own = layer_config(config, index)
        skipped = getattr(own, "skip", None) or ()
        heads = own.num_attention_heads
        size = getattr(own, architecture.config_key("intermediate_size"), None)
        layers.append(
            LayerWidths(
                num_attention_heads=heads,
                num_key_value_heads=getattr(own, "num_key_value_heads", None) or heads,
                # GPT-2 writes None for four times the hidden size.
                intermediate_size=size or 4 * config.hidden_size,
                attention="attention" not in skipped,
                mlp="mlp" not in skipped,
            )
        )
    return Widths(hidden_size=config.hidden_size, layers=tuple(layers))


def _axes_of_parameters(
    model: PreTrainedModel, architecture: Architecture
) -> Iterator[ParameterAxes]:
    prefix = f"{architecture.layers}."
    for name, parameter in model.named_parameters():
        layer: int | None = None
        local = name
        table = architecture.model_weights
        if name.startswith(prefix):
            index, _, local = name.removeprefix(prefix).partition(".")
            layer, table = int(index), architecture.layer_weights
        if local not in table:
            raise InputError(
                f"the {architecture.family} table must name every parameter, got {name}; "
                "merge adapters into the weights, or see docs/adding-an-architecture.md"
            )
        yield ParameterAxes(
            name=name,
            shape=tuple(parameter.shape),
            axes=parse_axes(table[local]),
            layer=layer,
            branch=None if layer is None else _branch_of(architecture, local),
        )


def _branch_of(architecture: Architecture, local: str) -> Branch:
    return "attention" if _belongs(architecture.attention, local) else "mlp"


def _belongs(sublayer: Sublayer, local: str) -> bool:
    return local.startswith((f"{sublayer.module}.", f"{sublayer.norm}."))


def _groups(unit_map: UnitMap) -> Iterator[UnitGroup]:
    hidden = unit_map.dense.hidden_size
    yield UnitGroup("hidden_channels", None, hidden, _slices(unit_map, {"hidden": 1}, None))
    for kind, branch in BRANCH_KINDS.items():
        yield UnitGroup(kind, None, unit_map.num_layers, whole=_whole(unit_map, branch))
    yield UnitGroup("layers", None, unit_map.num_layers, whole=_whole(unit_map, None))
    for index in range(unit_map.num_layers):
        layer = unit_map.layer(index)
        per_group = query_heads_per_group(layer)
        dim = unit_map.head_dim
        group_widths: dict[Space, int] = {"query": per_group * dim, "key_value": dim}
        # With one query head a group, a head takes its key and value along.
        head_widths: dict[Space, int] = {"query": dim} if per_group > 1 else group_widths
        slices = _slices(unit_map, head_widths, index)
        yield UnitGroup("heads", index, layer.num_attention_heads, slices)
        slices = _slices(unit_map, group_widths, index)
        yield UnitGroup("kv_groups", index, layer.num_key_value_heads, slices)
        slices = _slices(unit_map, {"mlp": 1}, index)
        yield UnitGroup("mlp_channels", index, layer.intermediate_size, slices)


def _slices(
    unit_map: UnitMap, widths: Mapping[Space, int], layer: int | None
) -> tuple[WeightSlice, ...]:
    found = []
    for parameter in unit_map.parameters:
        if layer is not None and parameter.layer != layer:
            continue
        for dim, axis in enumerate(parameter.axes):
            offset = 0
            for space in axis:
                if space in widths:
                    found.append(WeightSlice(parameter.name, dim, widths[space], offset))
                if len(axis) > 1:
                    offset += unit_map.space_size(space, parameter.layer, unit_map.dense)
    return tuple(found)


def _whole(unit_map: UnitMap, branch: Branch | None) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(
            p.name for p in unit_map.parameters if p.layer == index and branch in (None, p.branch)
        )
        for index in range(unit_map.num_layers)
    )


def unit_parameters(
    unit_map: UnitMap, group: UnitGroup, *, of: Literal["model", "decoder"] = "model"
) -> int:
    """Parameters that go with one unit of a group, all else kept; `decoder`: those in layers."""
    shapes = {
        parameter.name: parameter.shape
        for parameter in unit_map.parameters
        if of == "model" or parameter.layer is not None
    }
    if group.whole:
        return sum(math.prod(shapes[name]) for name in group.whole[0])
    return sum(
        math.prod(shapes[s.parameter]) // shapes[s.parameter][s.dim] * s.width
        for s in group.slices
        if s.parameter in shapes
    )
