"""THE MAIN PATH: recipe in, smaller model out; eight steps, a file saved after each.

Read this file first: every function called here is one step, in the module of its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from llmprune.architectures import architecture_of
from llmprune.calibration import CalibrationSet
from llmprune.card import run_card
from llmprune.checkpoint import cast_parameters, load_pruned, load_weights, save_pruned
from llmprune.compensation import UnitMeans
from llmprune.cut_config import check_form
from llmprune.files import save_tensors, save_text
from llmprune.gates import attach_gates
from llmprune.latency import Promise, table_for
from llmprune.plan import PrunePlan
from llmprune.recipe import Method, Prior, Recipe
from llmprune.reconstruction import even_batches, reconstruct
from llmprune.run_folder import RunFolder, identity_of, settle_precision
from llmprune.scores import UnitScores
from llmprune.scoring import score_units, unit_means
from llmprune.selection import Pool, choose, pools
from llmprune.self_generated import SELF_GENERATED, sample_rows, self_generated_set
from llmprune.sources import LoadedModel, load_config, load_dense
from llmprune.surgery import cut
from llmprune.targets import target_widths, targets_of
from llmprune.texts import corpus_of, read_texts, resolve_text, text_name
from llmprune.trained_weights import TrainedWeights
from llmprune.training import (
    GateRun,
    OnStep,
    recover,
    start_accelerator,
    teacher_of,
    train_gates,
)
from llmprune.units import UnitMap, map_units
from llmprune.verification import largest_difference, record_reference, reference_logits, verify

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from llmprune_eval.report import EvalReport

Item = TypeVar("Item")
# task, done, of how many
OnProgress = Callable[[str, int, int], None]

# Tokens of each of the two calibration rows that verification compares logits on.
REFERENCE_LENGTH = 24


def silent(task: str, done: int, total: int) -> None:
    """Report progress to no one."""


@dataclass(frozen=True)
class Pruned:
    """What a run gave: its folder, the model, and the figures beside the dense model's."""

    folder: Path
    model: PreTrainedModel
    report: EvalReport


@dataclass(frozen=True)
class Found:
    """What every step of a run looks at: the dense model, its units, the rows, their means."""

    dense: LoadedModel
    unit_map: UnitMap
    calibration_set: CalibrationSet
    means: UnitMeans | None


@dataclass(frozen=True)
class Watch:
    """Who runs (the Accelerator) and who is told how far the run is."""

    accelerator: Accelerator
    on_progress: OnProgress

    def over(self, task: str, items: Sequence[Item]) -> Iterator[Item]:
        """The items, telling before each how many are done."""
        for done, item in enumerate(items):
            self.on_progress(task, done, len(items))
            yield item
        self.on_progress(task, len(items), len(items))

    def steps(self, task: str, folder: RunFolder) -> OnStep:
        """A callback for training steps; logs the loss on the main process."""

        started: list[int] = []

        def on_step(step: int, steps: int, loss: float) -> None:
            if self.accelerator.is_main_process:
                if not started:
                    started.append(step)
                    folder.forget_steps(task, step)
                folder.add_to_log(task, step, loss)
            self.on_progress(task, step, steps)

        return on_step


