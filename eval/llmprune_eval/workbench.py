"""Workbench: from a recipe and a stage to a measured figure, computing only what is not kept."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.calibration import CalibrationSet
from llmprune.checkpoint import cast_parameters, load_weights
from llmprune.cut_config import check_form
from llmprune.errors import InputError
from llmprune.files import save_tensors, save_text
from llmprune.pipeline import (
    Found,
    OnProgress,
    Watch,
    needs_priors,
    read_calibration,
    read_means,
    train_scores,
)
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe, UnitKind
from llmprune.reconstruction import even_batches, reconstruct
from llmprune.run_folder import RunFolder
from llmprune.selection import choose, find_targets, pools, target_widths
from llmprune.sources import LoadedModel, load_dense
from llmprune.surgery import cut
from llmprune.texts import read_texts, resolve_text
from llmprune.training import recover, start_accelerator
from llmprune.units import UnitMap, map_units
from llmprune_eval.accounting import (
    num_parameters,
    removed_share,
    sample_of,
    sources_of,
    tokens_of,
    units_removed,
)
from llmprune_eval.perplexity import encode, measure_perplexity
from llmprune_eval.report import environment
from llmprune_eval.stored_results import (
    Result,
    Stage,
    StoredResults,
    hash_of,
    plan_parts,
    request_of,
    stage_parts,
)
from llmprune_eval.stored_scores import Scored, StoredScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ground:
    """A dense model with rows drawn for one seed; `facts` tells both from all others."""

    dense: LoadedModel
    unit_map: UnitMap
    calibration_set: CalibrationSet
    facts: Mapping[str, Any]


class Workbench:
    """Computes results, one dense model in memory at a time; everything is kept in a folder.

    `scores/` and `plans/` hold JSON; `cache/` tensors (gates under way, weights that learned along,
    means, recovered models), which can be deleted when a comparison is done.
    """

    def __init__(self, out: Path, store: StoredResults, on_progress: OnProgress) -> None:
        self.out = out
        self.store = store
        self.on_progress = on_progress
        self.title = ""
        self.kinds: dict[str, set[UnitKind]] = {}
        self.scores = StoredScores(out / "scores", with_grams=False)
        self._dense: tuple[str, LoadedModel, UnitMap, str] | None = None
        self._ground: tuple[str, Ground] | None = None
        self._tokens: dict[str, Tensor] = {}
        for name in ("scores", "plans", "cache"):
            (out / name).mkdir(exist_ok=True)
        for leftover in out.rglob(".*.tmp*"):
            # a kill in the middle of a save leaves these behind
            leftover.unlink(missing_ok=True)

    def prepare(self, recipes: Sequence[Recipe]) -> None:
        """Compute every score that takes no training, so that recipes share passes and kinds."""
        for recipe in recipes:
            kinds = self.kinds.setdefault(sources_of(recipe, with_seed=False), set())
            if recipe.method != "block_influence":
                kinds |= set(recipe.prune.rules())
            self.scores.with_grams |= "omp" in (recipe.method, recipe.gates.prior)
        for recipe in recipes:
            if recipe.method != "sequential_attention" and not self._refusal(recipe):
                self.title = recipe.method
                self.plan(recipe)
        self.scores.forget_statistics()

    def result(self, recipe: Recipe, stage: Stage, windows: int | None, *, title: str) -> Result:
        """The figure of a recipe's model in a stage, from the folder or computed and kept.

        A method that can't meet the budget, or whose model's NLL is not finite, gives a result
        without a figure and with the reason; that is tried anew every time.
        """
        self.title = title
        ground = self.ground(recipe)
        task = recipe.evaluation.perplexity[0]
        parts: dict[str, Any] = {"text": self._text_facts(recipe, ground), "window": task.window}
        parts |= {"max_windows": windows, "stage": stage}
        if stage == "dense":
            parts |= {name: ground.facts[name] for name in ("origin", "weights")}
        else:
            parts |= {**ground.facts, **stage_parts(recipe, stage)}
        key, request = hash_of(parts), request_of(recipe, stage, windows)
        result = self.store.get(key, request)
        if result is None or result.refused:
            result = self._measure(recipe, ground, stage, windows)
            self.store.put(key, request, parts, result)
        return result

    def ground(self, recipe: Recipe) -> Ground:
        """The dense model and the rows of a recipe."""
        key = sources_of(recipe)
        if self._ground is None or self._ground[0] != key:
            self.scores.forget_statistics()
            dense, unit_map, weights = self._load(recipe)
            watch = self._watch(recipe)
            folder = self._folder(f"rows-{key}")
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
            self._tell("load the dense model", 0, 1)
            dense = load_dense(recipe.model)
            weights = sample_of(dense.model)
            dense.model.to(self._watch(recipe).accelerator.device)
            self._dense = (key, dense, map_units(dense.model), weights)
        return self._dense[1:]

    def _watch(self, recipe: Recipe) -> Watch:
        """Who runs; every generator starts from the recipe's seed, whatever ran before."""
        accelerator = start_accelerator(recipe.training, recipe.seed)
        if accelerator.num_processes > 1:
            raise InputError("compare runs in one process; start it without a launcher")
        return Watch(accelerator, self._tell)

    def _tell(self, task: str, done: int, total: int) -> None:
        self.on_progress(f"{self.title}: {task}", done, total)

    def _folder(self, name: str) -> RunFolder:
        path = self.out / "cache" / name
        path.mkdir(exist_ok=True)
        return RunFolder(path)

    def _text(self, recipe: Recipe, ground: Ground) -> Tensor:
        """The token ids of the evaluation text."""
        task = recipe.evaluation.perplexity[0]
        key = task.model_dump_json(exclude={"window", "max_windows"})
        if key not in self._tokens:
            self._tokens[key] = encode(read_texts(resolve_text(task)), ground.dense.tokenizer)
        return self._tokens[key]

    def _text_facts(self, recipe: Recipe, ground: Ground) -> str:
        return hashlib.sha256(self._text(recipe, ground).numpy().tobytes()).hexdigest()

    def _found(self, recipe: Recipe, ground: Ground) -> Found:
        """The ground with the means that the recipe's compensation leaves behind."""
        watch = self._watch(recipe)
        name = hash_of([dict(ground.facts), recipe.gates.prior_rows])
        means = read_means(
            recipe,
            ground.dense,
            ground.unit_map,
            self._folder(f"means-{name}"),
            ground.calibration_set,
            watch,
        )
        return Found(ground.dense, ground.unit_map, ground.calibration_set, means)

    def _measure(self, recipe: Recipe, ground: Ground, stage: Stage, windows: int | None) -> Result:
        machine = environment(ground.dense.model.device, torch.float32)
        if stage == "dense":
            model = ground.dense.model
            if model.dtype != torch.float32:
                model = copy.deepcopy(model)
                cast_parameters(model, torch.float32)
            made = Result(None, parameters=num_parameters(model))
        else:
            refusal = self._refusal(recipe)
            if refusal:
                return Result(None, refused=refusal, environment=machine)
            model, made = self._make(recipe, ground, stage)
        start = time.perf_counter()
        try:
            perplexity = measure_perplexity(
                model,
                self._text(recipe, ground),
                window=recipe.evaluation.perplexity[0].window,
                max_windows=windows,
                on_window=partial(self._tell, f"perplexity, {stage}"),
            )
        except InputError as error:
            if stage == "dense":
                raise
            return replace(made, refused=str(error), environment=machine)
        seconds = {**made.seconds, "evaluation": time.perf_counter() - start}
        return replace(made, perplexity=perplexity, seconds=seconds, environment=machine)

    def _refusal(self, recipe: Recipe) -> str:
        """Why the method can't meet the budget on this model; empty where it can."""
        ground = self.ground(recipe)
        try:
            targets = find_targets(ground.unit_map, recipe.prune.rules(), recipe.budget)
            check_form(
                ground.dense.model,
                ground.unit_map,
                target_widths(ground.unit_map, targets.counts),
                recipe.export.format,
                biased=recipe.compensation == "mean",
            )
        except InputError as error:
            return str(error)
        return ""

    def plan(self, recipe: Recipe) -> tuple[PrunePlan, Scored]:
        """The units that a method keeps, and the scores that it chose them by."""
        ground = self.ground(recipe)
        key = hash_of([dict(ground.facts), plan_parts(recipe)])
        file = self.out / "plans" / f"{recipe.method}-{key}.json"
        scored = self._score(recipe, ground, key)
        if not file.is_file():
            targets = find_targets(ground.unit_map, recipe.prune.rules(), recipe.budget)
            plan = choose(scored.scores, ground.unit_map, targets)
            save_text(plan.to_json(), file)
        return PrunePlan.read(file), scored

    def _score(self, recipe: Recipe, ground: Ground, key: str) -> Scored:
        found = self._found(recipe, ground)
        watch = self._watch(recipe)
        if recipe.method != "sequential_attention":
            return self._score_once(recipe.method, recipe, found, watch)
        stem = f"{recipe.method}-{key}"
        folder = self._folder(f"gates-{key}")
        learns = recipe.gates.train != "gates"
        kept = self.scores.trained(stem)
        # the weights that learned along are part of what was found
        if kept is not None and (folder.weights.is_file() or not learns):
            return kept
        start, was_there = time.perf_counter(), folder.state.is_file()
        prior_seconds, priors = 0.0, None
        if needs_priors(recipe):
            prior = self._score_once(recipe.gates.prior, recipe, found, watch)
            prior_seconds, priors = prior.seconds, dict(prior.scores.scores)
            start = time.perf_counter()
        if learns:
            dense = replace(ground.dense, model=copy.deepcopy(ground.dense.model))
            found = replace(found, dense=dense)
        targets = find_targets(ground.unit_map, recipe.prune.rules(), recipe.budget)
        pool_list = pools(ground.unit_map, targets)
        watch = self._watch(recipe)
        scores = train_scores(recipe, folder, found, pool_list, watch, priors=priors)
        kept = self.scores.keep(
            self.scores.folder / f"{stem}.json",
            scores,
            prior_seconds + time.perf_counter() - start,
            is_partial_time=was_there,
        )
        folder.state.unlink(missing_ok=True)
        return kept

    def _score_once(self, name: Any, recipe: Recipe, found: Found, watch: Watch) -> Scored:
        kinds = self.kinds.get(sources_of(recipe, with_seed=False), set())
        facts = self.ground(recipe).facts
        return self.scores.once(name, recipe, found, watch, facts=facts, all_kinds=kinds)

    def _make(self, recipe: Recipe, ground: Ground, stage: Stage) -> tuple[PreTrainedModel, Result]:
        """The model of a stage in float32, and what it took."""
        plan, scored = self.plan(recipe)
        if stage != "compensated":
            self.scores.forget_statistics()
        found = self._found(recipe, ground)
        seconds = {"scores": scored.seconds}
        start = time.perf_counter()
        calibrated = self._calibrated(recipe, ground)
        pruned = cut(calibrated, plan, form=recipe.export.format, means=found.means)
        del calibrated
        cast_parameters(pruned, torch.float32)
        seconds["cut"] = time.perf_counter() - start
        is_refit = recipe.reconstruction is not None and stage != "compensated"
        if stage == "recovered":
            seconds |= self._recovered(pruned, recipe, found, plan)
        elif is_refit:
            seconds |= self._refit(pruned, recipe, found, plan)
        made = Result(
            None,
            removed=removed_share(ground.unit_map, plan),
            parameters=num_parameters(pruned),
            units=units_removed(ground.unit_map, plan),
            tokens=tokens_of(recipe, stage),
            seconds=seconds,
            is_partial_time=scored.is_partial_time,
        )
        return pruned, made

    def _calibrated(self, recipe: Recipe, ground: Ground) -> PreTrainedModel:
        """The dense model, with the weights that learned along with the gates."""
        if recipe.method != "sequential_attention" or recipe.gates.train == "gates":
            return ground.dense.model
        model = copy.deepcopy(ground.dense.model)
        key = hash_of([dict(ground.facts), plan_parts(recipe)])
        load_weights(model, self._folder(f"gates-{key}").weights)
        return model

    def _refit(
        self, pruned: PreTrainedModel, recipe: Recipe, found: Found, plan: PrunePlan
    ) -> dict[str, float]:
        refit = recipe.reconstruction
        if refit is None:
            return {}
        start = time.perf_counter()
        reconstruct(
            pruned,
            found.dense.model,
            found.unit_map,
            plan,
            batches=even_batches(found.calibration_set.rows[: refit.num_rows]),
            ridge=refit.ridge,
            on_layer=partial(self._tell, "refit"),
        )
        return {"refit": time.perf_counter() - start}

    def _recovered(
        self, pruned: PreTrainedModel, recipe: Recipe, found: Found, plan: PrunePlan
    ) -> dict[str, float]:
        """Train a cut model after its refit, or take the weights that are kept; in place."""
        parts = [dict(self.ground(recipe).facts), stage_parts(recipe, "recovered")]
        folder = self._folder(f"recovered-{hash_of(parts)}")
        notes = folder.file("seconds.json")
        if folder.weights.is_file() and notes.is_file():
            load_weights(pruned, folder.weights)
            return dict(json.loads(notes.read_text(encoding="utf-8")))
        seconds = self._refit(pruned, recipe, found, plan)
        start = time.perf_counter()
        watch = self._watch(recipe)
        recover(
            pruned,
            found.calibration_set,
            recipe=recipe,
            accelerator=watch.accelerator,
            teacher=found.dense.model,
            on_step=watch.steps("recovery", folder),
            first_row=0 if recipe.reconstruction is None else recipe.reconstruction.num_rows,
        )
        seconds["recovery"] = time.perf_counter() - start
        weights = {n: p.detach().cpu().contiguous() for n, p in pruned.named_parameters()}
        save_tensors(weights, folder.weights, {"of": "recovered model"})
        save_text(json.dumps(seconds), notes)
        return seconds
