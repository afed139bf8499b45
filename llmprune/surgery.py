"""cut(model, plan): slice weights, drop layers, fix the config."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmprune.architectures import PER_LAYER_PREFIX, Architecture
from llmprune.architectures.table import Axis
from llmprune.errors import InputError
from llmprune.plan import KeptLayer, PrunePlan
from llmprune.units import LayerWidths, ParameterAxes, UnitMap, Widths, map_units

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ExportFormat = Literal["uniform", "per_layer"]


def cut(
    model: PreTrainedModel, plan: PrunePlan, *, form: ExportFormat = "uniform"
) -> PreTrainedModel:
    """A plain Hugging Face model that computes what `model` computes with the plan's units gone.

    Args:
        model: The dense model, ungated; it is left as it is.
        plan: Made for this model; its scales are folded into the weights.
        form: `uniform` gives a stock class; `per_layer` one of `llmprune.modeling_pruned`.

    Raises:
        InputError: The plan is not for this model, or `form` can't express its shape; the message
            names the form that can.
    """
    unit_map = map_units(model)
    plan.validate(unit_map)
    widths = plan.widths(unit_map)
    if form == "uniform":
        config = uniform_config(model.config, unit_map, widths)
    else:
        config = per_layer_config(model.config, unit_map, widths)
    state = dict(_sliced_parameters(model, unit_map, plan, widths))
    return _build(config, state, model)


def check_form(
    model: PreTrainedModel, unit_map: UnitMap, widths: Widths, form: ExportFormat
) -> None:
    """Refuse, before any work is done, a shape that an export form can't express.

    Raises:
        InputError: As `cut`.
    """
    if form == "uniform":
        uniform_config(model.config, unit_map, widths)
    else:
        per_layer_config(model.config, unit_map, widths)


def uniform_config(config: Any, unit_map: UnitMap, widths: Widths) -> PretrainedConfig:
    """The stock config of a cut shape.

    Raises:
        InputError: No stock class has this shape: layers differ, lack a sublayer, or the family
            ties head_dim to the hidden size.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    architecture = unit_map.architecture
    _refuse_differing(unit_map, widths)
    data = _config_data(config, unit_map, widths)
    data.update(_layer_data(architecture, widths.kept_layers[0]))
    if architecture.head_dim_free:
        data["head_dim"] = unit_map.head_dim
    try:
        return AutoConfig.for_model(architecture.family, **data)
    except (ValueError, StrictDataclassError) as error:
        refusal = " ".join(str(error).split())
    if architecture.stands_in is None:
        raise InputError(_use_per_layer(f"{architecture.family}'s config refuses it ({refusal})"))
    family, must_be_off = architecture.stands_in
    switched_on = [key for key in must_be_off if data.pop(key, None)]
    if switched_on:
        reason = f"{architecture.family}'s config refuses it and {family} has no {switched_on[0]}"
        raise InputError(_use_per_layer(reason))
    data.pop("pretraining_tp", None)
    return AutoConfig.for_model(family, sliding_window=None, **data)


def per_layer_config(config: Any, unit_map: UnitMap, widths: Widths) -> PretrainedConfig:
    """The config of `llmprune.modeling_pruned` for a cut shape.

    Raises:
        InputError: A layer without attention in a model that mixes attention types.
    """
    from llmprune.modeling_pruned import CLASSES

    architecture = unit_map.architecture
    data = _config_data(config, unit_map, widths)
    data["head_dim"] = unit_map.head_dim
    layers = widths.kept_layers
    if len(set(data.get("layer_types") or ())) > 1 and not all(layer.attention for layer in layers):
        raise InputError(
            "attention_sublayers: can't be removed from a model that mixes layer_types "
            f"({', '.join(sorted(set(data['layer_types'])))}); remove whole layers instead"
        )
    shared = _layer_data(architecture, layers[0])
    data.update(shared)
    own: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        values = _layer_data(architecture, layer)
        different: dict[str, Any] = {
            key: value for key, value in values.items() if value != shared[key]
        }
        gone = [branch for branch in ("attention", "mlp") if not getattr(layer, branch)]
        if gone:
            different["skip"] = gone
        if different:
            own[index] = different
    config_class, model_class, lm_class = CLASSES[architecture.family]
    built = config_class(**data, per_layer_config=own or None)
    module = model_class.__module__.rpartition(".")[2]
    built.auto_map = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        "AutoModel": f"{module}.{model_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{lm_class.__name__}",
    }
    return built


