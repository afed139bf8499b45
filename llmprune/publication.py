"""Publication: which files of a run go to the Hub, under which names, and what they must not say.

Nothing here talks to anybody or changes the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from llmprune.block_sparse import INDEX_FILE
from llmprune.checkpoint import MODEL_FOLDER
from llmprune.disclosure import local_name, refuse_secrets, without_paths
from llmprune.downloads import looks_like_path
from llmprune.errors import InputError
from llmprune.recipe import ModelSource, Recipe, TextSource
from llmprune.recipe_training import Tracking
from llmprune.run_folder import RECIPE_FILE, RunFolder
from llmprune.texts import TEXT_SUFFIXES
from llmprune.verification import RESULT_FILE, Verification, model_sha256, read_verification

# Files of the model's folder that go up; any other (optimizer states, caches) stays.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "modeling_pruned.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
)
# Words of a vocabulary are no paths, whatever they look like.
_VOCABULARIES = ("tokenizer.json", "added_tokens.json", "vocab.*", "merges.txt")
_BINARY = ("*.safetensors", "*.model")

# Where a repository keeps what is not the model itself.
RUN_FOLDER = "llmprune"
_NEEDED = ("plan.json", RESULT_FILE, "report.json")
# A run's scores choose for other budgets; beyond this the Hub would keep a text file as LFS.
BENCH_FILE = "bench.json"
EVALUATION_FILE = "eval/evaluation.json"
_OPTIONAL = (
    "report.html",
    "scores.json",
    "priors.json",
    "latency.json",
    BENCH_FILE,
    EVALUATION_FILE,
)
_OPTIONAL_BYTES = 10_000_000

Text = TypeVar("Text", bound=TextSource)


@dataclass(frozen=True)
class Upload:
    """A file that goes up: a file here as it is, or bytes that are published in its place."""

    path: str
    content: Path | bytes
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        is_file = isinstance(self.content, Path)
        return self.content.stat().st_size if is_file else len(self.content)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Publication:
    """A verified run that is ready to be published.

    Attributes:
        recipe: As it goes up: no path of this machine, the dense model at the commit that was used.
        verification: What the last verification found.
        dense_id: The dense model's id on the Hub, or None where it came from elsewhere.
        uploads: What goes up, the model card excepted.
        left_out: What the folder also holds and keeps.
    """

    recipe: Recipe
    verification: Verification
    dense_id: str | None
    uploads: tuple[Upload, ...]
    left_out: tuple[str, ...]


def read_publication(folder: Path, token: str | None = None) -> Publication:
    """Check a run's folder and collect what may be published of it.

    Args:
        folder: A folder that prune wrote.
        token: The user's, which no file may hold.

    Raises:
        InputError: The run is unfinished, unverified, failed its verification or was changed after
            it, or a file holds an access token.
    """
    run = RunFolder(folder)
    recipe = run.read_recipe()
    verification = read_verification(folder)
    check_unchanged(folder, verification)
    missing = [name for name in _NEEDED if not run.file(name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: must be a finished run, got no {missing[0]}; finish it with "
            f"`llmprune prune {run.file(RECIPE_FILE)} --out {folder} --resume`"
        )
    public = public_recipe(recipe, verification.dense_model)
    uploads = [
        *_model_uploads(run.model, verification),
        _recipe_upload(public, recipe),
        *(_text_upload(run.file(name), f"{RUN_FOLDER}/{name}") for name in _NEEDED),
        *(_text_upload(file, f"{RUN_FOLDER}/{file.name}") for file in _small_extras(run)),
    ]
    for upload in uploads:
        refuse_secrets(_readable(upload), upload.path, token)
    # the folder's README.md is written anew for the repository
    here = {Path(upload.path).name for upload in uploads} | {MODEL_FOLDER, "README.md"}
    others = list(_others(folder, here))
    known = {INDEX_FILE.parent.name}
    stray = [
        file
        for file in sorted(run.model.iterdir())
        if file.name not in known and not is_model_file(file.name)
    ]
    return Publication(
        public,
        verification,
        dense_id_of(recipe, verification.dense_model),
        tuple(uploads),
        (*(f"{MODEL_FOLDER}/{file.name}" for file in stray), *others),
    )


def _others(folder: Path, published: set[str]) -> Iterator[str]:
    """What a run's folder holds besides; of an evaluation that goes up its other files."""
    evaluation = folder / EVALUATION_FILE
    for file in sorted(folder.iterdir()):
        if file == evaluation.parent and evaluation.name in published:
            for part in sorted(file.iterdir()):
                if part.name not in published:
                    yield f"{file.name}/{part.name}"
        elif file.name not in published:
            yield file.name


def check_unchanged(folder: Path, verification: Verification) -> None:
    """Check that a run's model was verified, passed, and is still the one that was verified.

    Raises:
        InputError: It was not, did not, or is not.
    """
    again = f"run `llmprune verify {folder}`"
    if not verification.passed:
        raise InputError(f"{folder}: must have passed its verification, it failed; prune again")
    if not verification.sha256:
        raise InputError(
            f"{folder}: {RESULT_FILE} must name the files that were verified, got an older one "
            f"without; {again}"
        )
    found = model_sha256(folder / MODEL_FOLDER)
    changed = [n for n in found | verification.sha256 if found.get(n) != verification.sha256.get(n)]
    if changed:
        raise InputError(
            f"{folder}: must be as it was verified, {MODEL_FOLDER}/{changed[0]} has changed since; "
            f"{again}"
        )