def prune(
    recipe: Recipe, out: str | Path, *, resume: bool = False, on_progress: OnProgress = silent
) -> Pruned | None:
    """Prune a model as the recipe says and leave everything in the folder `out`.

    Args:
        recipe: What to do.
        out: A new or empty folder; with `resume`, that of a run of the same recipe.
        resume: Take up a run where it stopped.
        on_progress: Called with a task's name, what is done and of how many.

    Returns:
        The result; None on every process but the main one.

    Raises:
        InputError: Anything a user can cause; the folder then holds whole files only.
    """
    from llmprune_eval.speed import phase_ms

    recipe = settle_precision(recipe, Path(out))
    accelerator = start_accelerator(recipe.training, recipe.seed)
    is_main = accelerator.is_main_process
    watch = Watch(accelerator, on_progress if is_main else silent)
    with watch.accelerator.main_process_first():
        folder = RunFolder.begin(Path(out), recipe, resume=resume or not is_main)
    plan, scores = folder.read_plan(), folder.read_scores()
    has_model = folder.model.is_dir()
    # nobody writes before everybody has seen what was there
    accelerator.wait_for_everyone()
    architecture_of(load_config(recipe.model).model_type)
    watch.on_progress("load the dense model", 0, 1)
    dense = load_dense(recipe.model)
    dense.model.to(watch.accelerator.device)
    watch.on_progress("load the dense model", 1, 1)
    unit_map = map_units(dense.model)
    table = folder.file("latency.json")
    with watch.accelerator.main_process_first():
        measure = partial(phase_ms, on_round=partial(watch.on_progress, "latency table"))
        latency = table_for(table, lambda: dense.model, unit_map, recipe, measure=measure)
    targets = targets_of(unit_map, recipe, latency=latency)
    is_biased = recipe.compensation == "mean"
    widths = target_widths(unit_map, targets.counts)
    check_form(dense.model, unit_map, widths, recipe.export.format, biased=is_biased)
    calibration_set = read_calibration(recipe, dense, folder, watch)
    means = read_means(recipe, dense, unit_map, folder, calibration_set, watch)
    found = Found(dense, unit_map, calibration_set, means)

    if plan is None:
        by_importance = recipe.budget is not None and recipe.budget.allocation == "importance"
        trains = recipe.method == "sequential_attention"
        if by_importance and trains and recipe.export.format == "uniform":
            priors = _priors(recipe, folder, found, watch)
            targets = targets_of(unit_map, recipe, importances=priors, latency=latency)
        if scores is None:
            pool_list = pools(unit_map, targets)
            scores = _score(recipe, folder, found, pool_list, watch)
            if trains and recipe.gates.train != "gates":
                dense = load_dense(recipe.model)
                dense.model.to(watch.accelerator.device)
                found = replace(found, dense=dense)
        if by_importance and not trains:
            targets = targets_of(unit_map, recipe, importances=scores.scores, latency=latency)
        plan = choose(scores, unit_map, targets)
        if is_main:
            save_text(plan.to_json(), folder.file("plan.json"))
    if not has_model:
        _cut_and_recover(recipe, folder, found, plan, watch)
    if not is_main:
        return None
    on_progress("verify", 0, 1)
    verify(folder.path)
    on_progress("verify", 1, 1)
    pruned = load_pruned(folder.path).to(watch.accelerator.device)
    promise = None if latency is None else latency.promise(recipe, plan.widths(unit_map))
    return Pruned(folder.path, pruned, _evaluate(recipe, folder, dense, pruned, promise, watch))


def read_calibration(
    recipe: Recipe, dense: LoadedModel, folder: RunFolder, watch: Watch
) -> CalibrationSet:
    """The rows that gates and weights are trained on."""
    source = resolve_text(recipe.calibration)
    sizes = {"num_rows": source.num_rows, "row_length": source.row_length, "seed": recipe.seed}
    if source.dataset == SELF_GENERATED:

        def sample() -> Tensor:
            with watch.accelerator.autocast():
                on_token = partial(watch.on_progress, "calibration text")
                return sample_rows(dense.model, **sizes, on_token=on_token)

        with watch.accelerator.main_process_first():
            return self_generated_set(
                folder.file("calibration.safetensors"),
                sample,
                seed=recipe.seed,
                may_write=watch.accelerator.is_main_process,
            )
    return CalibrationSet.from_texts(
        read_texts(source),
        dense.tokenizer,
        **sizes,
        name=text_name(source),
        corpus=corpus_of(source),
    )


def read_means(
    recipe: Recipe,
    dense: LoadedModel,
    unit_map: UnitMap,
    folder: RunFolder,
    calibration_set: CalibrationSet,
    watch: Watch,
) -> UnitMeans | None:
    """What removed units leave behind, measured once a run; None without compensation."""
    if recipe.compensation == "none":
        return None
    file = folder.file("means.safetensors")
    with watch.accelerator.main_process_first():
        if not file.is_file():
            rows = calibration_set.rows[: recipe.gates.prior_rows]
            with watch.accelerator.autocast():
                means = unit_means(dense.model, unit_map, rows, watch.over)
            if watch.accelerator.is_main_process:
                means.save(file)
        return UnitMeans.load(file)


def _score(
    recipe: Recipe, folder: RunFolder, found: Found, pool_list: list[Pool], watch: Watch
) -> UnitScores:
    """Score every unit as `recipe.method` says, and save scores.json."""
    if recipe.method == "sequential_attention":
        scores = train_scores(recipe, folder, found, pool_list, watch)
    else:
        scores = UnitScores(_once(recipe.method, recipe, found, watch))
    if watch.accelerator.is_main_process:
        save_text(scores.to_json(), folder.file("scores.json"))
        for state in folder.path.glob(f"{folder.state.stem}*{folder.state.suffix}"):
            state.unlink()
    watch.accelerator.wait_for_everyone()
    return scores


def _once(name: Method | Prior, recipe: Recipe, found: Found, watch: Watch) -> dict[str, Tensor]:
    """Scores that take no training, on the first `gates.prior_rows` rows."""
    with watch.accelerator.autocast():
        return score_units(
            name,
            found.dense.model,
            found.unit_map,
            found.calibration_set.rows[: recipe.gates.prior_rows],
            kinds=tuple(recipe.prune.rules()),
            seed=recipe.seed,
            means=found.means,
            over=watch.over,
        )


