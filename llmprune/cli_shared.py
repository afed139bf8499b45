"""What the commands share: the screen, the arguments that several take, warnings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from llmprune.recipe import Recipe

console = Console()

ModelArgument = Annotated[
    str, typer.Argument(help="Hub id, folder, GGUF file, or pypi:NAME==VERSION/PATH.gguf")
]
FolderArgument = Annotated[Path, typer.Argument(help="A folder that prune wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def quieten_transformers() -> None:
    """Leave the screen to this program's own progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def warn(warnings: tuple[str, ...]) -> None:
    """Say warnings loudly, on stderr."""
    loud = Console(stderr=True)
    for warning in warnings:
        loud.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run's folder; an InputError where it is none."""
    from llmprune.run_folder import RunFolder

    return RunFolder(folder).read_recipe()
