"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from llmprune.errors import InputError

# What to do after a failed write, in a run.
RESUME = "make room or choose another --out, then --resume"


@contextmanager
def replacing(path: Path, advice: str = RESUME) -> Iterator[Path]:
    """Write to the temporary name that is given; it takes `path`'s place when the block ends well.

    The name may become a file or a folder; a folder takes the place only of nothing.

    Raises:
        InputError: The disk is full or the place can't be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise InputError(
            f"{path.name}: could not be written ({_reason(error)}); {advice}"
        ) from error
    except BaseException:
        _remove(temporary)
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


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
