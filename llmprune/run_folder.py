"""RunFolder: the files that a run leaves after each step, and what is there to resume from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from llmprune.scores import UnitScores

RECIPE_FILE = "recipe.yaml"
TRACKING_FOLDER = "tracking"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; `begin` makes or takes it up."""

    path: Path

    @staticmethod
    def begin(path: Path, recipe: Recipe, *, resume: bool) -> RunFolder:
        """Make the folder, or take up a run of the same recipe.

        Raises:
            InputError: The folder holds something else, a finished or broken run without
                `resume`, or a run of another recipe.
        """
        file = path / RECIPE_FILE
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: --out must be a folder, got a file; choose another --out")
        if file.is_file() and _holds_results(path):
            if not resume:
                raise InputError(
                    f"{path}: already holds a run; take it up with --resume or choose another --out"
                )
            if Recipe.read(file) != recipe:
                raise InputError(
                    f"{path}: --resume needs the recipe that began the run ({file.name} there "
                    "differs); choose another --out"
                )
        elif path.exists() and not file.is_file() and any(path.iterdir()):
            raise InputError(
                f"{path}: --out must be empty or new, it holds other files; choose another"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: --out can't be made ({error.strerror})") from error
        for leftover in path.glob(".*.tmp*"):
            # a kill in the middle of a save leaves these behind
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        save_text(recipe.to_yaml(), file)
        return RunFolder(path)

    @property
    def state(self) -> Path:
        """The state of a gate training that is under way."""
        return self.path / "gates.safetensors"

    @property
    def weights(self) -> Path:
        """Weights that were trained along with the gates."""
        return self.path / "weights.safetensors"

    @property
    def log(self) -> Path:
        """Losses and settings of every step, one JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def tracking(self) -> Path:
        """What experiment trackers write."""
        return self.path / TRACKING_FOLDER

    @property
    def model(self) -> Path:
        """The pruned model."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """Figures of the dense and the pruned model."""
        return self.path / "report.json"

    def file(self, name: str) -> Path:
        """Any other file of the run."""
        return self.path / name

    def read_scores(self) -> UnitScores | None:
        """The scores of a finished calibration, if there are any."""
        file = self.file("scores.json")
        return UnitScores.from_json(file.read_text(), name=file.name) if file.is_file() else None

    def read_plan(self) -> PrunePlan | None:
        """The plan, if there is one (made by `choose`, or written by hand)."""
        file = self.file("plan.json")
        return PrunePlan.read(file) if file.is_file() else None

    def read_recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            InputError: This is not the folder of a run.
        """
        if not self.file(RECIPE_FILE).is_file():
            raise InputError(
                f"{self.path}: must be a folder that prune wrote, got no {RECIPE_FILE}"
            )
        return Recipe.read(self.file(RECIPE_FILE))

    def forget_steps(self, phase: str, first: int) -> None:
        """Take the steps from `first` on out of the log: a resumed run does them again."""
        if not self.log.is_file():
            return
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [(line, json.loads(line)) for line in lines]
        kept = [line for line, row in rows if row["phase"] != phase or row["step"] < first]
        if len(kept) < len(lines):
            save_text("".join(kept), self.log)

    def add_to_log(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Append one step with its figures to the log."""
        row = {"phase": phase, "step": step, **figures}
        whole = self.log.stat().st_size if self.log.is_file() else 0
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            os.truncate(self.log, whole)
            raise InputError(
                f"{self.log.name}: could not be written ({error.strerror}); make room, "
                "then --resume"
            ) from error


def _holds_results(path: Path) -> bool:
    """Whether a run got further than its recipe; one that was refused at once did not."""
    early = (RECIPE_FILE, TRACKING_FOLDER)
    return any(file.name not in early and ".tmp" not in file.name for file in path.iterdir())


def settle_precision(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with `mixed_precision: auto` settled: as the run in `path` began, or measured.

    Raises:
        InputError: Several processes run, which might measure differently.
    """
    if recipe.training.mixed_precision != "auto":
        return recipe
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "training.mixed_precision must be no or bf16 where several processes run, got auto"
        )
    from llmprune.precision import faster_precision

    begun = path / RECIPE_FILE
    taken = Recipe.read(begun).training.mixed_precision if begun.is_file() else faster_precision()
    training = recipe.training.model_copy(update={"mixed_precision": taken})
    return recipe.model_copy(update={"training": training})


def identity_of(recipe: Recipe, fingerprint: str, origin: str) -> str:
    """What two runs must share for one to take up the other's state, as a sha256 in hex."""
    not_seen = {"evaluation", "export", "recovery", "tracking"}
    parts = recipe.model_dump(mode="json", exclude=not_seen)
    text = json.dumps([parts, fingerprint, origin], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
