"""Subject: a model to evaluate, what it is called in tables, and its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmprune.checkpoint import MODEL_FOLDER, register_classes
from llmprune.errors import InputError
from llmprune.recipe import ModelSource, Recipe
from llmprune.run_folder import RECIPE_FILE, RunFolder
from llmprune.sources import LoadedModel, fetch, load_config, load_dense

Dtype = Literal["float32", "bfloat16", "float16"]
# What of a model folder decides its answers.
_PARTS = ("config.json", "*.safetensors", "tokenizer*", "*.model", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    `label` is dense, pruned, or model where it stands alone; `name` what it is called in notes, a
    Hub id or the name of a folder or file, never a path.
    """

    label: str
    source: ModelSource
    name: str

    def load(self) -> LoadedModel:
        """Load it with its tokenizer, on the GPU where there is one; errors as `load_dense`."""
        import torch

        register_classes()
        loaded = load_dense(self.source)
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return loaded

    def fingerprint(self) -> str:
        """A sha256 of weights, config, tokenizer and dtype.

        Raises:
            InputError: There is no such model.
        """
        resolved = fetch(self.source)
        files = {file for part in _PARTS for file in resolved.folder.glob(part)}
        if resolved.gguf_file is not None:
            files = {resolved.folder / resolved.gguf_file}
        digest = hashlib.sha256(self.source.dtype.encode())
        for file in sorted(files):
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def subjects_of(
    source: str, baseline: str | None, dtype: Dtype | None
) -> tuple[tuple[Subject, ...], Recipe | None]:
    """The models that `llmprune eval` compares, the dense one first, and the run's recipe.

    Args:
        source: A run folder (its dense model is the recipe's), or any model.
        baseline: The model to compare with, in place of the recipe's.
        dtype: Of all weights; None for the stored one, and for the recipe's of its dense model.

    Raises:
        InputError: There is no such model, or the run has none yet.
    """
    path = Path(source)
    recipe = RunFolder(path).read_recipe() if (path / RECIPE_FILE).is_file() else None
    if recipe is None and path.is_dir() and not (path / "config.json").is_file():
        raise InputError(
            f"{source}: must be a folder that prune wrote, or that of a model; got no "
            f"{RECIPE_FILE} and no config.json"
        )
    if recipe is not None and not (path / MODEL_FOLDER / "config.json").is_file():
        raise InputError(f"{source}: holds no model yet; finish it with llmprune prune --resume")
    own = source if recipe is None else str(path / MODEL_FOLDER)
    name = fetch(ModelSource(source=source)).name if recipe is None else path.resolve().name
    other = None if baseline is None else _stored(baseline, dtype)
    if other is None and recipe is not None:
        other = recipe.model if dtype is None else recipe.model.model_copy(update={"dtype": dtype})
    if other is None:
        return (Subject("model", _stored(own, dtype), name),), None
    dense = Subject("dense", other, fetch(other).name)
    return (dense, Subject("pruned", _stored(own, dtype), name)), recipe


def results_folder(source: str, subject: Subject) -> Path:
    """Where results go by default: eval/ in the folder of the run or model, else in runs/."""
    path = Path(source)
    if path.is_dir():
        return path / "eval"
    return Path("runs") / "eval" / subject.name.replace("/", "--").replace(":", "-")


def _stored(source: str, dtype: Dtype | None) -> ModelSource:
    """A model in the dtype asked for, else that of its weights."""
    model = ModelSource(source=source)
    if dtype is None:
        register_classes()
        found = str(getattr(load_config(model), "dtype", None)).removeprefix("torch.")
        dtype = next((known for known in ("bfloat16", "float16") if known == found), "float32")
    return model.model_copy(update={"dtype": dtype})
