"""Where a text comes from: a built-in one, a local file, a Hub data set."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import IO, Any, TypeVar

from llmprune.downloads import UnreachableError, ask_hub, looks_like_path, one_line
from llmprune.errors import InputError
from llmprune.recipe import Calibration, TextSource

logger = logging.getLogger("llmprune")

TEXT_SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".gz", ".parquet")
PYTHON_REFERENCE = "builtin:python-reference"
# Rows that the dense model writes itself: to calibrate on, not to measure on.
SELF_GENERATED = "builtin:self-generated"

_CORPORA = (
    (re.compile(r"wiki-?text|(^|[^a-z])wiki[._-](train|test|valid)"), "wikitext"),
    (re.compile(r"(^|[^a-z0-9])m?c4([^a-z0-9]|$)"), "c4"),
    (re.compile(r"(^|[^a-z])ptb([^a-z]|$)|penn[._ -]?treebank"), "ptb"),
    (re.compile(r"python-reference"), "python-reference"),
)
_SPLIT_WORD = re.compile(r"(^|[._-])(train|training|test|valid|validation|val|dev|eval)(?=[._-]|$)")
# (data set, split) whose fallback has been told of.
_told: set[tuple[str, str]] = set()

Text = TypeVar("Text", bound=TextSource)


def resolve_text(text: Text) -> Text:
    """The source to read: `text`, or its fallback where `text` is a Hub data set out of reach.

    Of a built-in fallback the split is `test` where `text` asks for `test` or `validation`, else
    `train`. The fallback is logged, once for a data set and split.

    Raises:
        InputError: The Hub answered no (the fallback is then not taken), or the fallback is
            neither a local file nor built in.
    """
    if text.fallback is None or not _is_on_hub(text.dataset):
        return text
    try:
        check_reachable(text)
    except UnreachableError as error:
        other = _fallback_of(text, text.fallback)
        if (text.dataset, text.split) not in _told:
            _told.add((text.dataset, text.split))
            logger.warning("%s: %s; using %s instead", text_name(text), error, text_name(other))
        return other
    return text


def num_self_generated(calibration: Calibration) -> int:
    """Rows that the dense model writes itself; `calibration` is what `resolve_text` gave.

    Raises:
        InputError: The share leaves the data set no row.
    """
    if calibration.dataset == SELF_GENERATED:
        return calibration.num_rows
    share = calibration.self_generated or 0.0
    own = round(share * calibration.num_rows)
    if own == calibration.num_rows:
        raise InputError(
            f"calibration.self_generated must leave the data set a row, got {share:g} of "
            f"{calibration.num_rows} rows; lower it, or take dataset: {SELF_GENERATED}"
        )
    return own


def read_texts(text: TextSource) -> list[str]:
    """The documents of a text source, in order.

    A plain text file is one document, unchanged: published figures of small models score
    wiki.test.raw as one string. A table gives one document a row, empty rows included: "\\n\\n"
    between the rows of the wikitext data set makes the string that GPTQ and Wanda score. The two
    strings differ, and so do their perplexities.

    Raises:
        InputError: The source doesn't exist or can't be read, lacks `text.column`, or is blank.
    """
    path = Path(text.dataset).expanduser()
    if text.dataset == PYTHON_REFERENCE:
        rows = _python_reference(text.split)
    elif text.dataset.startswith("builtin:"):
        raise InputError(
            f"a builtin text must be {PYTHON_REFERENCE} (or, to calibrate on, "
            f"{SELF_GENERATED}), got {text.dataset}"
        )
    elif path.is_file():
        rows = _read_text_file(path, text)
    elif _is_file(text.dataset):
        raise InputError(f"{text.dataset}: no such text file; check the path")
    else:
        rows = _read_hub_texts(text)
    if not any(row.strip() for row in rows):
        raise InputError(f"{text_name(text)}: a text must hold words, got only blank ones")
    return rows


def text_name(text: TextSource) -> str:
    """A name for tables: file name, or id/config/split; never a path on this machine."""
    if text.dataset.startswith("builtin:"):
        return f"{text.dataset.removeprefix('builtin:')}/{text.split}"
    if _is_file(text.dataset):
        return Path(text.dataset).name
    return "/".join(part for part in (text.dataset, text.config, text.split) if part)


def calibration_name(calibration: Calibration) -> str:
    """The data set's name, and the share of the rows that the dense model wrote, if any."""
    name = text_name(calibration)
    share = calibration.self_generated
    if share is None or calibration.dataset == SELF_GENERATED:
        return name
    kind = {
        "text": "",
        "conversations": ", as conversations",
        "both": ", half of them conversations",
    }
    said = kind[calibration.self_generated_as or "text"]
    return f"{name} ({share:.0%} of the rows self-generated{said})"


