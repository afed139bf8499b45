"""Workbench: from a recipe and a stage to a measured figure, computing only what is not kept."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.checkpoint import cast_parameters, load_weights
from llmprune.cut_config import check_form
from llmprune.errors import InputError
from llmprune.files import save_tensors, save_text
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe, UnitKind
from llmprune.reconstruction import reconstruct
from llmprune.recovery import recover
from llmprune.run_folder import RunFolder
from llmprune.run_steps import Found, OnProgress, Watch
from llmprune.selection import choose, pools
from llmprune.streams import even_batches
from llmprune.surgery import cut
from llmprune.targets import Targets, target_widths, targets_of
from llmprune.unit_pruning import train_scores
from llmprune_eval.accounting import (
    num_parameters,
    reads_priors,
    removed_share,
    sources_of,
    tokens_of,
    units_removed,
)
from llmprune_eval.contenders import SEQUENTIAL
from llmprune_eval.groundwork import Ground, Groundwork
from llmprune_eval.perplexity import measure_perplexity
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

# No file takes as long to write.
STALE_SECONDS = 3600
# Windows of the evaluation text that go through a model at once on a GPU, which one leaves idle.
GPU_WINDOWS = 8


class Workbench:
    """Computes results, one dense model in memory at a time; everything is kept in a folder.

    `scores/` and `plans/` hold JSON; `cache/` tensors (gates under way, weights that learned along,
    means, recovered models), which can be deleted when a comparison is done.
    """

    def __init__(self, out: Path, store: StoredResults, on_progress: OnProgress) -> None:
        self.out = out
        self.store = store
        self.work = Groundwork(out / "cache", on_progress)
        self.kinds: dict[str, set[UnitKind]] = {}
        self._known_targets: dict[str, Targets] = {}
        self.scores = StoredScores(out / "scores", with_grams=False)
        for name in ("scores", "plans", "cache"):
            (out / name).mkdir(exist_ok=True)
        for leftover in out.rglob(".*.tmp*"):
            # a kill in the middle of a save leaves these behind; a younger one may be another's
            if leftover.stat().st_mtime < time.time() - STALE_SECONDS:
                leftover.unlink()

    def expect(self, recipes: Sequence[Recipe]) -> None:
        """Tell what will be asked for, so that one costly pass serves all of its kinds of unit."""
        for recipe in recipes:
            kinds = self.kinds.setdefault(sources_of(recipe, with_seed=False), set())
            if recipe.method != "block_influence":
                kinds |= set(recipe.prune.rules())
            self.scores.with_grams |= "omp" in (recipe.method, recipe.gates.prior)

    def prepare(self, recipes: Sequence[Recipe]) -> None:
        """Compute every score that takes no training, so that recipes share passes and kinds."""
        self.expect(recipes)
        for recipe in recipes:
            self.work.title = f"scores, {recipe.method}"
            if recipe.method != SEQUENTIAL and not self._refusal(recipe):
                self.plan(recipe)
        self.scores.forget_statistics()

    def result(self, recipe: Recipe, stage: Stage, windows: int | None, *, title: str) -> Result:
        """The figure of a recipe's model in a stage, from the folder or computed and kept.

        A method that can't meet the budget, or whose model's NLL is not finite, gives a result
        without a figure and with the reason; that is tried anew every time.
        """
        self.work.title = title
        ground = self.work.ground(recipe)
        task = recipe.evaluation.perplexity[0]
        parts: dict[str, Any] = {"text": self.work.text_hash(recipe, ground), "window": task.window}
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
                self.work.text(recipe, ground),
                window=recipe.evaluation.perplexity[0].window,
                max_windows=windows,
                batch_size=GPU_WINDOWS if model.device.type == "cuda" else 1,
                on_window=partial(
                    self.work.tell, f"perplexity, {stage}, {windows or 'all'} windows"
                ),
            )
        except InputError as error:
            if stage == "dense":
                raise
            return replace(made, refused=str(error), environment=machine)
        seconds = {**made.seconds, "evaluation": time.perf_counter() - start}
        return replace(made, perplexity=perplexity, seconds=seconds, environment=machine)

    def _refusal(self, recipe: Recipe) -> str:
        """Why the method can't meet the budget on this model; empty where it can."""
        ground = self.work.ground(recipe)
        try:
            targets = self._targets(recipe, ground)
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

    def _targets(
        self, recipe: Recipe, ground: Ground, importances: Mapping[str, Tensor] | None = None
    ) -> Targets:
        """Counts to keep; equal for all methods of a block unless they come from importances."""
        if importances is not None and _is_by_importance(recipe):
            return targets_of(ground.unit_map, recipe, importances=importances)
        parts = [recipe.prune, recipe.budget, recipe.export.format, recipe.model]
        key = repr(parts)
        if key not in self._known_targets:
            self._known_targets[key] = targets_of(ground.unit_map, recipe)
        return self._known_targets[key]

    def plan(self, recipe: Recipe) -> tuple[PrunePlan, Scored]:
        """The units that a method keeps, and the scores that it chose them by."""
        ground = self.work.ground(recipe)
        key = hash_of([dict(ground.facts), plan_parts(recipe)])
        file = self.out / "plans" / f"{recipe.method}-{key}.json"
        scored = self._score(recipe, ground, key)
        if not file.is_file():
            known = scored.priors if recipe.method == SEQUENTIAL else scored.scores.scores
            targets = self._targets(recipe, ground, known)
            plan = choose(scored.scores, ground.unit_map, targets)
            save_text(plan.to_json(), file)
        return PrunePlan.read(file), scored

    def _score(self, recipe: Recipe, ground: Ground, key: str) -> Scored:
        found = self.work.found(recipe, ground)
        watch = self.work.watch(recipe)
        if recipe.method != SEQUENTIAL:
            return self._score_once(recipe.method, recipe, found, watch)
        priors = None
        if reads_priors(recipe):
            priors = self._score_once(recipe.gates.prior, recipe, found, watch)
        file = self.scores.folder / f"{recipe.method}-{key}.json"
        folder = self.work.folder(f"gates-{key}")
        # the weights that learned along are part of what was found
        learns = recipe.gates.train != "gates"
        if file.is_file() and (folder.weights.is_file() or not learns):
            scored = self.scores.read(file)
        else:
            scored = self._train(recipe, found, folder, priors, file)
        if priors is None:
            return scored
        return replace(scored, priors=priors.scores.scores)

    def _train(
        self, recipe: Recipe, found: Found, folder: RunFolder, priors: Scored | None, file: Path
    ) -> Scored:
        """Train gates, going on from the state that a killed run left."""
        start, was_there = time.perf_counter(), any(folder.path.glob("gates*.safetensors"))
        known = None
        if priors is not None:
            # train_scores reads them from there
            save_text(priors.scores.to_json(), folder.file("priors.json"))
            start -= priors.seconds
            known = priors.scores.scores
        targets = self._targets(recipe, self.work.ground(recipe), known)
        pool_list = pools(found.unit_map, targets)
        if recipe.gates.train != "gates":
            dense = replace(found.dense, model=copy.deepcopy(found.dense.model))
            found = replace(found, dense=dense)
        scores = train_scores(recipe, folder, found, pool_list, self.work.watch(recipe))
        seconds = time.perf_counter() - start
        scored = self.scores.keep(file, scores, seconds, is_partial_time=was_there)
        for state in folder.path.glob("gates*.safetensors"):
            state.unlink()
        return scored

    def _score_once(self, name: Any, recipe: Recipe, found: Found, watch: Watch) -> Scored:
        kinds = self.kinds.get(sources_of(recipe, with_seed=False), set())
        facts = self.work.ground(recipe).facts
        return self.scores.once(name, recipe, found, watch, facts=facts, all_kinds=kinds)

    def _make(self, recipe: Recipe, ground: Ground, stage: Stage) -> tuple[PreTrainedModel, Result]:
        """The model of a stage in float32, and what it took."""
        plan, scored = self.plan(recipe)
        if stage != "compensated":
            self.scores.forget_statistics()
        found = self.work.found(recipe, ground)
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
        if recipe.method != SEQUENTIAL or recipe.gates.train == "gates":
            return ground.dense.model
        model = copy.deepcopy(ground.dense.model)
        key = hash_of([dict(ground.facts), plan_parts(recipe)])
        load_weights(model, self.work.folder(f"gates-{key}").weights)
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
            on_layer=partial(self.work.tell, "refit"),
        )
        return {"refit": time.perf_counter() - start}

    def _recovered(
        self, pruned: PreTrainedModel, recipe: Recipe, found: Found, plan: PrunePlan
    ) -> dict[str, float]:
        """Train a cut model after its refit, or take the weights that are kept; in place."""
        parts = [dict(self.work.ground(recipe).facts), stage_parts(recipe, "recovered")]
        folder = self.work.folder(f"recovered-{hash_of(parts)}")
        notes = folder.file("seconds.json")
        if folder.weights.is_file() and notes.is_file():
            load_weights(pruned, folder.weights)
            return dict(json.loads(notes.read_text(encoding="utf-8")))
        seconds = self._refit(pruned, recipe, found, plan)
        start = time.perf_counter()
        watch = self.work.watch(recipe)
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


def _is_by_importance(recipe: Recipe) -> bool:
    """Whether importances have a say in the counts."""
    return recipe.budget is not None and recipe.budget.allocation == "importance"
