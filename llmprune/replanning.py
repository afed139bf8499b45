"""Another plan from the scores of a run: a new budget, and no training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmprune.cost import Cost, measure_cost
from llmprune.cut_config import check_form
from llmprune.errors import InputError
from llmprune.estimate import meta_model, random_model
from llmprune.files import replacing, save_text
from llmprune.latency import LatencyTable, Measure, Promise, table_for
from llmprune.overrides import apply_override
from llmprune.plan import PrunePlan
from llmprune.recipe import BUDGET_GOALS, Recipe
from llmprune.run_folder import RunFolder
from llmprune.scores import UnitScores
from llmprune.selection import choose
from llmprune.targets import targets_of
from llmprune.units import UnitMap, Widths, map_units
from llmprune.weight_blocks import BlockMap, choose_blocks, map_blocks

# What a cut needs of the calibration, where it is there.
CARRIED = ("scores.json", "calibration.safetensors", "weights.safetensors")


@dataclass(frozen=True)
class Replanned:
    """A new plan, the folder that it is in, what it leaves of the model, and what that takes."""

    folder: Path
    unit_map: UnitMap
    plan: PrunePlan
    widths: Widths
    dense: Cost
    pruned: Cost
    promise: Promise | None = None


def replan(
    folder: str | Path, budget: Sequence[str], out: str | Path | None = None, *, measure: Measure
) -> Replanned:
    """Choose again for another budget; of the model only its config is read.

    Args:
        folder: A run's folder, with scores.json.
        budget: `key=value` pairs that change the recipe's budget; one of its goals (sparsity,
            latency, latency_ms) takes the place of another.
        out: A new or empty folder, which gets the recipe with the new budget, the scores and the
            plan, so that `prune` with `resume` goes on to the cut there. None: `folder` itself,
            which must hold no model yet.
        measure: Times models, where the budget is a latency that the run has no table for
            (`llmprune_eval.speed.phase_ms`).

    Raises:
        InputError: There are no scores, or a budget that can't be met; nothing is written then.
    """
    run = RunFolder(Path(folder))
    recipe = _with_budget(run, budget)
    scores = _scores_of(run, out)
    model = meta_model(recipe.model)
    unit_map = map_units(model)
    latency = _table(run, recipe, unit_map, measure)
    targets = targets_of(unit_map, recipe, importances=scores.scores, latency=latency)
    plan = choose(scores, unit_map, targets)
    widths = plan.widths(unit_map)
    check_form(model, unit_map, widths, recipe.export.format)
    target = _begin(run, recipe, out)
    if latency is not None:
        latency.save(target.file("latency.json"))
    save_text(plan.to_json(), target.file("plan.json"))
    return Replanned(
        target.path,
        unit_map,
        plan,
        widths,
        dense=measure_cost(unit_map),
        pruned=measure_cost(unit_map, widths),
        promise=None if latency is None else latency.promise(recipe, widths),
    )


def _table(
    run: RunFolder, recipe: Recipe, unit_map: UnitMap, measure: Measure
) -> LatencyTable | None:
    """The run's own table where it is what the budget asks for, else a new one; none is written."""
    file = run.file("latency.json")
    budget = recipe.budget
    if budget is not None and budget.sparsity is None and file.is_file():
        own = LatencyTable.read(file)
        if own.fits(budget, recipe.model.dtype):
            return own
    random = partial(random_model, recipe.model)
    return table_for(None, random, unit_map, recipe, measure=measure)


def replan_blocks(
    folder: str | Path, budget: Sequence[str], out: str | Path | None = None
) -> tuple[Path, BlockMap]:
    """Choose weight blocks again for another sparsity; of the model only its config is read.

    Args:
        folder: A run's folder, with scores.json.
        budget: `key=value` pairs that change the recipe's `prune.weight_blocks` (its sparsity, or
            `rows`).
        out: As for `replan`.

    Returns:
        The folder that the plan is in, and what it keeps.

    Raises:
        InputError: There are no scores, or they are of other blocks; nothing is written then.
    """
    run = RunFolder(Path(folder))
    before = run.read_recipe()
    data = before.model_dump(mode="json")
    for override in budget:
        apply_override(data, f"prune.weight_blocks.{override}")
    recipe = Recipe.parse(data, name="--budget")
    rule, old = recipe.prune.weight_blocks, before.prune.weight_blocks
    assert rule is not None
    assert old is not None
    if (rule.block, rule.modules) != (old.block, old.modules):
        raise InputError(
            "--budget: scores are of the blocks that calibration saw, so only sparsity and rows "
            "can change; prune anew for other blocks or modules"
        )
    scores = _scores_of(run, out)
    block_map = map_blocks(meta_model(recipe.model), rule)
    plan = choose_blocks(scores, block_map)
    target = _begin(run, recipe, out)
    save_text(plan.to_json(), target.file("plan.json"))
    return target.path, block_map


def _scores_of(run: RunFolder, out: str | Path | None) -> UnitScores:
    """The scores to plan from; refused where a plan would change under a model."""
    scores = run.read_scores()
    if scores is None:
        raise InputError(
            f"{run.path}: must hold scores.json to plan from; run prune --resume first"
        )
    if out is None and run.model.exists():
        raise InputError(
            f"{run.path}: already holds a model that its plan gave; name a new folder with --out"
        )
    return scores


def _begin(run: RunFolder, recipe: Recipe, out: str | Path | None) -> RunFolder:
    """The folder for the new plan, with the new recipe and what a cut needs."""
    if out is None:
        # never a plan beside a budget that it is not for
        run.file("plan.json").unlink(missing_ok=True)
        save_text(recipe.to_yaml(), run.file("recipe.yaml"))
        return run
    target = RunFolder.begin(Path(out), recipe, resume=False)
    for name in (name for name in CARRIED if run.file(name).is_file()):
        with replacing(target.file(name)) as temporary:
            shutil.copyfile(run.file(name), temporary)
    return target


def _with_budget(run: RunFolder, budget: Sequence[str]) -> Recipe:
    data = run.read_recipe().model_dump(mode="json")
    data["budget"] = data["budget"] or {}
    if any(pair.partition("=")[0] in BUDGET_GOALS for pair in budget):
        data["budget"] = {k: v for k, v in data["budget"].items() if k not in BUDGET_GOALS}
    for pair in budget:
        apply_override(data["budget"], pair, option="--budget")
    return Recipe.parse(data, name=str(run.file("recipe.yaml")))
