"""A comparison by several processes that share a device: what is wanted most is computed first.

`pending` walks through a block as `compare` does and says which figures its next step needs; a Crew
computes them, each process with a dense model and a Workbench of its own, all in one folder. A
small model leaves a GPU idle between launches, so processes side by side take less time than one.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.recipe import Recipe
from llmprune_eval.accounting import sources_of
from llmprune_eval.compare import Extent, Job, table_of, variant_of
from llmprune_eval.comparison import BlockTable
from llmprune_eval.contenders import SEQUENTIAL, check_methods
from llmprune_eval.stored_results import Result, Stage, hash_of, plan_parts, request_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

STAGE_ORDER: tuple[Stage, ...] = ("dense", "compensated", "refit", "recovered")
# Further seeds and last measurements come after all stages, and depend on no one of each other.
LAST = len(STAGE_ORDER)
# How often the crew's work is looked at while nothing ends.
POLL_S = 2.0


@dataclass(frozen=True)
class Figure:
    """One figure that is wanted: of a recipe's model in a stage; `title` is for people."""

    title: str
    recipe: Recipe
    stage: Stage
    windows: int | None
    request: str

    @property
    def plan_key(self) -> str:
        """Equal for figures whose models come from one plan, which one process must make."""
        parts = "dense" if self.stage == "dense" else plan_parts(self.recipe)
        return hash_of([sources_of(self.recipe), parts])


@dataclass
class Block:
    """One recipe with the methods to compare on it, and how far to go."""

    name: str
    recipe: Recipe
    methods: Sequence[str] | None
    extent: Extent
    _known: dict[Job, Figure | Result] = field(default_factory=dict)

    def figure(self, job: Job) -> Figure | Result:
        """What a job asks for, or why there is no such thing."""
        if job not in self._known:
            method = job.method
            found = self.recipe if method is None else variant_of(self.recipe, method)
            if isinstance(found, Recipe):
                found = found.model_copy(update={"seed": job.seed})
                title = f"{self.name}, {method or 'dense'}, seed {job.seed}, {job.stage}"
                title += "" if job.windows == self.windows else f", {job.windows or 'all'} windows"
                request = request_of(found, job.stage, job.windows)
                self._known[job] = Figure(title, found, job.stage, job.windows, request)
            else:
                self._known[job] = found
        return self._known[job]

    @property
    def windows(self) -> int | None:
        """Of the evaluation text."""
        return self.extent.max_windows or self.recipe.evaluation.perplexity[0].max_windows

    def level(self, job: Job) -> int:
        """What a job waits for: everything of a lower level."""
        if job.windows != self.windows or job.seed != self.recipe.seed:
            return LAST
        return max(1, STAGE_ORDER.index(job.stage))

    def table(self, fetch: Callable[[Job], Result | None]) -> BlockTable:
        """The table of what `fetch` gives."""
        methods = check_methods(self.methods)
        return table_of(self.name, self.recipe, methods, self.extent, fetch)

    def recipes(self) -> list[Recipe]:
        """Of every method that the recipe can have."""
        found = (variant_of(self.recipe, method) for method in check_methods(self.methods))
        return [one for one in found if isinstance(one, Recipe)]


class _EnoughError(Exception):
    """Ends a walk: what comes next depends on what is missing."""


def pending(block: Block, known: dict[str, Result]) -> list[Figure]:
    """The figures that are missing and wait for no other, in the order of the block.

    Args:
        block: What is compared.
        known: Request -> result, of every figure that is there (or was refused).
    """
    missing: list[Figure] = []
    level = 0

    def fetch(job: Job) -> Result | None:
        nonlocal level
        wanted = block.figure(job)
        if isinstance(wanted, Result):
            return wanted
        found = known.get(wanted.request)
        if found is None:
            if missing and block.level(job) > level:
                raise _EnoughError
            level = block.level(job)
            missing.append(wanted)
        return found

    with suppress(_EnoughError):
        block.table(fetch)
    return missing


def known_table(block: Block, known: dict[str, Result]) -> BlockTable:
    """The table of what is there."""

    def fetch(job: Job) -> Result | None:
        wanted = block.figure(job)
        return wanted if isinstance(wanted, Result) else known.get(wanted.request)

    return block.table(fetch)


