"""Groundwork: the dense model, its rows, means and text, loaded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.accelerator import start_accelerator
from llmprune.calibration import CalibrationSet
from llmprune.errors import InputError
from llmprune.recipe import Recipe
from llmprune.run_folder import RunFolder
from llmprune.run_steps import Found, OnProgress, Watch, read_calibration, read_means
from llmprune.sources import LoadedModel, load_dense
from llmprune.texts import read_texts, resolve_text
from llmprune.units import UnitMap, map_units
from llmprune_eval.accounting import sample_of, sources_of
from llmprune_eval.documents import encode
from llmprune_eval.stored_results import hash_of


@dataclass(frozen=True)
class Ground:
    """A dense model with rows drawn for one seed; `facts` tells both from all others."""

    dense: LoadedModel
    unit_map: UnitMap
    calibration_set: CalibrationSet
    facts: Mapping[str, Any]


class Groundwork:
    """One dense model, one draw of rows and the texts in memory at a time.

    Attributes:
        cache: Folder of what is large and can be made again.
        title: What progress says the work is for.
    """

    def __init__(self, cache: Path, on_progress: OnProgress) -> None:
        self.cache = cache
        self.on_progress = on_progress
        self.title = ""
        self._dense: tuple[str, LoadedModel, UnitMap, str] | None = None
        self._ground: tuple[str, Ground] | None = None
        self._tokens: dict[str, Tensor] = {}

    def ground(self, recipe: Recipe) -> Ground:
        """The dense model and the rows of a recipe."""
        key = sources_of(recipe)
        if self._ground is None or self._ground[0] != key:
            dense, unit_map, weights = self._load(recipe)
            watch = self.watch(recipe)
            folder = self.folder(f"rows-{key}")
            calibration_set = read_calibration(recipe, dense, folder, watch)
            facts = {
                "origin": dense.origin,
                "weights": weights,
                "dtype": recipe.model.dtype,
                "rows": calibration_set.fingerprint(),
                "mixed_precision": recipe.training.mixed_precision,
            }
            self._ground = (key, Ground(dense, unit_map, calibration_set, facts))
        return self._ground[1]

    def _load(self, recipe: Recipe) -> tuple[LoadedModel, UnitMap, str]:
        key = recipe.model.model_dump_json()
        if self._dense is None or self._dense[0] != key:
            self._dense = self._ground = None
            self._tokens.clear()
            self.tell("load the dense model", 0, 1)
            dense = load_dense(recipe.model)
            weights = sample_of(dense.model)
            dense.model.to(self.watch(recipe).accelerator.device)
            self._dense = (key, dense, map_units(dense.model), weights)
        return self._dense[1:]

    def watch(self, recipe: Recipe) -> Watch:
        """Who runs; every generator starts from the recipe's seed, whatever ran before."""
        accelerator = start_accelerator(recipe.training, recipe.seed)
        if accelerator.num_processes > 1:
            raise InputError("compare runs in one process; start it without a launcher")
        return Watch(accelerator, self.tell)

    def tell(self, task: str, done: int, total: int) -> None:
        """Report progress, with what the work is for."""
        self.on_progress(f"{self.title}: {task}", done, total)

    def folder(self, name: str) -> RunFolder:
        """A folder in the cache."""
        path = self.cache / name
        path.mkdir(exist_ok=True)
        return RunFolder(path)

    def text(self, recipe: Recipe, ground: Ground) -> Tensor:
        """The token ids of the evaluation text."""
        task = recipe.evaluation.perplexity[0]
        key = task.model_dump_json(exclude={"window", "max_windows"})
        if key not in self._tokens:
            self._tokens[key] = encode(read_texts(resolve_text(task)), ground.dense.tokenizer)
        return self._tokens[key]

    def text_hash(self, recipe: Recipe, ground: Ground) -> str:
        """The sha256 of the evaluation text's tokens, in hex."""
        return hashlib.sha256(self.text(recipe, ground).numpy().tobytes()).hexdigest()

    def found(self, recipe: Recipe, ground: Ground) -> Found:
        """The ground with the means that the recipe's compensation leaves behind."""
        watch = self.watch(recipe)
        name = hash_of([dict(ground.facts), recipe.gates.prior_rows])
        means = read_means(
            recipe,
            ground.dense,
            ground.unit_map,
            self.folder(f"means-{name}"),
            ground.calibration_set,
            watch,
        )
        return Found(ground.dense, ground.unit_map, ground.calibration_set, means)
