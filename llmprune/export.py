"""export: a pruned model in a form that a server reads; the source folder stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmprune.architectures import PER_LAYER_PREFIX
from llmprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmprune.units import UnitMap

ServingFormat = Literal["uniform", "per_layer", "deci", "padded", "gguf"]
FileType = Literal["float32", "float16", "bfloat16"]
# What a model folder has beside weights, config and code.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
CHECK_LENGTH = 48


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder, or the GGUF file.
        architecture: The class in config.json, or llama.cpp's name of the architecture.
        parameters: Of the written model, a tied head counted once.
        source_parameters: Of the pruned model it was made from.
        size_bytes: On disk.
        max_abs_difference: Largest difference of logits from the source's in the most exact
            arithmetic that was used; None for the forms that transformers has no class for.
    """

    path: Path
    architecture: str
    parameters: int
    source_parameters: int
    size_bytes: int
    max_abs_difference: float | None


def export(
    source: Path, out: Path, form: ServingFormat, *, dtype: FileType | None = None
) -> Exported:
    """Write a pruned model in another form, all or nothing.

    Args:
        source: A run folder, or the folder of a pruned model; it stays as it is.
        out: New folder, for `gguf` a new file that ends in .gguf.
        form: `uniform` a stock class; `per_layer` a class of `llmprune.modeling_pruned`; `padded` a
            stock class of the widest layer's widths, zeros in between; `deci` the DeciLM layout;
            `gguf` a file for llama.cpp.
        dtype: Of the weights; None keeps the saved one.

    Raises:
        InputError: The form can't express the model (the message says why, before anything is
            written), the source holds no model, `out` exists, or the disk is full.
    """
    from llmprune.checkpoint import load_pruned, model_folder
    from llmprune.units import map_shape

    folder = Path(model_folder(source))
    _check_arguments(folder, out, form)
    model = load_pruned(folder)
    name = json.loads((folder / "config.json").read_text()).get("_name_or_path")
    name = name or source.resolve().name
    # not where it lies on this machine
    model.name_or_path = model.config.name_or_path = name
    if dtype is not None:
        _cast(model, dtype)
    shape = map_shape(model)
    if form == "gguf":
        return _export_gguf(model, shape, folder, out)
    if form == "deci":
        return _export_deci(model, shape, folder, out)
    built = _in_form(model, shape, form)
    difference = _difference(model, built)
    with _new_folder(folder, out) as temporary:
        built.save_pretrained(temporary)
        if built.config.model_type.startswith(PER_LAYER_PREFIX):
            from llmprune import modeling_pruned

            _copy_code(modeling_pruned.__file__, temporary)
    return Exported(
        path=out,
        architecture=type(built).__name__,
        parameters=built.num_parameters(),
        source_parameters=model.num_parameters(),
        size_bytes=_size(out),
        max_abs_difference=difference,
    )


def _check_arguments(folder: Path, out: Path, form: ServingFormat) -> None:
    if out.exists():
        raise InputError(f"{out}: OUT must be new, it exists; choose another")
    if form == "gguf" and out.suffix != ".gguf":
        raise InputError(f"{out}: with --format gguf OUT must end in .gguf")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: must be a run folder or a model folder, it holds no model")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder OUT goes into must exist, {out.parent} does not")


