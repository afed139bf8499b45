"""Figures of lm-eval tasks in the Hub's format (model-index), for the card of a published model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from llmprune_eval.quality_report import QualityReport, TaskFigures

# Task -> the data set on the Hub that lm-eval takes its rows from: id, configuration, split.
_DATASETS: dict[str, tuple[str, str | None, str]] = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
    "blimp": ("nyu-mll/blimp", None, "train"),
    "mmlu": ("cais/mmlu", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
# Their subtasks are configurations of the same data set.
_GROUPS = ("blimp", "mmlu")


def task_results(evaluation: QualityReport) -> list[EvalResult]:
    """The pruned model's figures of every task whose data set is known, all metrics."""
    label = list(evaluation.models)[-1]
    return [
        _result(task, metric, label, evaluation)
        for task in evaluation.tasks
        if dataset_of(task.name) is not None
        for metric in task.metrics
    ]


def dataset_of(task: str) -> tuple[str, str | None, str] | None:
    """The Hub's data set of a task or subtask: id, configuration, split; None for one's own."""
    for group in _GROUPS:
        if task.startswith(f"{group}_"):
            dataset, _, split = _DATASETS[group]
            return dataset, task.removeprefix(f"{group}_"), split
    return _DATASETS.get(task)


def _result(task: TaskFigures, metric: str, label: str, evaluation: QualityReport) -> EvalResult:
    from huggingface_hub import EvalResult

    known, figure = dataset_of(task.name), task.metrics[metric].figures[label]
    assert known is not None
    dataset, config, split = known
    settings: dict[str, Any] = {
        "num_fewshot": task.num_fewshot,
        "documents": task.num_documents,
        "stderr": None if figure.stderr is None else round(figure.stderr, 4),
        "harness": f"lm-eval {evaluation.environment.get('lm-eval', '')}".strip(),
    }
    # rows that lay on the machine of the run are called by what they were, not by whose they are
    is_local = re.fullmatch(r"[0-9a-f]{64}", task.data) is not None
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=task.name,
        dataset_config=config,
        dataset_split=split,
        dataset_args={"local_rows_sha256": task.data} if is_local else None,
        metric_type=metric,
        metric_name=metric,
        metric_value=round(figure.value, 4),
        metric_args={key: value for key, value in settings.items() if value is not None},
    )
