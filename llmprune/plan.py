"""PrunePlan: the kept indices of every unit group; JSON; validation against a model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.units import LayerWidths, UnitGroup, UnitMap, Widths, query_heads_per_group

FORMAT = "llmprune-plan/1"
Indices = tuple[int, ...]


@dataclass(frozen=True)
class KeptLayer:
    """What stays of one layer: ascending indices into the dense layer's heads and channels."""

    heads: Indices
    kv_heads: Indices
    mlp_channels: Indices
    attention: bool
    mlp: bool


@dataclass(frozen=True)
class PrunePlan:
    """Which units stay.

    Attributes:
        model: `UnitMap.signature()` of the model that the plan is for.
        kept: Group name -> ascending indices that stay; a group that is not named stays whole.
        scale: Group name -> one factor per kept index, folded into the weights by the cut (the
            gates of variants that end with gates other than 1); a group not named has factor 1.
    """

    model: Mapping[str, Any]
    kept: Mapping[str, Indices]
    scale: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def validate(self, unit_map: UnitMap) -> None:
        """Check that the plan can be cut from the mapped model.

        Raises:
            InputError: It is for another model, names a group or an index that isn't there, keeps
                nothing of a group, or breaks a tie (KV groups of a layer keep equally many heads).
        """
        signature = unit_map.signature()
        for key, value in signature.items():
            if self.model.get(key) != value:
                raise InputError(
                    f"plan: must be for this model, which has {key} {value}, "
                    f"got one made for {key} {self.model.get(key)}"
                )
        for name, kept in self.kept.items():
            if name not in unit_map.groups:
                raise InputError(f"plan: kept.{name} must name a unit group of the model")
            _check_indices(name, kept, unit_map.groups[name].num_units)
        for name, factors in self.scale.items():
            if len(factors) != len(self.kept.get(name, ())):
                raise InputError(f"plan: scale.{name} must have one factor per kept index")
        self.widths(unit_map)

    def kept_in(self, group: UnitGroup) -> Indices:
        """Indices of a group that stay."""
        return self.kept.get(group.name, tuple(range(group.num_units)))

    def kept_layer(self, unit_map: UnitMap, index: int) -> KeptLayer | None:
        """What stays of one layer; None where the layer goes.

        Raises:
            InputError: Its KV groups would keep different numbers of query heads.
        """
        groups = unit_map.groups
        if index not in self.kept_in(groups["layers"]):
            return None
        per_group = query_heads_per_group(unit_map.layer(index))
        kv_heads = self.kept_in(groups[f"layers.{index}.kv_groups"])
        heads = self.kept_in(groups[f"layers.{index}.heads"])
        heads = tuple(head for head in heads if head // per_group in set(kv_heads))
        counts = {kv: sum(head // per_group == kv for head in heads) for kv in kv_heads}
        if per_group == 1:
            kv_heads = heads
        elif len(set(counts.values())) > 1 or 0 in counts.values():
            raise InputError(
                f"plan: layer {index} must keep the same number of query heads in every kept KV "
                f"group and at least one, got {counts}"
            )
        if not heads:
            raise InputError(
                f"plan: layer {index} must keep a head, got none; drop its attention instead"
            )
        return KeptLayer(
            heads=heads,
            kv_heads=kv_heads,
            mlp_channels=self.kept_in(groups[f"layers.{index}.mlp_channels"]),
            attention=index in self.kept_in(groups["attention_sublayers"]),
            mlp=index in self.kept_in(groups["mlp_sublayers"]),
        )

    def widths(self, unit_map: UnitMap) -> Widths:
        """The shape of the model that the cut leaves."""
        layers: list[LayerWidths | None] = []
        for index in range(unit_map.num_layers):
            kept = self.kept_layer(unit_map, index)
            gone = kept is None or not (kept.attention or kept.mlp)
            layers.append(None if gone or kept is None else _counts(kept))
        if not any(layers):
            raise InputError("plan: must keep at least one layer, got none")
        hidden = self.kept_in(unit_map.groups["hidden_channels"])
        return Widths(hidden_size=len(hidden), layers=tuple(layers))

    def to_json(self) -> str:
        """The plan as JSON, one group a line."""
        lines = [
            f'{{\n"format": {json.dumps(FORMAT)},',
            f'"model": {json.dumps(dict(self.model))},',
        ]
        lines.append(f'"kept": {_object(self.kept)},')
        lines.append(f'"scale": {_object(self.scale)}\n}}\n')
        return "\n".join(lines)

    @staticmethod
    def from_json(text: str, *, name: str = "plan") -> PrunePlan:
        """Read a plan.

        Raises:
            InputError: It is not JSON or not a plan; `name` begins the message.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{name}: a plan must be JSON, got: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{name}: format must be {FORMAT!r}, got {got!r}")
        kept = _table(data.get("kept", {}), int, f"{name}: kept")
        scale = _table(data.get("scale", {}), float, f"{name}: scale")
        model = data.get("model")
        if not isinstance(model, dict):
            raise InputError(f"{name}: model must be a mapping, got {type(model).__name__}")
        return PrunePlan(model=model, kept=kept, scale=scale)

    @staticmethod
    def read(path: Path) -> PrunePlan:
        """Read a plan file; errors as `from_json`."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: a plan must be a readable file, got: {error}") from error
        return PrunePlan.from_json(text, name=str(path))


def _check_indices(name: str, kept: Indices, num_units: int) -> None:
    if not kept:
        raise InputError(f"plan: kept.{name} must keep at least one unit, got none")
    ascending = all(a < b for a, b in itertools.pairwise(kept))
    if not ascending or kept[0] < 0 or kept[-1] >= num_units:
        raise InputError(
            f"plan: kept.{name} must be ascending indices in [0, {num_units}), "
            f"got {list(kept[:8])}{' ...' if len(kept) > 8 else ''}"
        )


def _counts(kept: KeptLayer) -> LayerWidths:
    return LayerWidths(
        num_attention_heads=len(kept.heads),
        num_key_value_heads=len(kept.kv_heads),
        intermediate_size=len(kept.mlp_channels),
        attention=kept.attention,
        mlp=kept.mlp,
    )


def _object(table: Mapping[str, tuple[Any, ...]]) -> str:
    rows = [f"{json.dumps(name)}: {json.dumps(list(values))}" for name, values in table.items()]
    return "{\n" + ",\n".join(rows) + "\n}" if rows else "{}"


def _table(data: Any, number: type, name: str) -> dict[str, tuple[Any, ...]]:
    kinds = (int, float) if number is float else (int,)
    ok = isinstance(data, dict) and all(
        isinstance(row, list)
        and all(isinstance(value, kinds) and not isinstance(value, bool) for value in row)
        for row in data.values()
    )
    if not ok:
        raise InputError(f"{name} must map group names to lists of {number.__name__}s")
    return {key: tuple(number(value) for value in row) for key, row in data.items()}
