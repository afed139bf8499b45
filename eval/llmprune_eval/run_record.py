"""RunRecord: everything that a run folder tells, read at once; what is missing is None or empty."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError
from llmprune.plan import FORMAT, PrunePlan
from llmprune.run_folder import RunFolder
from llmprune.verification import RESULT_FILE, Verification
from llmprune.weight_blocks import BlockPlan
from llmprune_eval.report import EvalReport

if TYPE_CHECKING:
    from llmprune.recipe import Recipe
    from llmprune.scores import UnitScores

# What a run is repeated from; their hashes tell whether it was.
_HASHED = ("recipe.yaml", "plan.json", "scores.json")


@dataclass(frozen=True)
class RunRecord:
    """What a run left.

    Attributes:
        recipe: Of the run.
        plan: What was kept; None where the run has not chosen yet.
        scores: What it was chosen by; None where the plan was written by hand.
        losses: Phase (`gates`, `recovery`) -> (step, loss) in the log's order, finite losses only.
        report: Figures of both models; None where they were not measured.
        verification: How far the reloaded model's logits are off; None where it was not checked.
        hashes: File -> SHA-256 in hex.
    """

    recipe: Recipe
    plan: PrunePlan | BlockPlan | None
    scores: UnitScores | None
    losses: Mapping[str, tuple[tuple[int, float], ...]]
    report: EvalReport | None
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
    return RunRecord(
        recipe=recipe,
        plan=_read_plan(folder.file("plan.json")),
        scores=folder.read_scores(),
        losses=_read_losses(folder.log),
        report=_read_report(folder.report),
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


def _read_losses(log: Path) -> dict[str, tuple[tuple[int, float], ...]]:
    found: dict[str, list[tuple[int, float]]] = {}
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            row = _row(line)
            if row is not None and math.isfinite(row["loss"]):
                found.setdefault(str(row["phase"]), []).append((int(row["step"]), row["loss"]))
    return {phase: tuple(rows) for phase, rows in found.items()}


def _row(line: str) -> dict[str, Any] | None:
    """One line of the log; None for the half of one that a kill left."""
    try:
        row = json.loads(line)
        return {"phase": row["phase"], "step": int(row["step"]), "loss": float(row["loss"])}
    except (ValueError, KeyError, TypeError):
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
