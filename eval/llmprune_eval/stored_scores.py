"""Scores of a comparison: computed once, kept as JSON, shared by every block that asks for them."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.recipe import Method, Recipe, UnitKind
from llmprune.recipe_training import Prior
from llmprune.run_steps import Found, Watch
from llmprune.scores import UnitScores
from llmprune.scoring import FORWARD_BATCH, score_units
from llmprune.statistics import ActivationStatistics, collect_statistics
from llmprune_eval.stored_results import hash_of

FORMAT = "llmprune-comparison-scores/1"
# What needs gradients or a matching: computed at once for every kind that any block prunes.
COSTLY: tuple[Method | Prior, ...] = ("taylor", "taylor_squared", "omp", "fisher")
# What one pass of statistics is enough for.
FROM_STATISTICS = ("activation", "wanda", "flap", "block_influence", "omp")


@dataclass(frozen=True)
class Scored:
    """Scores with what they took.

    `seconds` holds what the method would take alone: a pass that several share counts for each.
    `priors` are what the logits of trained gates started from.
    """

    scores: UnitScores
    seconds: float
    is_partial_time: bool = False
    priors: Mapping[str, torch.Tensor] | None = None


class StoredScores:
    """The scores in a folder, and the statistics of one calibration set at a time.

    Attributes:
        with_grams: Whether statistics are to serve `omp`, too.
    """

    def __init__(self, folder: Path, *, with_grams: bool) -> None:
        self.folder = folder
        self.with_grams = with_grams
        self._statistics: tuple[str, ActivationStatistics, float] | None = None

    def once(
        self,
        name: Method | Prior,
        recipe: Recipe,
        found: Found,
        watch: Watch,
        *,
        facts: Mapping[str, Any],
        all_kinds: Collection[UnitKind],
    ) -> Scored:
        """Scores that take no training, of at least the recipe's kinds.

        Args:
            name: Method or prior.
            recipe: Its kinds, `gates.prior_rows`, `compensation` and `seed` are used.
            found: Model, units, rows and means.
            watch: Progress.
            facts: What tells this model and these rows from others.
            all_kinds: Kinds that other blocks will ask of the same model and rows.
        """
        own = set(recipe.prune.rules())
        kinds = own | set(all_kinds) if name in COSTLY else own
        inputs: dict[str, Any] = {**facts, "name": name, "prior_rows": recipe.gates.prior_rows}
        inputs |= {"compensation": recipe.compensation, "seed": recipe.seed}
        stem = f"{name}-{hash_of(inputs)}"
        for file in sorted(self.folder.glob(f"{stem}-*.json")):
            there = set(file.stem.removeprefix(f"{stem}-").split("+"))
            if there == kinds or (name in COSTLY and there >= own):
                return self.read(file)
        statistics, shared = None, 0.0
        if name in FROM_STATISTICS:
            statistics, shared = self._collect(inputs, recipe, found, watch)
        start = time.perf_counter()
        with watch.accelerator.autocast():
            tables = score_units(
                name,
                found.dense.model,
                found.unit_map,
                found.calibration_set.rows[: recipe.gates.prior_rows],
                kinds=tuple(sorted(kinds)),
                seed=recipe.seed,
                means=found.means,
                statistics=statistics,
                over=watch.over,
            )
        file = self.folder / f"{stem}-{'+'.join(sorted(kinds))}.json"
        return self.keep(file, UnitScores(tables), shared + time.perf_counter() - start)

    def keep(
        self, file: Path, scores: UnitScores, seconds: float, *, is_partial_time: bool = False
    ) -> Scored:
        """Write scores; what is given back is what a later run will read."""
        data = {
            "format": FORMAT,
            "seconds": seconds,
            "is_partial_time": is_partial_time,
            "scores": json.loads(scores.to_json()),
        }
        save_text(json.dumps(data) + "\n", file)
        return self.read(file)

    def forget_statistics(self) -> None:
        """Free the memory that they take; Gram matrices are large."""
        self._statistics = None

    def _collect(
        self, inputs: dict[str, Any], recipe: Recipe, found: Found, watch: Watch
    ) -> tuple[ActivationStatistics, float]:
        """Statistics of the rows, and the seconds that their pass took."""
        key = hash_of(inputs | {"name": "statistics"})
        kept = self._statistics
        if kept is None or kept[0] != key or (inputs["name"] == "omp" and not kept[1].grams):
            self._statistics = None
            matched = self.folder.glob(f"omp-{hash_of(inputs | {'name': 'omp'})}-*.json")
            start = time.perf_counter()
            rows = found.calibration_set.rows[: recipe.gates.prior_rows].split(FORWARD_BATCH)
            with torch.no_grad(), watch.accelerator.autocast():
                statistics = collect_statistics(
                    found.dense.model,
                    found.unit_map,
                    watch.over("statistics", rows),
                    with_grams=inputs["name"] == "omp" or (self.with_grams and not any(matched)),
                )
            kept = self._statistics = (key, statistics, time.perf_counter() - start)
        return kept[1:]

    def read(self, file: Path) -> Scored:
        """Read scores.

        Raises:
            InputError: The file is damaged.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            scores = UnitScores.from_json(json.dumps(data["scores"]), name=file.name)
            return Scored(scores, data["seconds"], data["is_partial_time"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file.name}: must hold scores ({error!r}); delete it") from error
