"""RunRecord: everything that a run folder tells, read at once; what is missing is None or empty."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmprune.errors import InputError
from llmprune.plan import FORMAT, PrunePlan
from llmprune.run_folder import RunFolder
from llmprune.verification import RESULT_FILE, Verification
from llmprune.weight_blocks import BlockPlan
from llmprune_eval.report import EvalReport
from llmprune_eval.results_of_run import AnotherModelError, read_bench, read_evaluation
from llmprune_eval.training_log import TrainingLog, read_log

if TYPE_CHECKING:
    from llmprune.recipe import Recipe
    from llmprune.scores import UnitScores
    from llmprune_eval.bench_report import BenchReport
    from llmprune_eval.quality_report import QualityReport

Result = TypeVar("Result")

# What a run is repeated from; their hashes tell whether it was.
_HASHED = ("recipe.yaml", "plan.json", "scores.json")


@dataclass(frozen=True)
class RunRecord:
    """What a run left.

    Attributes:
        recipe: Of the run.
        plan: What was kept; None where the run has not chosen yet.
        scores: What it was chosen by; None where the plan was written by hand.
        log: Losses and gates of every step.
        report: Figures of both models; None where they were not measured.
        bench: What `llmprune bench` measured; None where it was not run.
        evaluation: What `llmprune eval` measured; None where it was not run.
        outdated: Files of results that are left out, because the model is another one now.
        verification: How far the reloaded model's logits are off; None where it was not checked.
        hashes: File -> SHA-256 in hex.
    """

    recipe: Recipe
    plan: PrunePlan | BlockPlan | None
    scores: UnitScores | None
    log: TrainingLog
    report: EvalReport | None
    bench: BenchReport | None
    evaluation: QualityReport | None
    outdated: tuple[str, ...]
    verification: Verification | None
    hashes: Mapping[str, str]

    @property
    def name(self) -> str:
        """What the dense model is called; never a path."""
        return self.recipe.model.source.rstrip("/").rpartition("/")[2]


def read_run(path: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        InputError: It is not the folder of a run, or a file in it is not what its name says.
    """
    folder = RunFolder(path)
    recipe = folder.read_recipe()
    outdated: list[str] = []
    return RunRecord(
        recipe=recipe,
        plan=_read_plan(folder.file("plan.json")),
        scores=folder.read_scores(),
        log=read_log(folder.log),
        report=_read_report(folder.report),
        bench=_unless_outdated(read_bench, path, outdated),
        evaluation=_unless_outdated(read_evaluation, path, outdated),
        outdated=tuple(outdated),
        verification=_read_verification(folder.file(RESULT_FILE)),
        hashes={
            name: hashlib.sha256(folder.file(name).read_bytes()).hexdigest()
            for name in _HASHED
            if folder.file(name).is_file()
        },
    )


def _read_plan(file: Path) -> PrunePlan | BlockPlan | None:
    if not file.is_file():
        return None
    # a plan of units says so in its first line; all else is for the other's reader to refuse
    if f'"{FORMAT}"' in file.read_text(encoding="utf-8")[:200]:
        return PrunePlan.read(file)
    return BlockPlan.read(file)


def _unless_outdated(
    read: Callable[[Path], Result | None], folder: Path, outdated: list[str]
) -> Result | None:
    """Results of the model in the folder; of another's None, and the file's name is noted."""
    try:
        return read(folder)
    except AnotherModelError as error:
        outdated.append(error.name)
        return None


def _read_report(file: Path) -> EvalReport | None:
    if not file.is_file():
        return None
    return EvalReport.from_json(file.read_text(encoding="utf-8"), name=file.name)


def _read_verification(file: Path) -> Verification | None:
    if not file.is_file():
        return None
    try:
        return Verification.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{file.name}: must be what `llmprune verify` wrote; run it again"
        ) from error
