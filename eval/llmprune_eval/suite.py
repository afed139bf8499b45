"""Suite: which lm-eval tasks to run, how much of each, and what was published."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmprune.errors import InputError

Positive = Annotated[int, Field(ge=1)]
SHIPPED = ("quick", "full")
# What a task takes where no suite says it.
BATCH_SIZE = 8


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuiteTask(_Part):
    """How one task is run.

    `limit` is the number of documents from the start (of every subtask, in a group); None for all.
    Without `num_fewshot` lm-eval's own YAML decides. `metric` is the one that tables show, by
    default acc_norm, acc or the first there is. `include` is the YAML of a task of one's own, its
    path taken from the suite's folder; its data source stays as it is.
    """

    limit: Positive | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    batch_size: Positive | None = None
    metric: str | None = None
    include: str | None = None


class Suite(_Part):
    """Tasks by lm-eval's names, and the dense model's published figures, {task: {metric: value}}.

    A measured figure may miss the published one by `published_tolerance` (see
    `llmprune_eval.published`).
    """

    name: str
    batch_size: Positive = BATCH_SIZE
    tasks: dict[str, SuiteTask]
    published: dict[str, dict[str, float]] = {}
    published_tolerance: Annotated[float, Field(gt=0.0)] = 0.02

    @field_validator("tasks", mode="before")
    @classmethod
    def _empty_means_defaults(cls, tasks: Any) -> Any:
        if isinstance(tasks, dict):
            return {name: {} if task is None else task for name, task in tasks.items()}
        return tasks

    @staticmethod
    def read(source: str) -> Suite:
        """Read a shipped suite by name, or any from its YAML file.

        Raises:
            InputError: There is no such suite or file, a key is unknown or a value impossible.
        """
        path = Path(source)
        if source in SHIPPED:
            text = (resources.files("llmprune_eval") / "suites" / f"{source}.yaml").read_text(
                encoding="utf-8"
            )
        else:
            if not path.is_file():
                names = ", ".join(SHIPPED)
                raise InputError(f"a suite must be {names} or a YAML file, got {source}")
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{source}: a suite must be readable text ({error})") from error
        suite = _parse(text, source)
        return suite.model_copy(
            update={"tasks": {n: _beside(t, path.parent) for n, t in suite.tasks.items()}}
        )

    def choose(self, names: list[str]) -> Suite:
        """The suite with just these tasks; one that it doesn't have runs with lm-eval's defaults.

        Raises:
            InputError: A name is empty or given twice.
        """
        if not all(names) or len(set(names)) < len(names):
            got = ",".join(names)
            raise InputError(f"--tasks must be different names with commas between, got {got!r}")
        return self.model_copy(update={"tasks": {n: self.tasks.get(n, SuiteTask()) for n in names}})

    def with_limit(self, limit: int) -> Suite:
        """The suite with `limit` documents of every task.

        Raises:
            InputError: `limit` is below 1.
        """
        if limit < 1:
            raise InputError(f"--limit must be at least 1, got {limit}")
        tasks = {n: t.model_copy(update={"limit": limit}) for n, t in self.tasks.items()}
        return self.model_copy(update={"tasks": tasks})


def chosen_suite(suite: str | None, tasks: str | None, limit: int | None) -> Suite | None:
    """The suite that the command line asks for; None where it names neither suite nor tasks.

    Args:
        suite: As `Suite.read`.
        tasks: Names with commas between; the suite's settings hold for those that it has.
        limit: Documents of every task, in place of the suite's.

    Raises:
        InputError: One of them is wrong, or there is a limit of nothing.
    """
    if suite is None and tasks is None:
        if limit is not None:
            raise InputError(f"--limit {limit} needs --suite or --tasks; name what to limit")
        return None
    chosen = Suite(name="tasks", tasks={}) if suite is None else Suite.read(suite)
    if tasks is not None:
        chosen = chosen.choose([name.strip() for name in tasks.split(",")])
    return chosen if limit is None else chosen.with_limit(limit)


def _parse(text: str, name: str) -> Suite:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{name}: a suite must be YAML, got: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{name}: a suite must be a mapping of keys, got {type(data).__name__}")
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "suite"
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"{name}: unknown key {key}; docs/evaluation.md has the keys"
            ) from error
        raise InputError(f"{name}: {key}: {first['msg']}, got {first['input']!r}") from error
    if not suite.tasks:
        raise InputError(f"{name}: tasks must name at least one lm-eval task, got none")
    return suite


def _beside(task: SuiteTask, folder: Path) -> SuiteTask:
    if task.include is None:
        return task
    return task.model_copy(update={"include": str((folder / task.include).resolve())})
