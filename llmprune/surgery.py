"""cut(model, plan): slice weights, drop layers, build the model of the new shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.architectures import PER_LAYER_PREFIX
from llmprune.architectures.table import Axis, parse_axes
from llmprune.compensation import UnitMeans, compensated_biases
from llmprune.cut_config import ExportFormat, per_layer_config, uniform_config
from llmprune.plan import KeptLayer, PrunePlan
from llmprune.units import ParameterAxes, UnitMap, Widths, map_units

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def cut(
    model: PreTrainedModel,
    plan: PrunePlan,
    *,
    form: ExportFormat = "uniform",
    means: UnitMeans | None = None,
) -> PreTrainedModel:
    """A plain Hugging Face model that computes what `model` computes with the plan's units gone.

    Args:
        model: The dense model, ungated; it is left as it is.
        plan: Made for this model; its scales are folded into the weights.
        form: `uniform` gives a stock class; `per_layer` one of `llmprune.modeling_pruned`.
        means: Mean activations that removed units leave behind as a bias, or None for nothing.

    Raises:
        InputError: The plan is not for this model, or `form` can't express its shape; the message
            names the form that can.
    """
    unit_map = map_units(model)
    plan.validate(unit_map)
    widths = plan.widths(unit_map)
    biased = means is not None
    if form == "uniform":
        config = uniform_config(model.config, unit_map, widths, biased=biased)
    else:
        config = per_layer_config(model.config, unit_map, widths, biased=biased)
    state = dict(_sliced_parameters(model, unit_map, plan, widths))
    if means is not None:
        state |= _biases(model, unit_map, plan, means, all_kinds=form == "uniform")
    return build_model(config, state, model)


def build_model(
    config: PretrainedConfig, state: dict[str, Tensor], dense: PreTrainedModel
) -> PreTrainedModel:
    """A model of `config` that holds the weights `state`; the rest is as `dense` has it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from llmprune.modeling_pruned import CLASSES

    family = config.model_type
    if family.startswith(PER_LAYER_PREFIX):
        model_class: Any = CLASSES[family.removeprefix(PER_LAYER_PREFIX)][2]
    else:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.dtype = dense.dtype
    device = dense.device
    built, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dense.dtype, output_loading_info=True
    )
    missing = {name for name in info["missing_keys"] if name not in built.all_tied_weights_keys}
    assert not missing, f"the cut left out {missing}"
    assert not info["unexpected_keys"], f"the cut wrote {info['unexpected_keys']}"
    built.config.architectures = [model_class.__name__]
    if dense.generation_config is not None:
        built.generation_config = dense.generation_config
    built.name_or_path = dense.name_or_path
    return built.to(device).eval()


def _sliced_parameters(
    model: PreTrainedModel, unit_map: UnitMap, plan: PrunePlan, widths: Widths
) -> Iterator[tuple[str, Tensor]]:
    values = dict(model.named_parameters())
    position = {old: new for new, old in enumerate(_kept_layers(widths))}
    slices = CutSlices(unit_map, plan)
    for parameter in unit_map.parameters:
        if unit_map.shape_under(parameter, widths) is None:
            continue
        value = slices.of(parameter, values[parameter.name].detach())
        yield _renamed(unit_map, parameter, position), value.contiguous().clone()


class CutSlices:
    """Parameters of the dense model on what a plan keeps, times the factors that it folds in.

    With `whole_hidden` the axis of hidden channels stays whole: for what reads the residual stream.
    """

    def __init__(self, unit_map: UnitMap, plan: PrunePlan, *, whole_hidden: bool = False) -> None:
        self.unit_map = unit_map
        self.plan = plan
        self.factors = _Factors(unit_map, plan, plan.widths(unit_map))
        group = unit_map.groups["hidden_channels"]
        self.hidden = tuple(range(group.num_units)) if whole_hidden else plan.kept_in(group)

    def of(self, parameter: ParameterAxes, value: Tensor) -> Tensor:
        """A parameter of a layer that stays, or of none, given its value in the dense model."""
        unit_map = self.unit_map
        layer = None
        if parameter.layer is not None:
            layer = self.plan.kept_layer(unit_map, parameter.layer)
        for dim, axis in enumerate(parameter.axes):
            index = _axis_index(unit_map, parameter, axis, layer, self.hidden)
            if index is not None and len(index) < value.shape[dim]:
                value = value.index_select(dim, index.to(value.device))
        return self.factors.apply(parameter, value)


def _biases(
    model: PreTrainedModel,
    unit_map: UnitMap,
    plan: PrunePlan,
    means: UnitMeans,
    *,
    all_kinds: bool,
) -> dict[str, Tensor]:
    """Biases that hold the means of what is gone; with `all_kinds` zeros for the other new ones."""
    architecture = unit_map.architecture
    widths = plan.widths(unit_map)
    position = {old: new for new, old in enumerate(_kept_layers(widths))}
    hidden = torch.tensor(plan.kept_in(unit_map.groups["hidden_channels"]))
    scale = torch.tensor(plan.scale.get("hidden_channels", (1.0,)), dtype=torch.float64)
    found: dict[str, Tensor] = {}
    if all_kinds and architecture.bias_keys:
        new = set(architecture.layer_weights) - {
            p.name.removeprefix(f"{architecture.layers}.{p.layer}.") for p in unit_map.parameters
        }
        for local in sorted(name for name in new if name.endswith(".bias")):
            for old in position:
                axes = parse_axes(architecture.layer_weights[local])
                size = unit_map.axis_size(axes[0], old, widths)
                found[f"{architecture.layers}.{position[old]}.{local}"] = torch.zeros(
                    size, dtype=model.dtype
                )
    for (layer, branch), bias in compensated_biases(model, unit_map, plan, means).items():
        write = getattr(architecture, branch).write
        name = f"{architecture.layers}.{position[layer]}.{write}.bias"
        kept = bias[hidden.to(bias.device)] * scale.to(bias.device)
        found[name] = kept.to(model.dtype).contiguous()
    return found