def _priors(
    recipe: Recipe, folder: RunFolder, found: Found, watch: Watch
) -> dict[str, Tensor] | None:
    """Importances that the logits start from; kept in a file where counts depend on them."""
    if recipe.gates.prior == "none" or recipe.gates.variant == "magnitude":
        return None
    file = folder.file("priors.json")
    if file.is_file():
        return dict(UnitScores.from_json(file.read_text(), name=file.name).scores)
    priors = _once(recipe.gates.prior, recipe, found, watch)
    if recipe.budget is not None and recipe.budget.allocation == "importance":
        # all processes go on with the numbers that a resumed run will read
        text = UnitScores(priors).to_json()
        if watch.accelerator.is_main_process:
            save_text(text, file)
        return dict(UnitScores.from_json(text).scores)
    return priors


def train_scores(
    recipe: Recipe, folder: RunFolder, found: Found, pool_list: list[Pool], watch: Watch
) -> UnitScores:
    """Attach gates and train them; saves the weights that learned along."""
    model, accelerator = found.dense.model, watch.accelerator
    settings = recipe.gates
    priors = _priors(recipe, folder, found, watch)
    frozen = copy.deepcopy(model) if settings.train == "all" else None
    weights = TrainedWeights(model, settings.train, settings.lora_rank, recipe.seed)
    gates = attach_gates(model, found.unit_map, tuple(recipe.prune.rules()), found.means)
    run = GateRun(
        accelerator,
        weights,
        teacher_of(frozen or model, gates, weights),
        priors=priors,
        state_file=folder.state,
        identity=identity_of(recipe, found.calibration_set.fingerprint(), found.dense.origin),
        on_step=watch.steps("gates", folder),
    )
    scores = train_gates(model, gates, found.calibration_set, pool_list, recipe=recipe, run=run)
    gates.detach()
    weights.finish()
    if accelerator.is_main_process and weights.parameters:
        changed = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
        save_tensors(changed, folder.weights, {"of": "calibrated model"})
    return scores


def _cut_and_recover(
    recipe: Recipe, folder: RunFolder, found: Found, plan: PrunePlan, watch: Watch
) -> None:
    """Cut, compare with the gated model, recover, and save the model with its reference logits."""
    dense, calibration_set = found.dense, found.calibration_set
    calibrated = dense.model
    if folder.weights.is_file():
        calibrated = copy.deepcopy(dense.model)
        load_weights(calibrated, folder.weights)
    unit_map = map_units(calibrated)
    kinds = {group.kind for group in unit_map.groups.values()}
    gates = attach_gates(calibrated, unit_map, kinds, found.means)
    gates.set_plan(plan)
    tokens = calibration_set.rows[:2, :REFERENCE_LENGTH]
    logits = reference_logits(calibrated, tokens)
    gates.detach()
    pruned = cut(calibrated, plan, form=recipe.export.format, means=found.means)
    difference = largest_difference(reference_logits(pruned, tokens), logits)
    del calibrated
    refit = recipe.reconstruction
    dtype = getattr(torch, recipe.export.dtype)
    is_final = refit is None and recipe.recovery.steps == 0 and dtype == pruned.dtype
    if refit is not None or recipe.recovery.steps:
        # small changes add up in float32 and are lost in 16 bits
        cast_parameters(pruned, torch.float32)
    if refit is not None:
        reconstruct(
            pruned,
            dense.model,
            unit_map,
            plan,
            batches=even_batches(calibration_set.rows[: refit.num_rows]),
            ridge=refit.ridge,
            on_layer=lambda done, total: watch.on_progress("reconstruction", done, total),
        )
    if recipe.recovery.steps:
        recover(
            pruned,
            calibration_set,
            recipe=recipe,
            accelerator=watch.accelerator,
            teacher=dense.model,
            on_step=watch.steps("recovery", folder),
            first_row=0 if refit is None else refit.num_rows,
        )
    cast_parameters(pruned, dtype)
    if not is_final:
        logits = reference_logits(pruned, tokens)
    if watch.accelerator.is_main_process:
        reference = "gated" if is_final else "final"
        record_reference(
            logits,
            tokens,
            folder.path,
            reference=reference,
            dense_model=dense.origin,
            cut_from_gated=difference,
        )
        save_pruned(pruned, dense.tokenizer, folder.model)
    watch.accelerator.wait_for_everyone()


def _evaluate(
    recipe: Recipe,
    folder: RunFolder,
    dense: LoadedModel,
    pruned: PreTrainedModel,
    promise: Promise | None,
    watch: Watch,
) -> EvalReport:
    """Measure both models; write report.json and README.md."""
    from llmprune_eval.evaluation import evaluate
    from llmprune_eval.report import to_markdown

    report = evaluate(
        dense.model,
        pruned,
        dense.tokenizer,
        recipe=recipe,
        folder=folder.model,
        promise=promise,
        on_progress=watch.on_progress,
    )
    save_text(report.to_json(), folder.report)
    save_text(
        run_card(recipe, dense.origin, report.samples, to_markdown(report)),
        folder.file("README.md"),
    )
    return report
