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


def read_evaluation(folder: Path) -> QualityReport | None:
    """The evaluation of a run; None where there is none.

    Raises:
        InputError: It is damaged, or of weights, config or tokenizer that have changed since.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return None
    report = QualityReport.from_json(file.read_text(encoding="utf-8"), name=EVALUATION_FILE)
    line = list(report.models.values())[-1]
    model = ModelSource.model_validate({"source": str(folder / MODEL_FOLDER), "dtype": line.dtype})
    if Subject("pruned", model, line.name).fingerprint() != line.fingerprint:
        raise _of_another(file, f"llmprune eval {folder}")
    return report


def read_bench(folder: Path) -> BenchReport | None:
    """The latencies of a run; None where there are none.

    Raises:
        InputError: The file is damaged, or of a model whose weights have another size.
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
        raise _of_another(file, f"llmprune bench {folder}")
    return report


def _of_another(file: Path, command: str) -> InputError:
    return InputError(
        f"{file}: must be of the model beside it, which is another now; run `{command}` again, or "
        "delete it"
    )