class Crew:
    """Processes that compute figures; each is given those of one plan at a time."""

    def __init__(self, size: int, out: Path, recipes: Sequence[Recipe]) -> None:
        """Start the processes, which load the model before they are asked for anything.

        Args:
            size: How many.
            out: Folder of results, shared.
            recipes: Everything that may be asked for; tells which passes serve several blocks.
        """
        context = multiprocessing.get_context("spawn")
        self._members: dict[Any, _Member] = {}
        for _ in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, out, recipes), daemon=True)
            process.start()
            theirs.close()
            self._members[mine] = _Member(process, mine)

    @property
    def is_there(self) -> bool:
        """Whether any process is left."""
        return bool(self._members)

    @property
    def at_work(self) -> list[Figure]:
        """What is being computed."""
        return [figure for member in self._members.values() for figure in member.work]

    def give(self, choices: Callable[[], Sequence[Sequence[Figure]]]) -> None:
        """Hand out work to whoever is free.

        Args:
            choices: Gives what may be computed now, the most wanted first: lists of figures of one
                plan. Asked again after each that is taken.
        """
        for member in [one for one in self._members.values() if not one.work]:
            offered = choices()
            if not offered:
                return
            # of what is wanted alike, what needs the rows that are in memory
            same = [one for one in offered if sources_of(one[0].recipe) == member.source]
            member.start(same[0] if same else offered[0])

    def finished(self) -> list[tuple[Figure, Result]]:
        """Wait a little; what came to an end meanwhile. A process that died leaves."""
        found: list[tuple[Figure, Result]] = []
        for ready in multiprocessing.connection.wait(list(self._members), POLL_S):
            member = self._members[ready]
            try:
                result = member.pipe.recv()
                found.append((member.work.pop(0), result))
            except (EOFError, OSError):
                gone = Result(None, refused=f"its process ended ({member.process.exitcode})")
                found += [(figure, gone) for figure in member.work]
                del self._members[ready]
        return found

    def end(self) -> None:
        """Stop all processes, whatever they are doing."""
        for member in self._members.values():
            member.process.terminate()
        for member in self._members.values():
            member.process.join()


class _Member:
    """One process and what it was given."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self.work: list[Figure] = []
        self.source = ""

    def start(self, figures: Sequence[Figure]) -> None:
        self.source = sources_of(figures[0].recipe)
        self.work = list(figures)
        with suppress(OSError):
            # one that is gone is found out when its work is waited for
            self.pipe.send(self.work)


def serve(pipe: Connection, out: Path, recipes: Sequence[Recipe]) -> None:
    """What a process of the crew does: compute the figures it is sent until the pipe closes."""
    import torch
    from transformers.utils import logging

    from llmprune.run_steps import silent
    from llmprune_eval.stored_results import StoredResults
    from llmprune_eval.workbench import Workbench

    # as many threads as processes have cores to themselves, or they would wait for each other
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    store = StoredResults(out / "results")
    bench = Workbench(out, store, silent)
    bench.expect(recipes)
    # the model is loaded while the first work is handed out
    bench.work.ground(recipes[0])
    while True:
        try:
            work: list[Figure] = pipe.recv()
        except EOFError:
            return
        for figure in work:
            pipe.send(_result(bench, figure))


def _result(bench: Any, figure: Figure) -> Result:
    try:
        result: Result = bench.result(
            figure.recipe, figure.stage, figure.windows, title=figure.title
        )
        return result
    except Exception as error:
        # one figure's failure must not take the others along; it is printed and shown in the table
        traceback.print_exc()
        return Result(None, refused=f"failed: {type(error).__name__}: {error}")


def compute(
    blocks: Sequence[Block],
    crew: Crew,
    known: dict[str, Result],
    *,
    until: float,
    at_most: float,
    on_figure: Callable[[Figure, Result], None],
) -> None:
    """Compute all figures of the blocks, those of the first most wanted; `known` takes them.

    Args:
        blocks: Most wanted first.
        crew: Who computes.
        known: Request -> result; what is there already is not computed.
        until: On `time.monotonic`; afterwards nothing is begun.
        at_most: Afterwards nothing is waited for.
        on_figure: Called with each.
    """

    def choices() -> list[list[Figure]]:
        return startable(blocks, known, crew.at_work)

    while crew.is_there and time.monotonic() < at_most:
        if time.monotonic() < until:
            crew.give(choices)
        if not crew.at_work:
            return
        for figure, result in crew.finished():
            known[figure.request] = result
            on_figure(figure, result)


def startable(
    blocks: Iterable[Block], known: dict[str, Result], at_work: Sequence[Figure]
) -> list[list[Figure]]:
    """Of the first block that has any: missing figures that no one works on, by plan.

    Figures of SequentialAttention++ of one plan go together: two processes would train the same
    gates in the same place.
    """
    busy = {figure.plan_key for figure in at_work}
    for block in blocks:
        plans: dict[str, list[Figure]] = {}
        for figure in pending(block, known):
            if figure.plan_key not in busy:
                plans.setdefault(figure.plan_key, []).append(figure)
        if plans:
            # what trains takes longest
            return sorted(
                plans.values(), key=lambda figures: figures[0].recipe.method != SEQUENTIAL
            )
    return []


def default_size() -> int:
    """A process for every core but one, eight at most."""
    return max(1, min(8, (os.cpu_count() or 1) - 1))