def is_model_file(name: str) -> bool:
    """Whether a file of that name, at the root of a repository, is one that a push writes."""
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def public_recipe(recipe: Recipe, dense_model: str) -> Recipe:
    """The recipe with `local:NAME` for what is only on this machine, and the commit that was used.

    Args:
        recipe: Of the run.
        dense_model: Where the dense model came from, as the verification recorded it.
    """
    model = recipe.model
    dense_id = dense_id_of(recipe, dense_model)
    changes: dict[str, str | None] = {"source": model.source, "fallback": model.fallback}
    if dense_id is None and not model.source.startswith("pypi:"):
        changes["source"] = local_name(model.source)
    if model.fallback and _is_local(model.fallback, (".gguf",)):
        changes["fallback"] = local_name(model.fallback)
    if dense_id and dense_model.startswith(f"{dense_id}@"):
        changes["revision"] = dense_model.removeprefix(f"{dense_id}@")
    tasks = tuple(_public_text(task) for task in recipe.evaluation.perplexity)
    return recipe.model_copy(
        update={
            "model": model.model_copy(update=changes),
            "calibration": _public_text(recipe.calibration),
            "evaluation": recipe.evaluation.model_copy(update={"perplexity": tasks}),
            # whom to tell is for those who repeat the run to say
            "tracking": Tracking(),
        }
    )


def dense_id_of(recipe: Recipe, dense_model: str) -> str | None:
    """The dense model's id on the Hub; None where the recipe names none."""
    model: ModelSource = recipe.model
    if dense_model.startswith(f"{model.source}@"):
        return model.source
    # without a fallback, what did not come from the Hub was no id
    came_from_elsewhere = bool(dense_model) and model.fallback is None
    is_elsewhere = model.source.startswith("pypi:") or _is_local(model.source, (".gguf",))
    return None if came_from_elsewhere or is_elsewhere else model.source


def is_hub_dataset(text: TextSource) -> bool:
    """Whether a text of a public recipe is a data set on the Hub."""
    return not text.dataset.startswith(("builtin:", "local:"))


def local_parts(recipe: Recipe) -> list[str]:
    """Keys of a public recipe that name something that only the run's machine had."""
    texts = {"calibration.dataset": recipe.calibration.dataset}
    for index, task in enumerate(recipe.evaluation.perplexity):
        texts[f"evaluation.perplexity.{index}.dataset"] = task.dataset
    found = {"model.source": recipe.model.source, **texts}
    return [key for key, value in found.items() if value.startswith("local:")]


def _public_text(text: Text) -> Text:
    changes = {}
    for key in ("dataset", "fallback"):
        value = getattr(text, key)
        if value and not value.startswith("builtin:") and _is_local(value, TEXT_SUFFIXES):
            changes[key] = local_name(value)
    return text.model_copy(update=changes)


def _is_local(source: str, suffixes: tuple[str, ...]) -> bool:
    if source.startswith("pypi:"):
        return False
    return Path(source).expanduser().exists() or looks_like_path(source, suffixes)


def _recipe_upload(public: Recipe, recipe: Recipe) -> Upload:
    note, heading = "", ""
    if public.model.revision != recipe.model.revision:
        note = "names the commit of the dense model"
    if names := local_parts(public):
        note = "paths of this machine replaced"
        heading = f"# local:NAME was on the machine of the run; give your own: {', '.join(names)}\n"
    text = heading + without_paths(public.to_yaml())
    return Upload(f"{RUN_FOLDER}/{RECIPE_FILE}", text.encode(), note)


def _model_uploads(folder: Path, verification: Verification) -> Iterator[Upload]:
    for file in sorted(folder.iterdir()):
        if not file.is_file() or not is_model_file(file.name):
            continue
        if any(fnmatch(file.name, pattern) for pattern in (*_BINARY, *_VOCABULARIES)):
            yield Upload(file.name, file)
            continue
        upload = _text_upload(file, file.name)
        if upload.note and file.name in verification.sha256:
            raise InputError(
                f"{file}: must hold no path of this machine, and is part of what was verified; "
                "take the path out, then verify again"
            )
        yield upload
    if (folder / INDEX_FILE).is_file():
        yield Upload(INDEX_FILE.as_posix(), folder / INDEX_FILE)


def _text_upload(file: Path, path: str) -> Upload:
    """A text file, with paths of this machine replaced where there are any."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: must be a readable text file, got: {error}") from error
    public = without_paths(text)
    if public == text:
        return Upload(path, file)
    return Upload(path, public.encode(), "paths of this machine replaced")


def _small_extras(run: RunFolder) -> list[Path]:
    files = [run.file(name) for name in _OPTIONAL]
    return [f for f in files if f.is_file() and f.stat().st_size <= _OPTIONAL_BYTES]


def _readable(upload: Upload) -> str:
    """What can be read of a file as text; of weights, the metadata."""
    if isinstance(upload.content, bytes):
        return upload.content.decode()
    if upload.path.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(upload.content, "pt") as file:
            return json.dumps(file.metadata() or {})
    return upload.content.read_text(encoding="utf-8", errors="replace")
