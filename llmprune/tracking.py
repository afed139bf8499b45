"""Experiment trackers (tensorboard, trackio, wandb) through Accelerate, beside the run's log.jsonl.

They are told what the log is told, of every step, on the main process alone. A resumed run goes on
in the tracker's run that it began, from the step that it takes up.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmprune.disclosure import hide_secrets, without_paths
from llmprune.downloads import one_line
from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.hub import known_token
from llmprune.publication import public_recipe
from llmprune.run_folder import RunFolder
from llmprune.training import read_note, state_of_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmprune.recipe import Recipe
    from llmprune.recipe_training import Tracking
    from llmprune_eval.report import EvalReport


def check_installed(tracking: Tracking) -> None:
    """Check that the package of every tracker is there; Accelerate leaves out those that are not.

    Raises:
        InputError: One is not.
    """
    for name in tracking.trackers:
        spec = importlib.util.find_spec(name)
        # a folder of that name, such as wandb leaves, is found but has no origin
        if spec is None or spec.origin is None:
            raise InputError(
                f"tracking.trackers: the package of a tracker must be installed, {name} is not; "
                f"`pip install {name}`, or take it out"
            )


def gate_steps(recipe: Recipe) -> int:
    """Steps that gates are trained for, over all seeds."""
    trains = recipe.method == "sequential_attention"
    return recipe.gates.steps * recipe.gates.seeds if trains else 0


def training_steps(recipe: Recipe) -> int:
    """Steps of gates and recovery."""
    return gate_steps(recipe) + recipe.recovery.steps


@contextmanager
def tracked(accelerator: Accelerator, recipe: Recipe, folder: RunFolder) -> Iterator[None]:
    """Start the trackers that the accelerator was made with, and end them after the block.

    Args:
        accelerator: Of the run; `log` reaches the trackers inside the block.
        recipe: Trackers get it as their configuration, without tokens and paths of this machine.
        folder: Of the run; holds what trackers write, and the name of their run.

    Raises:
        InputError: A tracker can't be started, for want of a login, say.
    """
    names = recipe.tracking.trackers
    if not names or not accelerator.is_main_process:
        yield
        return
    file = folder.tracking / "run.json"
    is_new = steps_done(recipe, folder) == 0
    if is_new or not file.is_file():
        file.parent.mkdir(exist_ok=True)
        save_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", file)
    run_id = str(json.loads(file.read_text(encoding="utf-8"))["id"])
    try:
        accelerator.init_trackers(
            recipe.tracking.project,
            config=configuration(recipe) if is_new else None,
            init_kwargs=_options(recipe, folder, run_id),
        )
    except _failures(names) as error:
        why = hide_secrets(one_line(error), known_token())
        # the cause is left out: it may quote what the tracker was given
        raise InputError(
            f"tracking.trackers: {', '.join(names)} must start, got: {why}; log in, switch it to "
            "offline, or take it out"
        ) from None
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def steps_done(recipe: Recipe, folder: RunFolder) -> int:
    """Steps that a run will not do again, of all that its trackers are told of.

    Raises:
        InputError: The state of a gate training is damaged.
    """
    if folder.model.is_dir():
        return training_steps(recipe)
    if folder.file("plan.json").is_file() or folder.file("scores.json").is_file():
        return gate_steps(recipe)
    states = [state_of_seed(folder.state, index) for index in range(recipe.gates.seeds)]
    return sum(int(read_note(file).get("step", 0)) for file in states if file.is_file())


def configuration(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The recipe as flat keys, as a stranger may read it: no token, no path of this machine."""
    token = known_token()
    flat = dict(_flat(public_recipe(recipe, "").model_dump(mode="json", exclude={"tracking"})))
    return {
        key: without_paths(hide_secrets(value, token)) if isinstance(value, str) else value
        for key, value in flat.items()
    }


def final_figures(report: EvalReport) -> dict[str, float]:
    """What a finished run is compared by: its figures over the dense model's."""
    found = {"evaluation/parameters_ratio": report.pruned.parameters / report.dense.parameters}
    for text in report.perplexities:
        found[f"evaluation/perplexity/{text.name}"] = text.pruned.value
        found[f"evaluation/perplexity_ratio/{text.name}"] = text.pruned.value / text.dense.value
    return found


def _flat(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves under dotted keys; what no tracker takes (lists, null) as JSON."""
    for key, value in part.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _options(recipe: Recipe, folder: RunFolder, run_id: str) -> dict[str, dict[str, Any]]:
    """How each tracker finds the run that it goes on with."""
    name = folder.path.resolve().name
    return {
        # what a killed run did after the state that is taken up is done, and told, again
        "tensorboard": {"purge_step": steps_done(recipe, folder) + 1},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
        "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(folder.tracking)},
    }


def _failures(names: tuple[str, ...]) -> tuple[type[Exception], ...]:
    """What trackers raise where they can't start."""
    known: tuple[type[Exception], ...] = (OSError, ValueError)
    if "wandb" not in names:
        return known
    import wandb

    return (*known, wandb.Error)
