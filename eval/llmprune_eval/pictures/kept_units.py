"""KeptModel: what a plan keeps of a model, from the plan alone; no model is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.recipe import UNIT_KINDS, UnitKind

if TYPE_CHECKING:
    from llmprune.plan import PrunePlan

KIND_NAMES: dict[str, str] = {
    "heads": "query heads",
    "kv_groups": "KV groups",
    "mlp_channels": "MLP channels",
    "hidden_channels": "hidden channels",
    "attention_sublayers": "attention sublayers",
    "mlp_sublayers": "MLP sublayers",
    "layers": "layers",
}


@dataclass(frozen=True)
class KeptUnits:
    """What stays of one layer, a bool for every unit of the dense layer, True = stays.

    Where the attention is gone no head and no KV group stays; where the MLP is, no channel.
    """

    heads: tuple[bool, ...]
    kv_groups: tuple[bool, ...]
    mlp_channels: tuple[bool, ...]
    attention: bool
    mlp: bool
    is_there: bool

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key-value head of the dense layer."""
        return len(self.heads) // len(self.kv_groups)


@dataclass(frozen=True)
class KeptModel:
    """What a plan keeps of a whole model."""

    layers: tuple[KeptUnits, ...]
    hidden_channels: tuple[bool, ...]

    def masks(self, kind: UnitKind) -> list[tuple[bool, ...]]:
        """Kept or not: a tuple a layer, or one for the model where the kind spans layers."""
        if kind == "hidden_channels":
            return [self.hidden_channels]
        if kind == "attention_sublayers":
            return [tuple(layer.attention for layer in self.layers)]
        if kind == "mlp_sublayers":
            return [tuple(layer.mlp for layer in self.layers)]
        if kind == "layers":
            return [tuple(layer.is_there for layer in self.layers)]
        return [getattr(layer, kind) for layer in self.layers]

    def counts(self) -> dict[UnitKind, tuple[int, int]]:
        """Kind -> units that stay, of how many."""
        found = {kind: [unit for mask in self.masks(kind) for unit in mask] for kind in UNIT_KINDS}
        return {kind: (sum(units), len(units)) for kind, units in found.items()}


def kept_model(plan: PrunePlan) -> KeptModel:
    """What a plan keeps; a head goes with its KV group, and all of a layer with the layer."""
    num_layers = int(plan.model["num_hidden_layers"])
    whole = range(num_layers)
    gone = {
        kind: set(whole) - set(plan.kept.get(kind, whole))
        for kind in ("layers", "attention_sublayers", "mlp_sublayers")
    }
    hidden = int(plan.model["hidden_size"])
    layers = []
    for index in whole:
        attention = index not in gone["layers"] | gone["attention_sublayers"]
        mlp = index not in gone["layers"] | gone["mlp_sublayers"]
        layers.append(_layer(plan, index, attention=attention, mlp=mlp))
    return KeptModel(tuple(layers), _mask(plan.kept, "hidden_channels", hidden))


def _layer(plan: PrunePlan, index: int, *, attention: bool, mlp: bool) -> KeptUnits:
    num_heads = _count(plan.model, "num_attention_heads", index)
    num_groups = _count(plan.model, "num_key_value_heads", index)
    channels = _count(plan.model, "intermediate_size", index)
    heads = _mask(plan.kept, f"layers.{index}.heads", num_heads)
    groups = _mask(plan.kept, f"layers.{index}.kv_groups", num_groups)
    per_group = num_heads // num_groups
    heads = tuple(kept and groups[head // per_group] for head, kept in enumerate(heads))
    if per_group == 1:
        # a head takes its key and value along
        groups = heads
    kept = _mask(plan.kept, f"layers.{index}.mlp_channels", channels)
    return KeptUnits(
        heads=heads if attention else (False,) * num_heads,
        kv_groups=groups if attention else (False,) * num_groups,
        mlp_channels=kept if mlp else (False,) * channels,
        attention=attention,
        mlp=mlp,
        is_there=attention or mlp,
    )


def _count(model: Mapping[str, Any], name: str, index: int) -> int:
    """A count of the dense layer: one number for all layers, or a list."""
    column = model[name]
    return int(column[index] if isinstance(column, list) else column)


def _mask(kept: Mapping[str, tuple[int, ...]], name: str, count: int) -> tuple[bool, ...]:
    if name not in kept:
        return (True,) * count
    stays = set(kept[name])
    return tuple(unit in stays for unit in range(count))
