"""What the steps of a run share: who watches it, the rows, and what units add on average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from llmprune.batches import OnStep
from llmprune.calibration import CalibrationSet
from llmprune.compensation import UnitMeans
from llmprune.recipe import Recipe
from llmprune.run_folder import RunFolder
from llmprune.scoring import unit_means
from llmprune.self_generated import row_starts, sample_rows, self_generated_set
from llmprune.sources import LoadedModel
from llmprune.texts import corpus_of, num_self_generated, read_texts, resolve_text, text_name
from llmprune.units import UnitMap

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")
# task, done, of how many
OnProgress = Callable[[str, int, int], None]


def silent(task: str, done: int, total: int) -> None:
    """Report progress to no one."""


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

    def steps(self, task: str, folder: RunFolder, *, before: int = 0) -> OnStep:
        """A callback for training steps, whose figures it logs on the main process.

        Args:
            task: Of the run; begins the names that trackers get.
            folder: Whose log is written.
            before: Steps of the tasks before: trackers take steps in one ascending order.
        """

        started: list[int] = []

        def on_step(step: int, steps: int, figures: Mapping[str, float]) -> None:
            if self.accelerator.is_main_process:
                if not started:
                    started.append(step)
                    folder.forget_steps(task, step)
                folder.add_to_log(task, step, figures)
                named = {f"{task}/{name}": value for name, value in figures.items()}
                self.accelerator.log(named, step=before + step)
            self.on_progress(task, step, steps)

        return on_step


def read_calibration(
    recipe: Recipe, dense: LoadedModel, folder: RunFolder, watch: Watch
) -> CalibrationSet:
    """The rows that gates and weights are trained on."""
    source = resolve_text(recipe.calibration)
    num_own = num_self_generated(source)
    own = _own_rows(num_own, recipe, dense, folder, watch) if num_own else None
    if num_own == source.num_rows:
        assert own is not None
        return own
    texts = CalibrationSet.from_texts(
        read_texts(source),
        dense.tokenizer,
        num_rows=source.num_rows - num_own,
        row_length=source.row_length,
        seed=recipe.seed,
        name=text_name(source),
        corpus=corpus_of(source),
    )
    return texts if own is None else texts.mixed_with(own)


def _own_rows(
    num_rows: int, recipe: Recipe, dense: LoadedModel, folder: RunFolder, watch: Watch
) -> CalibrationSet:
    """Rows that the dense model writes, sampled once a run."""
    starts = row_starts(recipe.calibration.self_generated_as, dense.model, dense.tokenizer)

    def sample() -> Tensor:
        with watch.accelerator.autocast():
            return sample_rows(
                dense.model,
                num_rows=num_rows,
                row_length=recipe.calibration.row_length,
                seed=recipe.seed,
                starts=starts,
                on_token=partial(watch.on_progress, "calibration text"),
            )

    with watch.accelerator.main_process_first():
        return self_generated_set(
            folder.file("calibration.safetensors"),
            sample,
            seed=recipe.seed,
            may_write=watch.accelerator.is_main_process,
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