def _refuse_differing(unit_map: UnitMap, widths: Widths) -> None:
    layers = widths.kept_layers
    architecture = unit_map.architecture
    for branch in ("attention", "mlp"):
        if not all(getattr(layer, branch) for layer in layers):
            raise InputError(_use_per_layer(f"a layer has lost its {branch}"))
    if len(set(layers)) > 1:
        raise InputError(_use_per_layer("its layers differ in width"))
    query = layers[0].num_attention_heads * unit_map.head_dim
    if not architecture.head_dim_free and query != widths.hidden_size:
        raise InputError(
            _use_per_layer(
                f"a stock {architecture.family} derives head_dim as hidden_size / heads "
                f"({widths.hidden_size} / {layers[0].num_attention_heads}), "
                f"which is not {unit_map.head_dim}"
            )
        )


def _use_per_layer(reason: str) -> str:
    return (
        f"export.format uniform can't express this plan: {reason}; "
        "use export.format: per_layer, or prune other kinds"
    )


def _config_data(config: Any, unit_map: UnitMap, widths: Widths) -> dict[str, Any]:
    """The dense config's values with all but the per-layer counts set for the cut shape."""
    architecture = unit_map.architecture
    data = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        data.pop(key, None)
    for key in ("per_layer_config", "head_dim", "quantization_config"):
        data.pop(key, None)
    kept = [index for index, layer in enumerate(widths.layers) if layer is not None]
    if data.get("scale_attn_by_inverse_layer_idx") and len(kept) < len(widths.layers):
        raise InputError(
            "layers: must all stay in a model with scale_attn_by_inverse_layer_idx, whose "
            "attention depends on a layer's number; prune other kinds"
        )
    data[architecture.config_key("hidden_size")] = widths.hidden_size
    data[architecture.config_key("num_hidden_layers")] = len(kept)
    if data.get("layer_types"):
        data["layer_types"] = [data["layer_types"][index] for index in kept]
    if data.get("max_window_layers") is not None:
        data["max_window_layers"] = sum(index < data["max_window_layers"] for index in kept)
    if architecture.norm_kind == "rms":
        ratio = unit_map.dense.hidden_size / widths.hidden_size
        data[architecture.norm_eps] = data[architecture.norm_eps] * ratio
    return data


def _layer_data(architecture: Architecture, layer: LayerWidths) -> dict[str, int]:
    data = {
        architecture.config_key("num_attention_heads"): layer.num_attention_heads,
        architecture.config_key("intermediate_size"): layer.intermediate_size,
    }
    if architecture.family != "gpt2":
        data["num_key_value_heads"] = layer.num_key_value_heads
    return data


def _build(
    config: PretrainedConfig, state: dict[str, Tensor], dense: PreTrainedModel
) -> PreTrainedModel:
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
    kept_layers = {index: plan.kept_layer(unit_map, index) for index in position}
    hidden = plan.kept_in(unit_map.groups["hidden_channels"])
    factors = _Factors(unit_map, plan, widths)
    for parameter in unit_map.parameters:
        if unit_map.shape_under(parameter, widths) is None:
            continue
        layer = None if parameter.layer is None else kept_layers[parameter.layer]
        value = values[parameter.name].detach()
        for dim, axis in enumerate(parameter.axes):
            index = _axis_index(unit_map, parameter, axis, layer, hidden)
            if index is not None and len(index) < value.shape[dim]:
                value = value.index_select(dim, index.to(value.device))
        value = factors.apply(parameter, value)
        yield _renamed(unit_map, parameter, position), value.contiguous().clone()


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
