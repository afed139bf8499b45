"""The commands that measure: eval, bench, compare, report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from llmprune.cli_shared import (
    FolderArgument,
    JsonOption,
    console,
    quieten_transformers,
    warn,
)
from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.recipe import Recipe
    from llmprune_eval.quality import Extent
    from llmprune_eval.subjects import Subject


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that prune wrote, or any model.")],
    suite: Annotated[
        str | None, typer.Option(help="lm-eval tasks: quick, full, or a YAML file.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names of tasks, with commas.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this model, not the recipe's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the tasks' rows; default: the Hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.")] = None,
    text: Annotated[str | None, typer.Option(help="Text for perplexity, not the recipe's.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window, with --text.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Windows at most, with --text.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of all weights; default the stored."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; default MODEL/eval.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity and lm-eval tasks, dense and pruned on the same documents."""
    from llmprune.recipe import PerplexityTask

    if data is not None and not data.is_dir():
        raise InputError(f"--data must be a folder, got {data}, which is none")
    for option, value, least in (("window", window, 2), ("max-windows", max_windows, 1)):
        if value is not None and value < least:
            raise InputError(f"--{option} must be at least {least}, got {value}")
    from llmprune_eval.suite import chosen_suite

    chosen = chosen_suite(suite, tasks, limit)
    quieten_transformers()
    from llmprune_eval.quality import Extent
    from llmprune_eval.results_of_run import on_the_page
    from llmprune_eval.subjects import results_folder, subjects_of

    subjects, recipe = subjects_of(model, baseline, dtype)
    texts = () if recipe is None else recipe.evaluation.perplexity
    if text is not None:
        task = PerplexityTask(dataset=text, split="test", window=window, max_windows=max_windows)
        texts = (task,)
    if not texts and chosen is None:
        raise InputError(
            f"{model}: nothing to measure: the recipe (if there is one) names no text; give one "
            "with --text, or tasks with --suite or --tasks"
        )
    folder = out or results_folder(model, subjects[-1])
    _evaluate_quality(subjects, Extent(texts, chosen, data), recipe, folder, json=json)
    if recipe is not None and out is None and not json:
        console.print(on_the_page(model), soft_wrap=True)


def bench(
    model: Annotated[str, typer.Argument(help="A folder that prune wrote, or any model.")],
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, not the recipe's.")
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", "--batch-size", help="Rows of the prompt, with commas.")
    ] = "1",
    context: Annotated[str, typer.Option(help="Tokens in a row, with commas.")] = "128",
    new_tokens: Annotated[int, typer.Option(help="Decode steps.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 10,
    backend: Annotated[
        Literal["eager", "compile", "block_sparse"] | None,
        typer.Option(help="What runs the models; default block_sparse where there are blocks."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of all weights; default the stored."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Time the first model against itself, too.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Peak memory, a process a model and point.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file; default MODEL/bench.json.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure latency, memory and load time, dense and pruned in the same rounds."""
    quieten_transformers()
    from llmprune_eval.bench import BenchSettings
    from llmprune_eval.bench_command import read_counts, run_bench

    settings = BenchSettings(
        batch_sizes=read_counts("batch", batch),
        contexts=read_counts("context", context),
        new_tokens=new_tokens,
        rounds=rounds,
        backend=backend,
        check=check,
        memory=memory,
    )
    shown = None if json else console
    run_bench(model, settings, against=against, dtype=dtype, out=out, console=shown)


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, a block of the table each.")],
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds is not redone.")],
    methods: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    seeds: Annotated[int, typer.Option(help="Of SA++, the two best baselines and controls.")] = 1,
    refit: Annotated[str, typer.Option(help="Who is refitted: all, best:N, none.")] = "all",
    recover: Annotated[str, typer.Option(help="Who is trained then: all, best:N, none.")] = "none",
    max_windows: Annotated[
        int | None, typer.Option(help="Windows of the text; default the recipe's.")
    ] = None,
    final_windows: Annotated[
        int | None, typer.Option(help="Windows of a last measurement of the best; 0: all.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Compute nothing; show what is there.")
    ] = False,
) -> None:
    """Compare methods on recipes: same budget, cut, refit, recovery and text for all."""
    from llmprune.recipe import Recipe

    read = {recipe.stem: Recipe.read(recipe) for recipe in recipes}
    if len(read) < len(recipes):
        raise InputError("recipes of a comparison must have different file names")
    from llmprune.display import progress_bars
    from llmprune_eval.compare import Extent
    from llmprune_eval.compare import compare as run

    quieten_transformers()
    extent = Extent(seeds, refit, recover, max_windows, final_windows)
    with progress_bars(console) as on_progress:
        run(
            read,
            out,
            None if methods == "all" else methods.split(","),
            extent=extent,
            report_only=report_only,
            on_progress=on_progress,
            command=_command_line(),
        )
    console.print(f"wrote {out / 'comparison.md'}", soft_wrap=True)


def report(
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option(help="The page; default DIR/report.html.")] = None,
    comparison: Annotated[
        Path | None,
        typer.Option("--compare", help="A comparison.json, to set the run against its methods."),
    ] = None,
) -> None:
    """Write one HTML page that shows what a run kept, cost and bought, and its Markdown card."""
    from llmprune_eval.card_file import write_card
    from llmprune_eval.html_report import write_report

    if out is not None and out.suffix == ".md":
        raise InputError(f"--out names the HTML page, the card lies beside it; got {out}")
    page = write_report(folder, out, comparison)
    card = write_card(folder, None if out is None else out.with_suffix(".md"))
    for file in (page, card):
        if file is not None:
            console.print(f"wrote {file}", soft_wrap=True)


def _command_line() -> str:
    """The command as it was given; of a path outside the working folder only its name."""
    words = ["llmprune"]
    for word in sys.argv[1:]:
        path = Path(word)
        if path.is_absolute():
            inside = path.is_relative_to(Path.cwd())
            word = str(path.relative_to(Path.cwd())) if inside else path.name
        if word != "--report-only":
            words.append(word)
    return shlex.join(words)


def _evaluate_quality(
    subjects: tuple[Subject, ...],
    extent: Extent,
    recipe: Recipe | None,
    folder: Path,
    *,
    json: bool,
) -> None:
    from llmprune.display import progress_bars
    from llmprune.files import save_text
    from llmprune_eval.quality import evaluate_quality, make_folder
    from llmprune_eval.quality_report import notes_of, render_table, to_markdown

    with progress_bars(Console(stderr=json)) as on_progress:
        report = evaluate_quality(subjects, extent, folder, recipe=recipe, on_progress=on_progress)
    make_folder(folder)
    save_text(report.to_json(), folder / "evaluation.json")
    save_text(to_markdown(report), folder / "evaluation.md")
    warn(report.warnings)
    if json:
        typer.echo(report.to_json())
        return
    console.print(render_table(report))
    for note in notes_of(report):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {folder}", soft_wrap=True)
