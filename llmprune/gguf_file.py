"""A GGUF file of a pruned model, for llama.cpp.

What its loader accepts was read in its source: `llama` and `deci` take biases on every projection
and a head_dim of their own; `deci` takes head counts and MLP widths layer by layer. Its `deci`
graph leaves a layer's attention out where the layer has no MLP, and its loader reads head_dim only
where the first layer has heads; both get a sublayer of zeros instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.gguf_tokenizer import GgufTokenizer
from llmprune.llama_form import READ_BIASES, LlamaForm, llama_form, widened
from llmprune.padded import own_weights
from llmprune.units import LayerWidths, UnitMap

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel

    from llmprune.export import FileType

ADVICE = "make room or choose another OUT, then run the command again"
# The rotary frequencies that a file's `rope_freqs` can express: fixed, and no scaled attention.
FIXED_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class GgufModel:
    """A model in GGUF terms.

    Attributes:
        architecture: llama.cpp's name.
        layers: Counts of every layer.
        weights: Hugging Face name -> value, of the shape and row order that llama.cpp reads.
        rope_factors: What every rotary frequency is divided by, shape (head_dim / 2,), or None.
    """

    architecture: str
    layers: tuple[LayerWidths, ...]
    weights: dict[str, Tensor]
    rope_factors: Tensor | None = None


def gguf_model(model: PreTrainedModel, shape: UnitMap) -> GgufModel:
    """Put a model into the terms of the llama.cpp architecture that can hold it.

    Raises:
        InputError: None can; the message says why.
    """
    family = shape.architecture.family
    layers = tuple(shape.layer(index) for index in range(shape.num_layers))
    if family in ("gpt2", "qwen3"):
        refusal = _why_not_stock(model.config, layers)
        if refusal is not None:
            raise InputError(
                f"--format gguf can't express this model: {refusal}; use --format padded first"
            )
        weights = own_weights(model)
        return GgufModel(family, layers, _transposed(weights) if family == "gpt2" else weights)
    factors = _rope_factors(model)
    try:
        form = llama_form(model, shape)
    except InputError as error:
        raise InputError(f"--format gguf can't express this model: {error}") from error
    if _is_stock_qwen2(family, form) and factors is None:
        return GgufModel("qwen2", layers, dict(form.weights))
    architecture = "llama" if form.uniform else "deci"
    form = widened(form, [_loadable(i, layer, form) for i, layer in enumerate(form.layers)])
    return GgufModel(architecture, form.layers, dict(_interleaved(form)), factors)


def write_gguf(
    model: PreTrainedModel,
    held: GgufModel,
    tokenizer: GgufTokenizer,
    path: Path,
    *,
    dtype: FileType,
    name: str,
) -> None:
    """Write the file at `path`, which must be free; the caller renames it.

    Raises:
        InputError: A weight is too large for float16.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, held.architecture)
    _add_numbers(writer, model.config, held)
    writer.add_name(name)
    tokenizer.write(writer)
    _add_weights(writer, held, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_numbers(writer: GGUFWriter, config: Any, held: GgufModel) -> None:
    layers = held.layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    columns = {
        "feed_forward_length": [layer.intermediate_size if layer.mlp else 0 for layer in layers],
        "head_count": [layer.num_attention_heads if layer.attention else 0 for layer in layers],
        "head_count_kv": [layer.num_key_value_heads if layer.attention else 0 for layer in layers],
    }
    for key, column in columns.items():
        add = getattr(writer, f"add_{key}")
        add(column if held.architecture == "deci" else column[0])
    if held.architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _add_weights(writer: GGUFWriter, held: GgufModel, dtype: FileType) -> None:
    import gguf

    architecture = next(
        key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == held.architecture
    )
    names = gguf.get_tensor_name_map(architecture, len(held.layers))
    file_types = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(file_types[dtype])
    for name, value in held.weights.items():
        stem, _, kind = name.rpartition(".")
        mapped = names.get_name(stem)
        assert mapped is not None, name
        # llama.cpp computes with norms, biases and positions in float32
        narrow = value.dim() > 1 and mapped != "position_embd"
        _add_tensor(writer, f"{mapped}.{kind}", value, dtype if narrow else "float32")
    if held.rope_factors is not None:
        _add_tensor(writer, "rope_freqs.weight", held.rope_factors, "float32")


def _add_tensor(writer: GGUFWriter, name: str, value: Tensor, dtype: FileType) -> None:
    import gguf

    array = value.to(torch.float32).contiguous().cpu().numpy()
    if dtype == "float32":
        writer.add_tensor(name, array)
    elif dtype == "float16":
        half = value.to(torch.float16).contiguous().cpu()
        if not bool(half.isfinite().all()):
            raise InputError(
                f"--dtype float16 can't hold {name} (largest {float(value.abs().max()):g}); "
                "use bfloat16 or float32"
            )
        writer.add_tensor(name, half.numpy())
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _loadable(index: int, layer: LayerWidths, form: LlamaForm) -> LayerWidths:
    """The layer with what llama.cpp can't do without."""
    if not layer.mlp:
        layer = replace(layer, mlp=True, intermediate_size=1)
    if index == 0 and not layer.attention:
        layer = replace(layer, attention=True, num_attention_heads=1, num_key_value_heads=1)
    return layer


def _interleaved(form: LlamaForm) -> dict[str, Tensor]:
    """The weights with the rows of q and k in pairs, as `llama` and `deci` rotate them."""
    found = dict(form.weights)
    for name, value in form.weights.items():
        module = name.rpartition(".")[0]
        if module.endswith(("q_proj", "k_proj")):
            halves = value.reshape(-1, 2, form.head_dim // 2, *value.shape[1:])
            found[name] = halves.transpose(1, 2).reshape(value.shape)
    return found


def _transposed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's Conv1D weights with their outputs first."""
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {n: value.T if n.endswith(projections) else value for n, value in weights.items()}


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What the plain rotary frequencies are divided by, shape (head_dim / 2,); None for nothing."""
    rope = model.config.rope_parameters
    kind = rope.get("rope_type", "of several kinds")
    if kind not in FIXED_ROPES:
        raise InputError(
            f"--format gguf can't express this model: rotary positions must be "
            f"{', '.join(FIXED_ROPES)}, they are {kind}; use --format padded and llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    if kind == "default":
        return None
    frequencies = model.get_submodule("model.rotary_emb").inv_freq.double()
    steps = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    return (rope["rope_theta"] ** -steps).to(frequencies.device) / frequencies


def _is_stock_qwen2(family: str, form: LlamaForm) -> bool:
    """Whether llama.cpp's own qwen2, which transformers reads back with its biases, holds it."""
    width = form.layers[0].num_attention_heads * form.head_dim
    others = {name for name in form.layer_names if name.endswith(".bias")} - set(READ_BIASES)
    return family == "qwen2" and form.uniform and width == form.hidden_size and not others


def _why_not_stock(config: Any, layers: tuple[LayerWidths, ...]) -> str | None:
    first, family = layers[0], config.model_type.removeprefix("pruned_")
    if not (first.attention and first.mlp) or any(layer != first for layer in layers):
        return f"llama.cpp's {family} has the same widths in all layers"
    if getattr(config, "write_bias", False) or getattr(config, "attention_bias", False):
        return f"llama.cpp's {family} has no biases of this kind"
    if family == "gpt2":
        if first.num_attention_heads * _gpt2_head_dim(config) != config.hidden_size:
            return "llama.cpp's gpt2 derives head_dim as hidden_size / heads"
        if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            return f"llama.cpp's gpt2 computes gelu_new, it has {config.activation_function}"
        if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            return "llama.cpp's gpt2 scales attention by head_dim alone"
        return None
    if config.hidden_act != "silu":
        return f"the activation must be silu, it is {config.hidden_act}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"llama.cpp's qwen3 has no sliding window, this model one of {window} tokens"
    if config.rope_parameters.get("rope_type") != "default":
        return "llama.cpp's qwen3 rotates positions in the plain way only"
    return None


def _gpt2_head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
