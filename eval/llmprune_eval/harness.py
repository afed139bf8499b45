"""lm-eval: the only file that imports it. A model and a task in, scores and lm-eval's files out."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import lm_eval.tasks
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable

from llmprune.downloads import UnreachableError, one_line
from llmprune.errors import InputError
from llmprune.files import replacing, save_text
from llmprune.recipe import TextSource
from llmprune.texts import check_reachable
from llmprune_eval.suite import SuiteTask
from llmprune_eval.task_files import WrittenTask, write_task
from llmprune_eval.task_scores import MetricScores, TaskKey, TaskScores, metric_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = str(lm_eval.__version__)
# For the standard error of lambada's perplexity alone; lm-eval has a formula for means.
BOOTSTRAP_ITERS = 1000
# requests done, of how many
OnRequest = Callable[[int, int], None]


class PreparedTask:
    """A task's YAML and rows in a temporary folder; use it as a context manager."""

    def __init__(self, name: str, task: SuiteTask, data: Path | None) -> None:
        self.name, self.task, self.data = name, task, data

    def __enter__(self) -> PreparedTask:
        self._scratch = tempfile.TemporaryDirectory(prefix="llmprune-eval-")
        self.folder = Path(self._scratch.name)
        try:
            self.written = write_yaml(self.name, self.task, self.data, self.folder)
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._scratch.cleanup()

    def check_data(self) -> None:
        """Check that the Hub has the data sets, before a model is loaded for them.

        Raises:
            InputError: The Hub says no, or neither it nor the cache can be read.
        """
        for path, config in self.written.hub:
            try:
                check_reachable(TextSource(dataset=path, config=config))
            except UnreachableError as error:
                raise InputError(
                    f"{self.name}: needs the data set {path}: {error}; connect to the network, or "
                    "name a folder of local files with --data (docs/evaluation.md)"
                ) from error

    def key(self, model: str, device: str) -> TaskKey:
        """What scores of this task are stored under, for a model's fingerprint on a device."""
        return TaskKey(
            model=model,
            task=self.name,
            limit=self.task.limit,
            num_fewshot=self.task.num_fewshot,
            data=self.written.data,
            version=VERSION,
            device=device,
        )


def write_yaml(name: str, task: SuiteTask, data: Path | None, folder: Path) -> WrittenTask:
    """Write what `lm-eval run --include_path FOLDER` needs for one task; see `write_task`."""
    shipped = Path(str(lm_eval.tasks.__file__)).parent
    return write_task(name, task, shipped=shipped, data=data, folder=folder)


def run_task(
    prepared: PreparedTask,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    on_request: OnRequest,
) -> dict[str, Any]:
    """lm-eval's results of one task, with every document under `samples`.

    Args:
        prepared: The task.
        model: On the device to evaluate on.
        tokenizer: Of the model; gets a padding token where it has none.
        batch_size: Requests in one forward pass.
        on_request: Called with requests done and requests in all.

    Raises:
        InputError: lm-eval can't load the task: its data can't be read, or its YAML is wrong.
    """
    with _quiet():
        manager = lm_eval.tasks.TaskManager(
            include_path=str(prepared.folder), include_defaults=False
        )
        try:
            loaded = manager.load([prepared.name])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            raise InputError(
                f"{prepared.name}: lm-eval can't load the task: {one_line(error)}"
            ) from error
        return lm_eval.simple_evaluate(
            model=_Counted(model, tokenizer, batch_size, on_request),
            tasks=[loaded["groups"].get(prepared.name) or loaded["tasks"][prepared.name]],
            task_manager=manager,
            limit=prepared.task.limit,
            batch_size=batch_size,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
        )


def scores_of(results: dict[str, Any], key: TaskKey) -> TaskScores:
    """What is kept of lm-eval's results.

    Raises:
        InputError: lm-eval scored no document, or gave no figure.
    """
    name = key.task
    samples = {leaf: _by_filter(rows) for leaf, rows in results["samples"].items()}
    sizes = {leaf: len(next(iter(rows.values()))) for leaf, rows in samples.items() if rows}
    if not sizes:
        raise InputError(f"{name}: lm-eval scored no document; give the task rows")
    figures = results["results"][name]
    # asked of a subtask: lm-eval has neither for a group of groups
    leaf = next(iter(sizes))
    metrics: dict[str, MetricScores] = {}
    for full, value in figures.items():
        metric, comma, chosen = full.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        documents = [row.get(metric) for part in sizes for row in samples[part].get(chosen, ())]
        metrics[metric if chosen == "none" else full] = metric_scores(
            float(value),
            figures.get(f"{metric}_stderr,{chosen}"),
            documents,
            list(sizes.values()),
            higher_is_better=bool(results["higher_is_better"][leaf].get(metric, True)),
        )
    if not metrics:
        raise InputError(f"{name}: lm-eval gave no figure for it; name its subtasks instead")
    return TaskScores(
        key=key,
        num_fewshot=int(results["n-shot"][leaf]),
        subtasks=sizes,
        fingerprint=_fingerprint(samples),
        metrics=metrics,
    )


def save_results(results: dict[str, Any], folder: Path, name: str) -> None:
    """Keep lm-eval's own JSON: NAME.lm-eval.json, and its documents in NAME.samples.jsonl.gz."""
    samples = results["samples"]
    rest = {key: value for key, value in results.items() if key != "samples"}
    save_text(_json(rest, indent=2) + "\n", folder / f"{name}.lm-eval.json")
    with (
        replacing(folder / f"{name}.samples.jsonl.gz") as temporary,
        gzip.open(temporary, "wt", encoding="utf-8") as file,
    ):
        for leaf, rows in samples.items():
            file.writelines(_json({"task": leaf, **row}) + "\n" for row in rows)


class _Counted(HFLM):
    """A loaded model as lm-eval takes one, which says how many requests are done."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        on_request: OnRequest,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(model.device),
            # known, and asking for it would warn of architectures that transformers doesn't list
            backend="causal",
        )
        self._on_request = on_request

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        self.cache_hook = _Counter(len(requests), self._on_request)
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.cache_hook = _Counter(len(requests), self._on_request)
        return super().generate_until(requests, disable_tqdm=True)


class _Counter(CacheHook):
    """Told of every answer, as a cache would be."""

    def __init__(self, total: int, on_request: OnRequest) -> None:
        super().__init__(None)
        self._total, self._done, self._on_request = total, 0, on_request

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._on_request(self._done, self._total)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log from the screen, its prints from stdout, its bootstrap in this process."""
    logger = logging.getLogger("lm_eval")
    level, forks = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    # forked processes hang where torch's threads were running
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks


def _by_filter(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        parts.setdefault(row["filter"], []).append(row)
    return parts


def _fingerprint(samples: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    digest = hashlib.sha256()
    for leaf, parts in samples.items():
        for row in next(iter(parts.values()), []):
            parts_of_row = (leaf, row["doc_hash"], row["prompt_hash"], row["target_hash"])
            digest.update("\n".join(parts_of_row).encode())
    return digest.hexdigest()


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent)