def _kept_layers(widths: Widths) -> list[int]:
    return [index for index, layer in enumerate(widths.layers) if layer is not None]


def _renamed(unit_map: UnitMap, parameter: ParameterAxes, position: dict[int, int]) -> str:
    if parameter.layer is None:
        return parameter.name
    prefix = unit_map.architecture.layers
    old, new = f"{prefix}.{parameter.layer}.", f"{prefix}.{position[parameter.layer]}."
    return new + parameter.name.removeprefix(old)


def _axis_index(
    unit_map: UnitMap,
    parameter: ParameterAxes,
    axis: Axis,
    layer: KeptLayer | None,
    hidden: tuple[int, ...],
) -> Tensor | None:
    """Kept positions along one axis, shape (kept,), int64; None for an axis that is never cut."""
    offset, parts = 0, []
    for space in axis:
        if space == "hidden":
            return torch.tensor(hidden)
        if space not in ("query", "key_value", "mlp"):
            return None
        assert layer is not None
        if space == "mlp":
            index = torch.tensor(layer.mlp_channels)
        else:
            heads = layer.heads if space == "query" else layer.kv_heads
            index = expand_units(torch.tensor(heads), unit_map.head_dim)
        parts.append(index + offset)
        offset += unit_map.space_size(space, parameter.layer, unit_map.dense)
    return torch.cat(parts)


def expand_units(units: Tensor, width: int) -> Tensor:
    """Positions that units of `width` cover: (n,) -> (n * width,), int64."""
    return (units[:, None] * width + torch.arange(width)).reshape(-1)


class _Factors:
    """What kept weights are multiplied by: folded gates, and the scale of a cut RMS norm."""

    def __init__(self, unit_map: UnitMap, plan: PrunePlan, widths: Widths) -> None:
        self.unit_map = unit_map
        self.plan = plan
        self.architecture = unit_map.architecture
        rms = self.architecture.norm_kind == "rms"
        # mean over H' channels = mean over H with the others zero, times H / H'
        ratio = unit_map.dense.hidden_size / widths.hidden_size
        self.norm_scale = math.sqrt(ratio) if rms else 1.0

    def apply(self, parameter: ParameterAxes, value: Tensor) -> Tensor:
        """`value` (already sliced) times every factor that concerns it, in its own dtype."""
        scaled = value.double()
        for dim, factor in self._factors(parameter):
            shape = [1] * value.dim()
            shape[dim] = -1
            scaled = scaled * torch.tensor(factor, dtype=torch.float64).to(value.device).view(shape)
        return scaled.to(value.dtype)

    def _factors(self, parameter: ParameterAxes) -> Iterator[tuple[int, tuple[float, ...]]]:
        module, _, _ = parameter.name.rpartition(".")
        norms = {self.architecture.final_norm}
        if parameter.layer is None:
            if module in self.architecture.embeddings:
                yield from self._hidden(parameter)
            if module in norms:
                yield 0, (self.norm_scale,)
                if self.unit_map.tied_head:
                    yield from ((d, tuple(1 / f for f in fs)) for d, fs in self._hidden(parameter))
            return
        local = module.removeprefix(f"{self.architecture.layers}.{parameter.layer}.")
        if local in (self.architecture.attention.norm, self.architecture.mlp.norm):
            yield 0, (self.norm_scale,)
        if local in self.architecture.qk_normed:
            yield 0, (self.norm_scale,)
        for branch in ("attention", "mlp"):
            if local == getattr(self.architecture, branch).write:
                yield from self._write(parameter, branch)

    def _hidden(self, parameter: ParameterAxes) -> Iterator[tuple[int, tuple[float, ...]]]:
        if "hidden_channels" in self.plan.scale:
            yield parameter.axes.index(("hidden",)), self.plan.scale["hidden_channels"]

    def _write(
        self, parameter: ParameterAxes, branch: str
    ) -> Iterator[tuple[int, tuple[float, ...]]]:
        yield from self._hidden(parameter)
        for kind in (f"{branch}_sublayers", "layers"):
            if kind in self.plan.scale:
                kept = self.plan.kept[kind]
                assert parameter.layer is not None
                yield 0, (self.plan.scale[kind][kept.index(parameter.layer)],)
        read = ("query",) if branch == "attention" else ("mlp",)
        if read not in parameter.axes:
            return
        dim = parameter.axes.index(read)
        kinds = ("heads", "kv_groups") if branch == "attention" else ("mlp_channels",)
        for kind in kinds:
            factors = self._per_position(parameter, kind)
            if factors is not None:
                yield dim, factors

    def _per_position(self, parameter: ParameterAxes, kind: str) -> tuple[float, ...] | None:
        assert parameter.layer is not None
        name = f"layers.{parameter.layer}.{kind}"
        if name not in self.plan.scale:
            return None
        factor = dict(zip(self.plan.kept[name], self.plan.scale[name], strict=True))
        if kind == "mlp_channels":
            return tuple(factor.values())
        layer = self.unit_map.layer(parameter.layer)
        kept = self.plan.kept_layer(self.unit_map, parameter.layer)
        assert kept is not None
        per_group = layer.num_attention_heads // layer.num_key_value_heads
        units = kept.heads if kind == "heads" else tuple(head // per_group for head in kept.heads)
        return tuple(factor[unit] for unit in units for _ in range(self.unit_map.head_dim))
