"""compare(recipes): every method behind the same budget, cut, refit, recovery and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.recipe import PerplexityTask, Recipe
from llmprune.run_folder import settle_precision
from llmprune.run_steps import OnProgress, silent
from llmprune.texts import calibration_name, corpus_of, resolve_text, text_name
from llmprune_eval.comparison import BlockTable, Comparison, Row, Seeded
from llmprune_eval.comparison_plot import plot
from llmprune_eval.contenders import CONTENDERS, SEQUENTIAL, check_methods, variant
from llmprune_eval.stored_results import Result, Stage, StoredResults, request_of
from llmprune_eval.workbench import Workbench

# Rules that take every method, and none.
ALL, NONE = "all", "none"
# Who is measured once more at the end where the last stage took every method.
FINAL = "best:3"
# Baselines, and controls, that are repeated with other seeds, besides SequentialAttention++.
SEEDED = 2


@dataclass(frozen=True)
class Extent:
    """How far a comparison goes.

    Attributes:
        seeds: Seeds for SequentialAttention++, the two best baselines and the two best controls; 1
            repeats nothing.
        refit: Who is refitted: `all`, `none`, or `best:N`, which is SequentialAttention++ and the N
            best of the others by the stage before.
        recover: Who is trained after that; the same.
        max_windows: Of the evaluation text; None for what each recipe says.
        final_windows: Windows of a last measurement of those that got furthest (of all methods,
            SequentialAttention++ and the three best others); 0 for the whole text, None for none.
    """

    seeds: int = 1
    refit: str = ALL
    recover: str = NONE
    max_windows: int | None = None
    final_windows: int | None = None

    def __post_init__(self) -> None:
        for option, least in (("seeds", 1), ("max_windows", 1), ("final_windows", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                name = option.replace("_", "-")
                raise InputError(f"--{name} must be at least {least}, got {value}")
        for option in ("refit", "recover"):
            num_chosen(getattr(self, option), option)


def num_chosen(rule: str, option: str) -> float:
    """How many of the other methods a rule takes; -1 for no one at all.

    Raises:
        InputError: It is none of `all`, `none`, `best:N`.
    """
    name, _, count = rule.partition(":")
    if name == "best" and count.isdigit():
        return int(count)
    if rule not in (ALL, NONE):
        raise InputError(f"--{option} must be all, none or best:N, got {rule!r}")
    return math.inf if rule == ALL else -1


@dataclass(frozen=True)
class Job:
    """One figure that is wanted: a method's, or the dense model's where `method` is None."""

    method: str | None
    seed: int
    stage: Stage
    windows: int | None


# The result of a job; None where it is not there and nothing may be computed.
Fetch = Callable[[Job], Result | None]


def compare(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    methods: Iterable[str] | None = None,
    *,
    extent: Extent | None = None,
    report_only: bool = False,
    on_progress: OnProgress = silent,
    command: str = "",
) -> Comparison:
    """Compare methods on every recipe; whatever `out` holds already is not computed again.

    Args:
        recipes: Block name -> what holds for every method of the block.
        out: A folder; comparison.json, comparison.md and comparison.png are written there.
        methods: Names in `CONTENDERS`; None for all.
        extent: How far to go.
        report_only: Compute nothing; show what is there.
        on_progress: Called with a task's name, what is done and of how many.
        command: What the report says how to repeat it.

    Raises:
        InputError: Anything a user can cause; what was computed until then stays in `out`.
    """
    extent = extent or Extent()
    names = check_methods(methods)
    for name, recipe in recipes.items():
        _check_recipe(name, recipe, extent)
    out = Path(out)
    for folder in ("recipes", "results"):
        _make(out / folder)
    blocks = _settle(recipes, out)
    if extent.refit == NONE:
        without = {"reconstruction": None}
        blocks = {name: recipe.model_copy(update=without) for name, recipe in blocks.items()}
    store = StoredResults(out / "results")
    variants = {name: {m: variant_of(recipe, m) for m in names} for name, recipe in blocks.items()}
    bench = None if report_only else Workbench(out, store, on_progress)
    if bench is not None:
        own = [one for found in variants.values() for one in found.values()]
        bench.prepare([recipe for recipe in own if isinstance(recipe, Recipe)])
    tables: list[BlockTable] = []
    for name, recipe in blocks.items():
        on_progress(f"block {name}", len(tables), len(blocks))
        fetch = _fetcher(recipe, variants[name], store, bench, name)
        tables.append(table_of(name, recipe, names, extent, fetch))
        _write(Comparison(tuple(tables), command), out)
    return Comparison(tuple(tables), command)


def variant_of(recipe: Recipe, method: str) -> Recipe | Result:
    """The recipe with a method in it, or why a recipe can't have both."""
    try:
        return variant(recipe, method)
    except InputError as error:
        return Result(None, refused=str(error))


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed: other calibration rows, other gates."""
    return recipe.model_copy(update={"seed": seed})


def _check_recipe(name: str, recipe: Recipe, extent: Extent) -> None:
    if recipe.budget is None or recipe.budget.sparsity is None:
        raise InputError(f"{name}: a comparison needs budget.sparsity, which every method meets")
    if not recipe.evaluation.perplexity:
        raise InputError(f"{name}: evaluation.perplexity must name the text to compare on")
    if extent.recover != NONE and not recipe.recovery.steps:
        raise InputError(f"{name}: --recover {extent.recover} needs recovery.steps above 0")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: --out can't be made ({error.strerror})") from error


def _settle(recipes: Mapping[str, Recipe], out: Path) -> dict[str, Recipe]:
    """The recipes with one precision for all, kept in `out`/recipes.

    Raises:
        InputError: They differ in precision: the figures could not be compared.
    """
    blocks: dict[str, Recipe] = {}
    for name, recipe in recipes.items():
        blocks[name] = settle_precision(recipe, out / "recipes")
        if recipe.training.mixed_precision == "auto":
            save_text(blocks[name].to_yaml(), out / "recipes" / "recipe.yaml")
        save_text(blocks[name].to_yaml(), out / "recipes" / f"{name}.yaml")
    found = {recipe.training.mixed_precision for recipe in blocks.values()}
    if len(found) > 1:
        raise InputError(
            "training.mixed_precision must be the same in all recipes of a comparison, got "
            + ", ".join(sorted(found))
        )
    return blocks


def _fetcher(
    recipe: Recipe,
    variants: Mapping[str, Recipe | Result],
    store: StoredResults,
    bench: Workbench | None,
    name: str,
) -> Fetch:
    def fetch(job: Job) -> Result | None:
        wanted = recipe if job.method is None else variants[job.method]
        if isinstance(wanted, Result):
            return wanted
        wanted = with_seed(wanted, job.seed)
        if bench is None:
            return store.asked(request_of(wanted, job.stage, job.windows))
        who = "dense" if job.method is None else job.method
        seed = f", seed {job.seed}" if job.seed != recipe.seed else ""
        return bench.result(wanted, job.stage, job.windows, title=f"{name}, {who}{seed}")

    return fetch


def table_of(
    name: str, recipe: Recipe, methods: Sequence[str], extent: Extent, fetch: Fetch
) -> BlockTable:
    """Walk through a block stage by stage, so that each stage's best go on to the next."""
    task = recipe.evaluation.perplexity[0]
    windows = extent.max_windows or task.max_windows
    dense = fetch(Job(None, recipe.seed, "dense", windows))
    found: dict[str, dict[Stage, Result]] = {method: {} for method in methods}
    last: Stage = "compensated"
    for stage, rule in _stages(recipe, extent):
        chosen = methods if stage == "compensated" else _chosen(found, last, rule)
        for method in chosen:
            result = fetch(Job(method, recipe.seed, stage, windows))
            if result is not None:
                found[method][stage] = result
        last = stage
    others = _repeat(recipe, found, last, windows, extent.seeds, fetch)
    final: dict[str, Result | None] = {}
    dense_final = None
    if extent.final_windows is not None:
        more = extent.final_windows or None
        dense_final = fetch(Job(None, recipe.seed, "dense", more))
        _, rule = _stages(recipe, extent)[-1]
        for method in _chosen(found, last, FINAL if rule == ALL else rule):
            final[method] = fetch(Job(method, recipe.seed, last, more))
    rows = [
        Row(
            method=method,
            label=CONTENDERS[method].label,
            is_control=CONTENDERS[method].is_control,
            stages={s: Seeded((r, *others.get((method, s), ()))) for s, r in own.items()},
            final=final.get(method),
        )
        for method, own in found.items()
    ]
    return BlockTable(
        name=name,
        text=_text_name(task),
        in_domain=_is_in_domain(recipe, task),
        calibration=calibration_name(resolve_text(recipe.calibration)),
        budget=_budget_text(recipe),
        dense=dense,
        dense_final=dense_final,
        rows=tuple(rows),
    )


