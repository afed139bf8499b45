"""Local rows of evaluation tasks: .jsonl or .jsonl.gz files in a folder that --data names."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class DataFile:
    """The rows of one split; `name` is its path inside the folder of data."""

    name: str
    rows: tuple[Row, ...]
    sha256: str

    @staticmethod
    def read(path: Path, columns: Sequence[str], folder: Path) -> DataFile:
        """Read a file of JSON objects, one a line.

        Raises:
            InputError: The file is damaged, empty, or a row lacks one of `columns`.
        """
        name = str(path.relative_to(folder))
        try:
            content = path.read_bytes()
            text = gzip.decompress(content) if path.suffix == ".gz" else content
            # not splitlines(): JSON may hold U+2028, which is no end of a line there
            lines = enumerate(text.decode("utf-8").split("\n"), 1)
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{name}: must be readable JSON lines, got: {error}") from error
        rows = tuple(_row(line, f"{name}: line {i}", columns) for i, line in lines if line.strip())
        if not rows:
            raise InputError(f"{name}: must have at least one row, got an empty file")
        return DataFile(name, rows, hashlib.sha256(content).hexdigest())


def find_file(folder: Path, stem: str, *, is_needed: bool) -> Path | None:
    """`stem`.jsonl or .jsonl.gz in the folder; None where it isn't there.

    Raises:
        InputError: It isn't there and is needed.
    """
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    if is_needed:
        raise InputError(
            f"--data: must hold {stem}.jsonl or {stem}.jsonl.gz, found neither in {folder}; leave "
            "the task out with --tasks, or leave --data out to take it from the Hub"
        )
    return None


def split_rows(
    rows: Sequence[Row], column: str | None, convert: Callable[[Row], Row] | None
) -> dict[str, list[Row]]:
    """Rows by what stands in `column`, each converted; all under "" where `column` is None."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        key = "" if column is None else str(row[column])
        parts.setdefault(key, []).append(row if convert is None else convert(row))
    return parts


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSON lines; gives the path."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def _row(line: str, where: str, columns: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} must be one JSON object, got: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} must be one JSON object, got a {type(row).__name__}")
    missing = [column for column in columns if column not in row]
    if missing:
        got = ", ".join(sorted(row))
        raise InputError(f"{where} must have {missing[0]!r}, got the columns {got}")
    return row
