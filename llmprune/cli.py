"""The command line: one subcommand per step of pipeline.py.

Torch and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune import cli_measure
from llmprune.cli_shared import (
    FolderArgument,
    JsonOption,
    ModelArgument,
    console,
    quieten_transformers,
    recipe_of,
    warn,
)
from llmprune.errors import InputError
from llmprune.export import FileType, ServingFormat

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


app = typer.Typer(
    help="Prune a Hugging Face causal language model, verify it, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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

    quieten_transformers()
    folder = out or Path("runs") / recipe.stem
    with progress_bars(console) as on_progress:
        result = run(read, folder, resume=resume, on_progress=on_progress)
    if result is None:
        return
    from llmprune_eval.report import busy_warnings, render_table

    warn(busy_warnings(result.report))
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

    quieten_transformers()
    if recipe_of(folder).prune.weight_blocks is not None:
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


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a pruned model's folder.")],
    out: Annotated[Path, typer.Argument(help="New folder; for gguf a new .gguf file.")],
    form: Annotated[ServingFormat, typer.Option("--format", help="What to write.")],
    dtype: Annotated[FileType | None, typer.Option(help="Of weights; default: as saved.")] = None,
    json: JsonOption = False,
) -> None:
    """Write the model as a server reads it: stock, zero-padded, DeciLM or GGUF."""
    from llmprune.display import export_line, to_json
    from llmprune.export import export as write

    quieten_transformers()
    result = write(folder, out, form, dtype=dtype)
    if json:
        typer.echo(to_json({**asdict(result), "path": str(result.path)}))
    else:
        console.print(export_line(result), soft_wrap=True)


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
    from llmprune.model_card import Findings, model_card
    from llmprune.publication import read_publication
    from llmprune_eval.bench_table import to_markdown as bench_to_markdown
    from llmprune_eval.quality_report import to_markdown as evaluation_to_markdown
    from llmprune_eval.report import EvalReport, to_markdown
    from llmprune_eval.results_of_run import read_bench, read_evaluation

    # it speaks of every attempt; what the user needs to know is in our own messages
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    target = Target(repo, revision, private, create_pr, message)
    publication = read_publication(folder, known_token())
    report = EvalReport.from_json((folder / "report.json").read_text(encoding="utf-8"))
    evaluation, bench = read_evaluation(folder), read_bench(folder)
    findings = Findings(
        report=report,
        table=to_markdown(report),
        evaluation=evaluation,
        evaluation_table="" if evaluation is None else evaluation_to_markdown(evaluation),
        bench=bench,
        bench_table="" if bench is None else bench_to_markdown(bench),
    )

    def write_card(dense_card: ModelCardData | None) -> str:
        return model_card(publication, repo, findings, dense_card=dense_card)

    uploads = (*publication.uploads, card_upload(write_card(None)))
    console.print(upload_table(uploads, publication.left_out, repo))
    if dry_run:
        return
    pushed = run(publication, target, write_card)
    verb = "published" if pushed.changed else "the Hub held exactly this already"
    console.print(f"{verb}: {pushed.url}", soft_wrap=True, highlight=False)


app.command("eval")(cli_measure.evaluate)
app.command()(cli_measure.bench)
app.command()(cli_measure.compare)
app.command()(cli_measure.report)


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
