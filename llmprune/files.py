"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from llmprune.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the temporary name that is given; it takes `path`'s place when the block ends well.

    Raises:
        InputError: The disk is full or the place can't be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path.name}: could not be written ({_reason(error)}); make room or choose "
            "another --out, then --resume"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_text(text: str, path: Path) -> None:
    """Write a text file at once or not at all; errors as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, note: dict[str, str]) -> None:
    """Write a safetensors file with metadata at once or not at all; errors as `replacing`."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=note)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
