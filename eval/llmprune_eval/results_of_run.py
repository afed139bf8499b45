"""What `llmprune eval` and `bench` left in a run's folder, checked to be of the model it holds."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llmprune.checkpoint import MODEL_FOLDER
from llmprune.downloads import weight_files
from llmprune.errors import InputError
from llmprune.publication import BENCH_FILE, EVALUATION_FILE
from llmprune.recipe import ModelSource
from llmprune_eval.bench_report import BenchReport
from llmprune_eval.quality_report import QualityReport
from llmprune_eval.subjects import Subject


class AnotherModelError(InputError):
    """Results of a model that the folder no longer holds; `name` is their file, in the folder."""

    def __init__(self, folder: Path, name: str, command: str) -> None:
        super().__init__(
            f"{folder / name}: must be of the model beside it, which is another now or gone; run "
            f"`{command}` again, or delete it"
        )
        self.name = name


def on_the_page(run: str) -> str:
    """Where results that were just written into a run's folder can be seen."""
    return f"`llmprune report {run}` puts it on the page of the run"


def read_evaluation(folder: Path) -> QualityReport | None:
    """The evaluation of a run; None where there is none.

    Raises:
        InputError: It is damaged.
        AnotherModelError: Weights, config or tokenizer have changed since, or are gone.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return None
    report = QualityReport.from_json(file.read_text(encoding="utf-8"), name=EVALUATION_FILE)
    line = list(report.models.values())[-1]
    model = ModelSource.model_validate({"source": str(folder / MODEL_FOLDER), "dtype": line.dtype})
    is_there = (folder / MODEL_FOLDER).is_dir()
    if not is_there or Subject("pruned", model, line.name).fingerprint() != line.fingerprint:
        raise AnotherModelError(folder, EVALUATION_FILE, f"llmprune eval {folder}")
    return report


def read_bench(folder: Path) -> BenchReport | None:
    """The latencies of a run; None where there are none.

    Raises:
        InputError: The file is damaged.
        AnotherModelError: The weights have another size, or are gone.
    """
    file = folder / BENCH_FILE
    if not file.is_file():
        return None
    try:
        report = BenchReport.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise InputError(
            f"{BENCH_FILE}: is damaged or of another version; run `llmprune bench {folder}` again, "
            "or delete it"
        ) from error
    facts = list(report.models.values())[-1]
    files = weight_files(folder / MODEL_FOLDER, str(folder))
    if facts.weight_bytes != sum(weights.stat().st_size for weights in files):
        raise AnotherModelError(folder, BENCH_FILE, f"llmprune bench {folder}")
    return report
