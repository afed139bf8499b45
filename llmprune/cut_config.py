"""The config of a cut shape: of a stock class, or of one whose layers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llmprune.architectures import Architecture
from llmprune.errors import InputError
from llmprune.units import LayerWidths, UnitMap, Widths

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ExportFormat = Literal["uniform", "per_layer"]


class UnfitError(InputError):
    """No stock class has a shape; `reason` says why, the message also what to do about a plan."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"export.format uniform can't express this plan: {reason}; "
            "use export.format: per_layer, or prune other kinds"
        )


def check_form(
    model: PreTrainedModel,
    unit_map: UnitMap,
    widths: Widths,
    form: ExportFormat,
    *,
    biased: bool = False,
) -> None:
    """Refuse, before any work is done, a shape that an export form can't express.

    Raises:
        InputError: As `cut`.
    """
    if form == "uniform":
        uniform_config(model.config, unit_map, widths, biased=biased)
    else:
        per_layer_config(model.config, unit_map, widths, biased=biased)


def uniform_config(
    config: Any, unit_map: UnitMap, widths: Widths, *, biased: bool = False
) -> PretrainedConfig:
    """The stock config of a cut shape, `biased` with a bias on what writes to the stream.

    Raises:
        UnfitError: No stock class has this shape: layers differ, lack a sublayer, the family
            ties head_dim to the hidden size, or has no such bias.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    architecture = unit_map.architecture
    _refuse_differing(unit_map, widths)
    data = _config_data(config, unit_map, widths)
    # the key of a class whose layers differ, which a stock one shows by its own bias keys
    data.pop("write_bias", None)
    data.update(_layer_data(architecture, widths.kept_layers[0]))
    if architecture.head_dim_free:
        data["head_dim"] = unit_map.head_dim
    family = _switch_biases_on(data, architecture) if biased else architecture.family
    try:
        return AutoConfig.for_model(family, **data)
    except (ValueError, StrictDataclassError) as error:
        refusal = " ".join(str(error).split())
    if architecture.stands_in is None:
        raise UnfitError(f"{family}'s config refuses it ({refusal})")
    family, must_be_off = architecture.stands_in
    switched_on = [key for key in must_be_off if data.pop(key, None)]
    if switched_on:
        reason = f"{architecture.family}'s config refuses it and {family} has no {switched_on[0]}"
        raise UnfitError(reason)
    data.pop("pretraining_tp", None)
    return AutoConfig.for_model(family, sliding_window=None, **data)


def _switch_biases_on(data: dict[str, Any], architecture: Architecture) -> str:
    """The family whose stock class has biases; `data` becomes its config's values, in place."""
    reason = (
        f"no stock class computes {architecture.family} with a bias on what writes to the stream"
    )
    if architecture.biased_as is None:
        raise UnfitError(f"{reason} (compensation: mean)")
    family, must_be_off = architecture.biased_as
    switched_on = [key for key in must_be_off if data.get(key)]
    if switched_on:
        raise UnfitError(f"{reason} and {switched_on[0]} (compensation: mean)")
    data.update(dict.fromkeys(architecture.bias_keys, True))
    if family != architecture.family:
        for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            data.pop(key, None)
    return family


def per_layer_config(
    config: Any, unit_map: UnitMap, widths: Widths, *, biased: bool = False
) -> PretrainedConfig:
    """The config of `llmprune.modeling_pruned` for a cut shape.

    Raises:
        InputError: A layer without attention in a model that mixes attention types.
    """
    from llmprune.modeling_pruned import CLASSES

    architecture = unit_map.architecture
    data = _config_data(config, unit_map, widths)
    data["head_dim"] = unit_map.head_dim
    if biased:
        data["write_bias"] = True
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
            raise UnfitError(f"a layer has lost its {branch}")
    if len(set(layers)) > 1:
        raise UnfitError("its layers differ in width")
    query = layers[0].num_attention_heads * unit_map.head_dim
    if not architecture.head_dim_free and query != widths.hidden_size:
        raise UnfitError(
            f"a stock {architecture.family} derives head_dim as hidden_size / heads "
            f"({widths.hidden_size} / {layers[0].num_attention_heads}), "
            f"which is not {unit_map.head_dim}"
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