def corpus_of(text: TextSource) -> str:
    """The corpus a text belongs to, whatever its split: equal names mean that a text may leak."""
    path = Path(text.dataset)
    is_file = _is_file(text.dataset)
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


def _is_file(dataset: str) -> bool:
    return Path(dataset).expanduser().exists() or looks_like_path(dataset, TEXT_SUFFIXES)


def _is_on_hub(dataset: str) -> bool:
    return not dataset.startswith("builtin:") and not _is_file(dataset)


def _fallback_of(text: Text, fallback: str) -> Text:
    built_in = [PYTHON_REFERENCE, *([SELF_GENERATED] if isinstance(text, Calibration) else [])]
    if fallback not in built_in and not Path(fallback).expanduser().is_file():
        raise InputError(
            f"{text_name(text)}: fallback must be a local file or {' or '.join(built_in)}, got "
            f"{fallback}; check the path"
        )
    # The Hub also takes a slice of a split, as in test[:10%].
    is_held_out = text.split.partition("[")[0] in ("test", "validation")
    split = "test" if is_held_out else "train"
    changes = {"dataset": fallback, "config": None, "split": split, "fallback": None}
    return text.model_copy(update=changes)


def _python_reference(split: str) -> list[str]:
    from pydoc_data.topics import topics

    keys = sorted(topics)
    held_out = keys[::10]
    parts = {"train": [key for key in keys if key not in held_out], "test": held_out}
    if split not in parts:
        raise InputError(f"{PYTHON_REFERENCE}: split must be train or test, got {split}")
    return [topics[key] for key in parts[split]]


def _read_text_file(path: Path, text: TextSource) -> list[str]:
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return _read_parquet(path, text)
        with _open_text(path) as file:
            if name.endswith((".jsonl", ".json")):
                return [_json_row(line, number, text) for number, line in enumerate(file, 1)]
            return [file.read()]
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{text.dataset}: not a readable UTF-8 text: {one_line(error)}") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _json_row(line: str, number: int, text: TextSource) -> str:
    where = f"{text.dataset}: line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} must be one JSON object, got: {one_line(error)}") from error
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
        raise InputError(f"{text.dataset}: not a parquet file: {one_line(error)}") from error
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
        check_reachable(text)
    except UnreachableError as error:
        raise InputError(
            f"{text_name(text)}: {error}; connect to the network, or name a local .txt, .jsonl or "
            f".parquet file, {PYTHON_REFERENCE} or a fallback"
        ) from error
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(text.dataset, text.config, split=text.split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{text_name(text)}: can't be read: {one_line(error)}") from error
    if text.column not in rows.column_names:
        raise _no_column(text.dataset, text.column, rows.column_names)
    return _strings(list(rows[text.column]), text)


def check_reachable(text: TextSource) -> None:
    """Check that a data set can be had; `load_dataset` alone takes half a minute to say no.

    Raises:
        InputError: The Hub answered no.
        UnreachableError: Neither the network nor the cache has it.
    """
    try:
        ask_hub(text.dataset, None, "dataset")
    except UnreachableError as error:
        if not _is_cached(text):
            raise UnreachableError(f"{error} and it is not in the cache") from error


def _is_cached(text: TextSource) -> bool:
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, name = text.dataset.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder /= "___".join([*owner, camelcase_to_snakecase(name)])
    # Kept by configuration, version and commit.
    return any(folder.glob(f"{text.config or '*'}/*/*/dataset_info.json"))
