"""save_pruned and load_pruned: a folder that stock transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from llmprune.architectures import PER_LAYER_PREFIX
from llmprune.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmprune.weight_blocks import BlockPlan

# Where a run folder keeps its model.
MODEL_FOLDER = "model"


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    blocks: BlockPlan | None = None,
) -> None:
    """Write weights (safetensors), config, generation config and tokenizer, all or nothing.

    A model whose layers differ takes its modeling file along, so that stock transformers loads it
    with `trust_remote_code=True`; one whose weight blocks were pruned the index of `blocks`.

    Raises:
        InputError: The disk is full or the place can't be written; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if model.config.model_type.startswith(PER_LAYER_PREFIX):
            from llmprune import modeling_pruned

            source = Path(modeling_pruned.__file__)
            shutil.copy(source, temporary / source.name)
        if blocks is not None:
            from llmprune.block_sparse import save_block_index

            save_block_index(blocks, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder.name}: could not be written ({error}); make room or choose another --out, "
            "then --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_pruned(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    block_sparse: bool = False,
) -> PreTrainedModel:
    """Load what `prune` wrote, in eval mode; no remote code is run.

    Args:
        source: A run folder, a model folder or a Hub id.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights; `auto` takes the saved one.
        block_sparse: Put `llmprune_kernels.BlockSparseLinear` in the place of the projections whose
            weight blocks were pruned; without it they are dense, with zeros.

    Raises:
        InputError: There is no model there, it can't be fetched, its weights are damaged, or
            `block_sparse` is asked of one that no weight blocks were pruned from.
    """
    from transformers import AutoModelForCausalLM

    from llmprune.recipe import ModelSource
    from llmprune.sources import fetch

    register_classes()
    folder, name = model_folder(source), None
    if not Path(source).expanduser().exists():
        found = fetch(ModelSource(source=str(source), revision=revision))
        folder, name = found.folder, found.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except SafetensorError as error:
        raise InputError(
            f"{source}: the weights are damaged ({error}); run the command again"
        ) from error
    except OSError as error:
        raise InputError(f"{source}: holds no model ({' '.join(str(error).split())})") from error
    model.eval()
    if block_sparse:
        _swap_in_blocks(model, str(folder if name is None else name), revision)
    if name is not None:
        # the cache's folder is of no interest to whoever saves it again
        model.name_or_path = model.config.name_or_path = name
    return model.eval()


def load_block_sparse(folder: str | Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """`load_pruned` with its block-sparse layers."""
    return load_pruned(folder, dtype=dtype, block_sparse=True)


def has_blocks(folder: Path) -> bool:
    """Whether weight blocks were pruned from the model of a folder."""
    from llmprune.block_sparse import INDEX_FILE

    return (Path(model_folder(folder)) / INDEX_FILE).is_file()


def _swap_in_blocks(model: PreTrainedModel, source: str, revision: str | None) -> None:
    from transformers.utils import cached_file

    from llmprune.block_sparse import (
        INDEX_FILE,
        keep_faster,
        make_block_sparse,
        read_block_index,
    )

    try:
        file = cached_file(source, INDEX_FILE.as_posix(), revision=revision)
    except OSError as error:
        raise InputError(
            f"{source}: block_sparse needs a model that weight blocks were pruned from, there is "
            f"no {INDEX_FILE}; load it without"
        ) from error
    make_block_sparse(model, *read_block_index(Path(file)), just_loaded=True)
    keep_faster(model)


def model_folder(source: str | Path) -> str | Path:
    """The folder of the model inside a run folder; other sources are given back as they are."""
    inside = Path(source) / MODEL_FOLDER
    return inside if (inside / "config.json").is_file() else source


def register_classes() -> None:
    """Make transformers' Auto classes know the models whose layers differ."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from llmprune.modeling_pruned import CLASSES

    for config_class, model_class, lm_class in CLASSES.values():
        kind: Any = config_class
        AutoConfig.register(kind.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, lm_class, exist_ok=True)


def load_weights(model: PreTrainedModel, file: Path) -> None:
    """Copy weights from a safetensors file into a model of the same shape, in place.

    Raises:
        InputError: The file is damaged or another model's.
    """
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(file), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{file.name}: must hold this model's weights ({' '.join(str(error).split())}); "
            "delete it and scores.json, then --resume"
        ) from error


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights in place; buffers (rotary frequencies) stay as precise as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
