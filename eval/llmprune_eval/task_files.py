"""Tasks known by name, and the YAML that lm-eval runs: its own, only the data source changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmprune.errors import InputError
from llmprune_eval.data_files import DataFile, MissingRowsError, find_file, split_rows, write_rows
from llmprune_eval.suite import SuiteTask

Config = dict[str, Any]


@dataclass(frozen=True)
class TaskFiles:
    """A task, or a group of tasks, that lm-eval ships, and where its rows lie under --data.

    Attributes:
        yaml: The file in lm-eval's folder of tasks.
        data: Split of the data set -> file without its ending (.jsonl or .jsonl.gz).
        columns: What every row must have.
        subtask_column: Of a group: the column that holds a subtask's `dataset_name`.
        convert: Makes the row that the task expects; None where the file has it.
    """

    yaml: str
    data: dict[str, str]
    columns: tuple[str, ...]
    subtask_column: str | None = None
    convert: Callable[[Config], Config] | None = None


def _boolq(row: Config) -> Config:
    return {**row, "label": int(row["answer"])}


def _arc(subset: str) -> TaskFiles:
    splits = {"train": "train", "validation": "val", "test": "test"}
    return TaskFiles(
        "arc/" + {"Easy": "arc_easy", "Challenge": "arc_challenge"}[subset] + ".yaml",
        {split: f"arc/ARC-{subset}_{end}" for split, end in splits.items()},
        ("question", "choices", "answerKey"),
    )


TASKS: dict[str, TaskFiles] = {
    "hellaswag": TaskFiles(
        "hellaswag/hellaswag.yaml",
        {"train": "hellaswag/hellaswag_train", "validation": "hellaswag/hellaswag_val"},
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "piqa": TaskFiles(
        "piqa/piqa.yaml",
        {"train": "piqa/piqa_train", "validation": "piqa/piqa_val"},
        ("goal", "sol1", "sol2", "label"),
    ),
    "arc_easy": _arc("Easy"),
    "arc_challenge": _arc("Challenge"),
    "winogrande": TaskFiles(
        "winogrande/default.yaml",
        {"train": "winogrande/winogrande_xl_train", "validation": "winogrande/winogrande_xl_dev"},
        ("sentence", "option1", "option2", "answer"),
    ),
    "boolq": TaskFiles(
        "super_glue/boolq/default.yaml",
        {"train": "boolq/boolq_train", "validation": "boolq/boolq_val"},
        ("question", "passage", "answer"),
        convert=_boolq,
    ),
    "openbookqa": TaskFiles(
        "openbookqa/openbookqa.yaml",
        {
            "train": "openbookqa/openbookqa_train",
            "validation": "openbookqa/openbookqa_val",
            "test": "openbookqa/openbookqa_test",
        },
        ("question_stem", "choices", "answerKey"),
    ),
    "lambada_openai": TaskFiles(
        "lambada/lambada_openai.yaml", {"test": "lambada/lambada_openai_test"}, ("text",)
    ),
    "blimp": TaskFiles(
        "blimp/_blimp.yaml",
        {"train": "blimp/blimp_all"},
        ("sentence_good", "sentence_bad", "UID"),
        subtask_column="UID",
    ),
    "mmlu": TaskFiles(
        "mmlu/default/_mmlu.yaml",
        {"test": "mmlu/mmlu_test", "dev": "mmlu/mmlu_dev"},
        ("question", "subject", "choices", "answer"),
        subtask_column="subject",
    ),
    "gsm8k": TaskFiles(
        "gsm8k/gsm8k.yaml",
        {"train": "gsm8k/gsm8k_train", "test": "gsm8k/gsm8k_test"},
        ("question", "answer"),
    ),
}


@dataclass(frozen=True)
class WrittenTask:
    """A task's YAML, written for lm-eval.

    Attributes:
        hub: Data sets (id, configuration) that it will ask the Hub for.
        data: What its rows are: a sha256 of the files, or the Hub ids; empty where files that a
            task of the user's own names may change at any time.
    """

    hub: tuple[tuple[str, str | None], ...]
    data: str


def write_task(
    name: str, task: SuiteTask, *, shipped: Path, data: Path | None, folder: Path
) -> WrittenTask:
    """Write the YAML (and, with `data`, the rows) of a task into a folder for lm-eval to include.

    Args:
        name: A name in `TASKS`, a subtask of a group there (`blimp_causative`), or any with
            `task.include`.
        task: How it is run.
        shipped: lm-eval's own folder of tasks.
        data: Folder of local files; None takes every data set from the Hub.
        folder: An empty folder.

    Raises:
        MissingRowsError: Its data files are not there.
        InputError: No such task, or its data files are damaged or lack a column.
    """
    if task.include is not None:
        return _write_included(name, task, folder)
    group, files = _find(name)
    source = shipped / files.yaml
    if not source.is_file():
        raise InputError(
            f"{name}: this version of lm-eval has no {files.yaml}; install lm-eval>=0.4.13,<0.5"
        )
    configs = {source: read_config(source)}
    if files.subtask_column is not None:
        configs = {path: read_config(path) for path in sorted(source.parent.glob("*.yaml"))}
    if name != group:
        configs = {path: c for path, c in configs.items() if c.get("task") == name}
        if not configs:
            raise InputError(f"{name}: no subtask of {group} in lm-eval; name one, or {group}")
    leaves = {path: c for path, c in configs.items() if isinstance(c.get("task"), str)}
    rows = None
    if data is not None:
        rows = _Rows(name, files, data, config=next(iter(leaves.values())), task=task)
    for path, config in configs.items():
        changed: Config = {"include": str(path)}
        if path in leaves:
            if task.num_fewshot is not None:
                changed["num_fewshot"] = task.num_fewshot
            if rows is not None:
                changed |= rows.source_of(config, folder)
        text = yaml.safe_dump(changed, sort_keys=False)
        (folder / f"{path.stem}.yaml").write_text(text, encoding="utf-8")
    if rows is not None:
        return WrittenTask((), rows.fingerprint)
    return _from_hub(leaves.values())


def _find(name: str) -> tuple[str, TaskFiles]:
    """The row of `TASKS` that a task or subtask belongs to."""
    if name in TASKS:
        return name, TASKS[name]
    for group, files in TASKS.items():
        if files.subtask_column is not None and name.startswith(f"{group}_"):
            return group, files
    raise InputError(
        f"--tasks: a task must be one of {', '.join(TASKS)}, or a subtask of blimp or mmlu, got "
        f"{name}; any other by `include` in a suite's file (docs/evaluation.md)"
    )


def _write_included(name: str, task: SuiteTask, folder: Path) -> WrittenTask:
    path = Path(str(task.include))
    if not path.is_file():
        raise InputError(f"{name}: include must be a task's YAML file, got {path.name}: not there")
    config = read_config(path)
    if config.get("task") != name:
        raise InputError(f"{name}: include must define that task, got {config.get('task')!r}")
    changed: Config = {"include": str(path)}
    if task.num_fewshot is not None:
        changed["num_fewshot"] = task.num_fewshot
    (folder / "task.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    if config.get("dataset_path") in ("json", "parquet", "csv", "arrow", "text"):
        return WrittenTask((), "")
    return _from_hub([config])


def _from_hub(configs: Iterable[Config]) -> WrittenTask:
    named = {(c["dataset_path"], c.get("dataset_name")) for c in configs if "dataset_path" in c}
    hub = sorted(named, key=str)
    return WrittenTask(tuple(hub), ", ".join(sorted({path for path, _ in hub})))


class _Rows:
    """Local rows of one task or group, given to each subtask."""

    def __init__(
        self, name: str, files: TaskFiles, data: Path, *, config: Config, task: SuiteTask
    ) -> None:
        scored = config.get("test_split") or config["validation_split"]
        needed = {scored}
        shots = config.get("num_fewshot") if task.num_fewshot is None else task.num_fewshot
        if shots:
            needed.add(config.get("fewshot_split") or config.get("training_split") or scored)
        self.files = files
        self.splits: dict[str, DataFile] = {}
        for split, stem in files.data.items():
            file = find_file(data, stem)
            if file is None and split in needed:
                raise MissingRowsError(name, stem, data)
            if file is not None:
                self.splits[split] = DataFile.read(file, files.columns, data)
        digests = [f"{split} {file.sha256}" for split, file in sorted(self.splits.items())]
        self.fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        self.by_subtask: dict[str, dict[str, list[Config]]] = {
            split: split_rows(file.rows, files.subtask_column, files.convert)
            for split, file in self.splits.items()
        }

    def source_of(self, config: Config, folder: Path) -> Config:
        """Write a subtask's rows; the keys that make lm-eval read them."""
        subtask = config["dataset_name"] if self.files.subtask_column else ""
        data_files = {}
        for split, parts in self.by_subtask.items():
            if subtask not in parts:
                name = self.splits[split].name
                raise InputError(
                    f"{name}: must have rows with {self.files.subtask_column} {subtask!r}, found "
                    "none; name the subtasks that are there with --tasks"
                )
            file = folder / "rows" / f"{config['task']}.{split}.jsonl"
            data_files[split] = str(write_rows(file, parts[subtask]))
        # lm-eval loads every split that a task names; those that aren't here are not needed
        absent = {
            key: None
            for key in ("training_split", "validation_split", "test_split", "fewshot_split")
            if config.get(key) is not None and config[key] not in data_files
        }
        cache = str(folder / "cache")
        return {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": data_files, "cache_dir": cache},
            **absent,
        }


def read_config(path: Path) -> Config:
    """A task's YAML with what it includes; functions that it names stay names.

    Raises:
        InputError: It is no YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            own = yaml.load(file, Loader=_Names)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path.name}: must be YAML of lm-eval, got: {error}") from error
    if not isinstance(own, dict):
        raise InputError(f"{path.name}: must be a mapping of keys, got {type(own).__name__}")
    included = own.pop("include", [])
    merged: Config = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= read_config(path.parent / name)
    return merged | own


class _Names(yaml.SafeLoader):
    """Reads `!function name` as the name."""


def _name(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_Names.add_constructor("!function", _name)
