"""THE MAIN PATH: recipe in, smaller model out; a file saved after each step.

Read this file first, then unit_pruning.py: choose, cut, refit, recover; every function called there
is one step, in the module of its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.accelerator import start_accelerator
from llmprune.architectures import architecture_of
from llmprune.block_pruning import prune_blocks
from llmprune.block_sparse import keep_faster
from llmprune.checkpoint import load_pruned
from llmprune.files import save_text
from llmprune.latency import Promise
from llmprune.recipe import Recipe
from llmprune.run_folder import TRACKING_FOLDER, RunFolder, settle_precision
from llmprune.run_steps import OnProgress, Watch, silent
from llmprune.sources import LoadedModel, load_config, load_dense
from llmprune.tracking import check_installed, final_figures, tracked, training_steps
from llmprune.unit_pruning import prune_units
from llmprune.verification import verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune_eval.report import EvalReport


@dataclass(frozen=True)
class Pruned:
    """What a run gave: its folder, the model, and the figures beside the dense model's."""

    folder: Path
    model: PreTrainedModel
    report: EvalReport


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
    check_installed(recipe.tracking)
    recipe = settle_precision(recipe, Path(out))
    accelerator = start_accelerator(
        recipe.training,
        recipe.seed,
        trackers=recipe.tracking.trackers,
        project_dir=Path(out) / TRACKING_FOLDER,
    )
    is_main = accelerator.is_main_process
    watch = Watch(accelerator, on_progress if is_main else silent)
    with watch.accelerator.main_process_first():
        folder = RunFolder.begin(Path(out), recipe, resume=resume or not is_main)
    architecture_of(load_config(recipe.model).model_type)
    with tracked(accelerator, recipe, folder):
        return _run(recipe, folder, watch)


def _run(recipe: Recipe, folder: RunFolder, watch: Watch) -> Pruned | None:
    """All steps, as far as the folder does not hold them yet."""
    from llmprune_eval.speed import phase_ms

    watch.on_progress("load the dense model", 0, 1)
    dense = load_dense(recipe.model)
    dense.model.to(watch.accelerator.device)
    watch.on_progress("load the dense model", 1, 1)
    promise = None
    if recipe.prune.weight_blocks is not None:
        prune_blocks(recipe, folder, dense, watch)
    else:
        measure = partial(phase_ms, on_round=partial(watch.on_progress, "latency table"))
        promise = prune_units(recipe, folder, dense, watch, measure=measure)
    if not watch.accelerator.is_main_process:
        return None
    watch.on_progress("verify", 0, 1)
    verify(folder.path)
    watch.on_progress("verify", 1, 1)
    sparse = recipe.prune.weight_blocks is not None
    pruned = load_pruned(folder.path, block_sparse=sparse).to(watch.accelerator.device)
    keep_faster(pruned)
    dense = load_dense(recipe.model) if recipe.gates.train != "gates" else dense
    dense.model.to(watch.accelerator.device)
    report = _evaluate(recipe, folder, dense, pruned, promise, watch)
    # one step later than the last, or trackers would show it as that one's
    watch.accelerator.log(final_figures(report), step=training_steps(recipe) + 1)
    return Pruned(folder.path, pruned, report)


def _evaluate(
    recipe: Recipe,
    folder: RunFolder,
    dense: LoadedModel,
    pruned: PreTrainedModel,
    promise: Promise | None,
    watch: Watch,
) -> EvalReport:
    """Measure both models; write report.json, README.md and report.html."""
    from llmprune_eval.card_file import write_card
    from llmprune_eval.evaluation import evaluate
    from llmprune_eval.html_report import write_report

    report = evaluate(
        dense.model,
        pruned,
        dense.tokenizer,
        recipe=recipe,
        folder=folder.model,
        promise=promise,
        on_progress=watch.on_progress,
    ).model_copy(update={"origin": dense.origin})
    save_text(report.to_json(), folder.report)
    write_card(folder.path)
    write_report(folder.path)
    return report