def _cast(model: PreTrainedModel, dtype: FileType) -> None:
    import torch

    from llmprune.checkpoint import cast_parameters

    wide = {name: parameter.isfinite().all() for name, parameter in model.named_parameters()}
    cast_parameters(model, getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if wide[name] and not parameter.isfinite().all():
            raise InputError(f"--dtype {dtype} can't hold {name}; use bfloat16 or float32")


def _in_form(model: PreTrainedModel, shape: UnitMap, form: str) -> PreTrainedModel:
    from llmprune.cut_config import per_layer_config
    from llmprune.padded import own_weights, pad_model, stock_config
    from llmprune.surgery import build_model

    if form == "padded":
        return pad_model(model, shape)
    if form == "uniform":
        layers = [shape.layer(index) for index in range(shape.num_layers)]
        config = stock_config(model, shape, layers, "uniform")
        return build_model(config, own_weights(model), model)
    if model.config.model_type.startswith(PER_LAYER_PREFIX):
        return model
    config = per_layer_config(model.config, shape, shape.dense)
    return build_model(config, own_weights(model), model)


def _difference(model: PreTrainedModel, built: PreTrainedModel) -> float:
    """Largest difference of logits on random tokens, in float64 where the model is small enough.

    Raises:
        InputError: The models compute different things.
    """
    import torch

    from llmprune.verification import FLOAT32_TOLERANCE, FLOAT64_PARAMETERS, TOLERANCE

    generator = torch.Generator().manual_seed(0)
    length = min(CHECK_LENGTH, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    small = built.num_parameters() < FLOAT64_PARAMETERS
    arithmetic = torch.float64 if small else torch.promote_types(model.dtype, torch.float32)
    expected = _logits_in(arithmetic, model, tokens)
    found = float((_logits_in(arithmetic, built, tokens) - expected).abs().max())
    limit = TOLERANCE
    if not small:
        limit = max(limit, FLOAT32_TOLERANCE * float(expected.abs().max()))
    # written so that a NaN fails
    if not found <= limit:
        raise InputError(
            f"the exported model must give the source's logits within {limit:g}, got {found:g}; "
            "nothing was written, please report this"
        )
    return found


def _logits_in(
    arithmetic: torch.dtype, model: PreTrainedModel, tokens: torch.Tensor
) -> torch.Tensor:
    """Logits in an arithmetic at least as wide as the weights, which come back unchanged."""
    import torch

    from llmprune.checkpoint import cast_parameters
    from llmprune.stock_logits import forward_logits

    saved = model.dtype
    cast_parameters(model, arithmetic)
    with torch.no_grad():
        logits = forward_logits(model, tokens)
    cast_parameters(model, saved)
    return logits


def _export_deci(model: PreTrainedModel, shape: UnitMap, folder: Path, out: Path) -> Exported:
    from safetensors.torch import save_file

    from llmprune import configuration_decilm
    from llmprune.deci import ARCHITECTURE, deci_config, deci_form, write_config

    form = deci_form(model, shape)
    config = deci_config(model.config, form)
    weights = {name: value.contiguous() for name, value in form.weights.items()}
    with _new_folder(folder, out) as temporary:
        temporary.mkdir()
        write_config(config, temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        _copy_code(configuration_decilm.__file__, temporary)
    return Exported(
        path=out,
        architecture=ARCHITECTURE,
        parameters=_count(weights.values()),
        source_parameters=model.num_parameters(),
        size_bytes=_size(out),
        max_abs_difference=None,
    )


def _export_gguf(model: PreTrainedModel, shape: UnitMap, folder: Path, out: Path) -> Exported:
    from llmprune.files import replacing
    from llmprune.gguf_file import ADVICE, gguf_model, write_gguf
    from llmprune.gguf_tokenizer import read_tokenizer

    held = gguf_model(model, shape)
    tokenizer = read_tokenizer(folder, model.config.vocab_size)
    dtype = str(model.dtype).removeprefix("torch.")
    kind: FileType = dtype if dtype in ("float16", "bfloat16") else "float32"  # type: ignore[assignment]
    with replacing(out, ADVICE) as temporary:
        write_gguf(model, held, tokenizer, temporary, dtype=kind, name=model.name_or_path)
    return Exported(
        path=out,
        architecture=held.architecture,
        parameters=_count(held.weights.values()),
        source_parameters=model.num_parameters(),
        size_bytes=_size(out),
        max_abs_difference=None,
    )


@contextmanager
def _new_folder(source: Path, out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out`, with the source's tokenizer in it."""
    from llmprune.files import replacing
    from llmprune.gguf_file import ADVICE

    with replacing(out, ADVICE) as temporary:
        yield temporary
        for pattern in TOKENIZER_FILES:
            for file in sorted(source.glob(pattern)):
                copy = shutil.copytree if file.is_dir() else shutil.copy
                copy(file, temporary / file.name)


def _copy_code(file: str | None, folder: Path) -> None:
    assert file is not None
    shutil.copy(file, folder / Path(file).name)


def _count(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _size(path: Path) -> int:
    from llmprune.checkpoint import folder_bytes

    return folder_bytes(path) if path.is_dir() else path.stat().st_size
