"""Removing units: from a dense model and its rows to a smaller model, a file after each step."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.checkpoint import cast_parameters, load_weights, save_pruned
from llmprune.cut_config import check_form
from llmprune.files import save_tensors, save_text
from llmprune.gates import attach_gates
from llmprune.latency import Measure, Promise, table_for
from llmprune.plan import PrunePlan
from llmprune.recipe import Method, Recipe
from llmprune.recipe_training import Prior
from llmprune.reconstruction import reconstruct
from llmprune.recovery import recover
from llmprune.run_folder import RunFolder, identity_of
from llmprune.run_steps import Found, Watch, read_calibration, read_means
from llmprune.scores import UnitScores
from llmprune.scoring import score_units
from llmprune.selection import Pool, choose, pools
from llmprune.sources import LoadedModel, load_dense
from llmprune.streams import even_batches
from llmprune.surgery import cut
from llmprune.targets import target_widths, targets_of
from llmprune.tracking import gate_steps
from llmprune.trained_weights import TrainedWeights
from llmprune.training import GateRun, teacher_of, train_gates
from llmprune.units import map_units
from llmprune.verification import largest_difference, record_reference, reference_logits

# Tokens of each of the two calibration rows that verification compares logits on.
REFERENCE_LENGTH = 24


def prune_units(
    recipe: Recipe, folder: RunFolder, dense: LoadedModel, watch: Watch, *, measure: Measure
) -> Promise | None:
    """Choose units, cut, refit and recover, as far as `folder` does not hold it yet.

    Args:
        recipe: What to do.
        folder: Of the run; gets scores, plan, model and reference logits.
        dense: The dense model, on the device to run on.
        watch: Who runs and who is told.
        measure: Times models, where the budget is a latency.

    Returns:
        Of a latency budget: what its table promises.

    Raises:
        InputError: Anything a user can cause.
    """
    plan, scores = folder.read_plan(), folder.read_scores()
    has_model = folder.model.is_dir()
    # nobody writes before everybody has seen what was there
    watch.accelerator.wait_for_everyone()
    unit_map = map_units(dense.model)
    table = folder.file("latency.json")
    with watch.accelerator.main_process_first():
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
        if by_importance and trains and recipe.gates.prior != "none":
            priors = _priors(recipe, folder, found, watch)
            targets = targets_of(unit_map, recipe, importances=priors, latency=latency)
        if scores is None:
            pool_list = pools(unit_map, targets)
            scores = _score(recipe, folder, found, pool_list, watch)
            if trains and recipe.gates.train != "gates":
                found = replace(found, dense=_anew(recipe, watch))
        if by_importance and not trains:
            targets = targets_of(unit_map, recipe, importances=scores.scores, latency=latency)
        plan = choose(scores, unit_map, targets)
        if watch.accelerator.is_main_process:
            save_text(plan.to_json(), folder.file("plan.json"))
    if not has_model:
        _cut_and_recover(recipe, folder, found, plan, watch)
    return None if latency is None else latency.promise(recipe, plan.widths(unit_map))


def _anew(recipe: Recipe, watch: Watch) -> LoadedModel:
    """The dense model once more: gates were trained with weights that learned along."""
    dense = load_dense(recipe.model)
    dense.model.to(watch.accelerator.device)
    return dense


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
            on_step=watch.steps("recovery", folder, before=gate_steps(recipe)),
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
