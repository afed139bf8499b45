"""Pruning blocks of weights: from a dense model and its rows to one with zero blocks.

The model keeps its shape and stays an ordinary checkpoint; which blocks are stored lies beside it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from llmprune.block_gates import BlockGates, gated
from llmprune.block_reconstruction import reconstruct_blocks
from llmprune.block_scores import score_blocks
from llmprune.calibration import CalibrationSet
from llmprune.checkpoint import cast_parameters, load_weights, save_pruned
from llmprune.files import save_tensors, save_text
from llmprune.recipe import Method, Recipe
from llmprune.recipe_training import Prior
from llmprune.recovery import recover
from llmprune.run_folder import RunFolder, identity_of
from llmprune.run_steps import Watch, read_calibration
from llmprune.scores import UnitScores
from llmprune.sources import LoadedModel
from llmprune.streams import even_batches
from llmprune.tracking import gate_steps
from llmprune.trained_weights import TrainedWeights
from llmprune.training import GateRun, teacher_of, train_gates
from llmprune.unit_pruning import REFERENCE_LENGTH
from llmprune.units import map_units
from llmprune.verification import largest_difference, record_reference, reference_logits
from llmprune.weight_blocks import (
    BlockMap,
    BlockPlan,
    choose_blocks,
    map_blocks,
    weight_of,
    zero_blocks,
)


def prune_blocks(recipe: Recipe, folder: RunFolder, dense: LoadedModel, watch: Watch) -> None:
    """Choose blocks, zero the rest and recover, as far as `folder` does not hold it yet.

    Args:
        recipe: What to do; it has `prune.weight_blocks`.
        folder: Of the run; gets scores, plan, model with block index, and reference logits.
        dense: The dense model, on the device to run on; left as it is.
        watch: Who runs and who is told.

    Raises:
        InputError: Anything a user can cause.
    """
    rule = recipe.prune.weight_blocks
    assert rule is not None
    file = folder.file("plan.json")
    plan = BlockPlan.read(file) if file.is_file() else None
    scores, has_model = folder.read_scores(), folder.model.is_dir()
    # nobody writes before everybody has seen what was there
    watch.accelerator.wait_for_everyone()
    block_map = map_blocks(dense.model, rule)
    rows = read_calibration(recipe, dense, folder, watch)
    if plan is None:
        scores = scores or _score(recipe, folder, dense, block_map, rows, watch)
        plan = choose_blocks(scores, block_map)
        if watch.accelerator.is_main_process:
            save_text(plan.to_json(), file)
    plan.validate(dense.model)
    if not has_model:
        _zero_and_recover(recipe, folder, dense, block_map, plan, rows, watch)


def _score(
    recipe: Recipe,
    folder: RunFolder,
    dense: LoadedModel,
    block_map: BlockMap,
    rows: CalibrationSet,
    watch: Watch,
) -> UnitScores:
    """Score every block as `recipe.method` says, and save scores.json."""
    if recipe.method == "sequential_attention":
        scores = _train(recipe, folder, dense, block_map, rows, watch)
    else:
        scores = UnitScores(block_scores(recipe.method, recipe, dense, block_map, rows, watch))
    if watch.accelerator.is_main_process:
        save_text(scores.to_json(), folder.file("scores.json"))
        for state in folder.path.glob(f"{folder.state.stem}*{folder.state.suffix}"):
            state.unlink()
    watch.accelerator.wait_for_everyone()
    return scores


def block_scores(
    name: Method | Prior,
    recipe: Recipe,
    dense: LoadedModel,
    block_map: BlockMap,
    rows: CalibrationSet,
    watch: Watch,
) -> dict[str, Tensor]:
    """Scores that take no training, on the first `gates.prior_rows` rows."""
    with watch.accelerator.autocast():
        return score_blocks(
            name,
            dense.model,
            block_map,
            rows.rows[: recipe.gates.prior_rows],
            seed=recipe.seed,
            over=watch.over,
        )


def _train(
    recipe: Recipe,
    folder: RunFolder,
    dense: LoadedModel,
    block_map: BlockMap,
    rows: CalibrationSet,
    watch: Watch,
) -> UnitScores:
    """Put gates on, train them, and save the weights that learned along."""
    settings = recipe.gates
    priors = None
    if settings.prior != "none" and settings.variant != "magnitude":
        priors = block_scores(settings.prior, recipe, dense, block_map, rows, watch)
    # weights that learn along are a copy's: the dense model is still needed
    model = dense.model if settings.train == "gates" else copy.deepcopy(dense.model)
    weights = TrainedWeights(model, settings.train, settings.lora_rank, recipe.seed)
    gates = BlockGates(model, block_map)
    teacher = dense.model if settings.train != "gates" else model
    run = GateRun(
        watch.accelerator,
        weights,
        teacher_of(teacher, gates, weights),
        priors=priors,
        state_file=folder.state,
        identity=identity_of(recipe, rows.fingerprint(), dense.origin),
        on_step=watch.steps("gates", folder),
    )
    try:
        scores = train_gates(model, gates, rows, block_map.pools(), recipe=recipe, run=run)
    finally:
        gates.detach()
        weights.finish()
    if watch.accelerator.is_main_process and weights.parameters:
        changed = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
        save_tensors(changed, folder.weights, {"of": "calibrated model"})
    return scores


@torch.no_grad()
def _fold_scales(model: torch.nn.Module, scores: UnitScores | None, block_map: BlockMap) -> None:
    """Multiply gates that end at other values than 1 into the weights, in place."""
    if scores is None or not scores.scale:
        return
    for name, projection in block_map.projections.items():
        weight = weight_of(model, name)
        weight.copy_(gated(weight, scores.scale[name].to(weight.device), projection))


def _zero_and_recover(
    recipe: Recipe,
    folder: RunFolder,
    dense: LoadedModel,
    block_map: BlockMap,
    plan: BlockPlan,
    rows: CalibrationSet,
    watch: Watch,
) -> None:
    """Zero blocks, compare with the gated model, recover, and save model and reference logits."""
    pruned = copy.deepcopy(dense.model)
    if folder.weights.is_file():
        load_weights(pruned, folder.weights)
    _fold_scales(pruned, folder.read_scores(), block_map)
    gates = BlockGates(pruned, block_map)
    gates.set_plan(plan)
    tokens = rows.rows[:2, :REFERENCE_LENGTH]
    logits = reference_logits(pruned, tokens)
    with gates.opened():
        zero_blocks(pruned, plan)
        difference = largest_difference(reference_logits(pruned, tokens), logits)
    dtype = getattr(torch, recipe.export.dtype)
    refit = recipe.reconstruction
    is_final = refit is None and recipe.recovery.steps == 0 and dtype == pruned.dtype
    if refit is not None or recipe.recovery.steps:
        # small changes add up in float32 and are lost in 16 bits
        cast_parameters(pruned, torch.float32)
    if refit is not None:
        reconstruct_blocks(
            pruned,
            dense.model,
            map_units(dense.model),
            plan,
            batches=even_batches(rows.rows[: refit.num_rows]),
            ridge=refit.ridge,
            on_layer=lambda done, total: watch.on_progress("reconstruction", done, total),
        )
    if recipe.recovery.steps:
        # the closed gates stay on: what is zero gets no gradient, and stays zero
        recover(
            pruned,
            rows,
            recipe=recipe,
            accelerator=watch.accelerator,
            teacher=dense.model,
            on_step=watch.steps("recovery", folder, before=gate_steps(recipe)),
            first_row=0 if refit is None else refit.num_rows,
        )
        zero_blocks(pruned, plan)
    gates.detach()
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
        save_pruned(pruned, dense.tokenizer, folder.model, plan)
    watch.accelerator.wait_for_everyone()
