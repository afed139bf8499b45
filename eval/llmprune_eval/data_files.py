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


class MissingRowsError(InputError):
    """A task's rows are not in the folder of data; `stem` is the file without its ending."""

    def __init__(self, task: str, stem: str, folder: Path) -> None:
        super().__init__(
            f"{task}: --data must hold {stem}.jsonl or {stem}.jsonl.gz, found neither in {folder}; "
            "leave the task out with --tasks, or leave --data out to take it from the Hub"
        )
        self.task, self.stem, self.folder = task, stem, folder


def find_file(folder: Path, stem: str) -> Path | None:
    """`stem`.jsonl or .jsonl.gz in the folder; None where it isn't there."""
    files = [folder / f"{stem}{ending}" for ending in (".jsonl", ".jsonl.gz")]
    return next((file for file in files if file.is_file()), None)


def all_missing(missing: Sequence[MissingRowsError], found: Sequence[str]) -> InputError:
    """One error for all tasks without rows; `found` are the tasks that have theirs."""
    if len(missing) == 1:
        return missing[0]
    tasks = ", ".join(f"{error.task} ({error.stem})" for error in missing)
    advice = f"leave them out with --tasks {','.join(found)}, or " if found else ""
    return InputError(
        f"--data must hold the rows of every task, as .jsonl or .jsonl.gz; {missing[0].folder} has "
        f"none of {tasks}; {advice}leave --data out to take all from the Hub"
    )


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