def _stages(recipe: Recipe, extent: Extent) -> list[tuple[Stage, str]]:
    stages: list[tuple[Stage, str]] = [("compensated", ALL)]
    if recipe.reconstruction is not None:
        stages.append(("refit", extent.refit))
    if extent.recover != NONE:
        stages.append(("recovered", extent.recover))
    return stages


def _ranked(found: Mapping[str, Mapping[Stage, Result]], stage: Stage) -> list[str]:
    """Methods with a figure in a stage, best first."""
    measured = {m: own[stage].value for m, own in found.items() if stage in own}
    known = {method: value for method, value in measured.items() if value is not None}
    return sorted(known, key=lambda method: known[method])


def _chosen(found: Mapping[str, Mapping[Stage, Result]], stage: Stage, rule: str) -> list[str]:
    """Who goes on from a stage, best first: SequentialAttention++ always, and the best others."""
    ranked = _ranked(found, stage)
    others = [method for method in ranked if method != SEQUENTIAL]
    count = num_chosen(rule, "recover")
    best = set(others if count == math.inf else others[: int(count)])
    return [method for method in ranked if method == SEQUENTIAL or method in best]


def _repeat(
    recipe: Recipe,
    found: Mapping[str, Mapping[Stage, Result]],
    last: Stage,
    windows: int | None,
    num_seeds: int,
    fetch: Fetch,
) -> dict[tuple[str, Stage], list[Result]]:
    """The further seeds of SequentialAttention++ and of its nearest rivals, stage by stage."""
    ranked = _ranked(found, last)
    baselines = [m for m in ranked if m != SEQUENTIAL and not CONTENDERS[m].is_control]
    controls = [m for m in ranked if CONTENDERS[m].is_control and not CONTENDERS[m].is_ablation]
    repeated = {SEQUENTIAL, *baselines[:SEEDED], *controls[:SEEDED]}
    others: dict[tuple[str, Stage], list[Result]] = {}
    for seed in range(recipe.seed + 1, recipe.seed + num_seeds):
        for method in [m for m in ranked if m in repeated]:
            for stage in found[method]:
                result = fetch(Job(method, seed, stage, windows))
                if result is not None and result.value is not None:
                    others.setdefault((method, stage), []).append(result)
    return others


def _budget_text(recipe: Recipe) -> str:
    assert recipe.budget is not None
    assert recipe.budget.sparsity is not None
    return f"{100 * recipe.budget.sparsity:g} % of {recipe.budget.of}".replace("_", " ")


def _text_name(task: PerplexityTask) -> str:
    return text_name(resolve_text(task))


def _is_in_domain(recipe: Recipe, task: PerplexityTask) -> bool:
    return corpus_of(resolve_text(task)) == corpus_of(resolve_text(recipe.calibration))


def _write(comparison: Comparison, out: Path) -> None:
    save_text(comparison.to_json(), out / "comparison.json")
    save_text(comparison.to_markdown(), out / "comparison.md")
    plot(comparison, out / "comparison.png")
