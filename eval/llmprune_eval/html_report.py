"""The HTML report of a run: one file that needs no network, beside the figures it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmprune.files import save_text
from llmprune.publication import BENCH_FILE
from llmprune.weight_blocks import BlockPlan
from llmprune_eval.markup import element, join
from llmprune_eval.measured_sections import (
    latency_section,
    perplexity_section,
    recovery_tokens,
    samples_section,
)
from llmprune_eval.page import absent, folded, page, paragraph, percent, section, table
from llmprune_eval.perplexity_intervals import paired_ratio
from llmprune_eval.pictures.kept_units import KIND_NAMES, kept_model
from llmprune_eval.report import COLUMNS, busy_warnings, figure_notes, figure_rows
from llmprune_eval.report_sections import kept_section, scores_section
from llmprune_eval.rivals import BlockOfRivals, read_comparison
from llmprune_eval.run_record import RunRecord, read_run
from llmprune_eval.shared_time import is_shared
from llmprune_eval.tasks_section import tasks_section
from llmprune_eval.training_section import training_section

if TYPE_CHECKING:
    from llmprune.recipe import Recipe
    from llmprune.verification import Verification
    from llmprune_eval.intervals import Ratio
    from llmprune_eval.markup import Markup
    from llmprune_eval.report import EvalReport

REPORT_PAGE = "report.html"
# a number and its sign stay on one line
_SPACE = "\N{NO-BREAK SPACE}"
_TO, _MINUS = "\N{RIGHTWARDS ARROW}", "\N{MINUS SIGN}"
_METHODS = {"sequential_attention": "SequentialAttention++"}


def write_report(folder: Path, out: Path | None = None, comparison: Path | None = None) -> Path:
    """Write the report of a run folder.

    Args:
        folder: That prune wrote.
        out: The file; None for report.html in the folder.
        comparison: A comparison.json whose methods the run is set against.

    Returns:
        The file that was written.

    Raises:
        InputError: The folder is no run's, a file is not what its name says, or the disk is full.
    """
    blocks = () if comparison is None else read_comparison(comparison)
    file = folder / REPORT_PAGE if out is None else out
    text = report_html(read_run(folder), blocks)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_text(text, file)
    return file


def report_html(run: RunRecord, blocks: Sequence[BlockOfRivals] = ()) -> str:
    """The report of a run as one HTML page; a part that the run lacks is said in a sentence."""
    body = join(
        [
            element("h1", f"{run.name}, pruned"),
            element("p", *_lead(run), class_="lead"),
            _tiles(run.report),
            *(absent(_outdated(name)) for name in run.outdated),
            kept_section(run),
            _figures_section(run.report),
            perplexity_section(run, blocks),
            tasks_section(run),
            latency_section(run),
            scores_section(run),
            training_section(run),
            samples_section(run),
            _repeat_section(run),
        ],
        separator="\n",
    )
    return page(f"{run.name}, pruned: report", body)


def _lead(run: RunRecord) -> list[str]:
    """What was done, in a sentence."""
    method = _METHODS.get(run.recipe.method, run.recipe.method.replace("_", " "))
    after = _afterwards(run.recipe)
    if isinstance(run.plan, BlockPlan):
        share = percent(1 - run.plan.density)
        subject = element("strong", f"{share} of the weights of its projections")
        return [subject, f" set to zero in blocks chosen by {method}.{after}"]
    if run.report is not None:
        dense, pruned = run.report.dense, run.report.pruned
        share = percent(1 - pruned.decoder_parameters / dense.decoder_parameters)
        subject = element("strong", f"{share} of the decoder's parameters")
        return [subject, f" removed by {method}.{after}"]
    if run.plan is not None:
        counts = kept_model(run.plan).counts().items()
        gone = [f"{t - k:,} of {t:,} {KIND_NAMES[kind]}" for kind, (k, t) in counts if k < t]
        subject = element("strong", ", ".join(gone) or "nothing")
        return [subject, f" removed by {method}.{after}"]
    return [f"A run of {method} that has not chosen yet."]


def _afterwards(recipe: Recipe) -> str:
    """What followed the cut, a sentence."""
    steps = {
        "the means of what went stay as biases": recipe.compensation == "mean",
        "least-squares refit": recipe.reconstruction is not None,
        "recovery training": recipe.recovery.steps > 0,
    }
    done = [words for words, was_done in steps.items() if was_done]
    return f" After the cut: {', '.join(done)}." if done else ""


def _outdated(name: str) -> str:
    command = "llmprune bench" if name == BENCH_FILE else "llmprune eval"
    return f"{name} is left out, it is of another model than this folder's; {command} renews it."


def _tiles(report: EvalReport | None) -> Markup:
    """The figures that one looks for first."""
    if report is None:
        return join([])
    dense, pruned = report.dense.parameters, report.pruned.parameters
    values = f"{dense / 1e6:.1f} {_TO} {pruned / 1e6:.1f} M"
    tiles = [_tile("parameters", pruned / dense, values)]
    for text in report.perplexities[:2]:
        values = f"{text.dense.value:.2f} {_TO} {text.pruned.value:.2f}"
        ratio = paired_ratio(text.dense, text.pruned)
        mark = " (in-domain)" if text.in_domain else ""
        label = f"perplexity, {text.name}{mark}"
        tiles.append(_tile(label, ratio.value, values, _interval(ratio)))
    if report.speed is not None:
        for phase, ratio in vars(report.speed.ratios["pruned"]).items():
            timed = [getattr(report.speed.models[m], phase) for m in ("dense", "pruned")]
            values = f"{timed[0].median_ms:.1f} {_TO} {timed[1].median_ms:.1f} ms"
            noisy = is_shared(max(latency.waited for latency in timed))
            decides = "too noisy to conclude" if noisy else _interval(ratio)
            tiles.append(_tile(f"{phase} time", ratio.value, values, decides))
    return element("ul", *tiles, class_="tiles")


def _tile(what: str, ratio: float, *below: str) -> Markup:
    return element(
        "li",
        element("span", what, class_="what"),
        element("span", _change(ratio), class_="value"),
        *(element("span", words, class_="from") for words in below),
    )


def _change(ratio: float) -> str:
    """A ratio as what is added or taken away."""
    return f"{100 * (ratio - 1):+.1f}{_SPACE}%".replace("-", _MINUS)


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return "not conclusive"
    text = f"95 %: {_change(ratio.low)} to {_change(ratio.high)}".replace(f"{_SPACE}% to", " to")
    return text if ratio.conclusive else f"{text}, not conclusive"


def _figures_section(report: EvalReport | None) -> Markup:
    heading = "Dense and pruned"
    if report is None:
        return section(heading, absent("Nothing was measured in this run yet."))
    notes = element("ul", *(element("li", note) for note in figure_notes(report)), class_="note")
    warnings = [absent(f"Warning: {warning}.") for warning in busy_warnings(report)]
    figures = table("Figures of both models", COLUMNS, figure_rows(report))
    return section(heading, *warnings, figures, notes)


def _repeat_section(run: RunRecord) -> Markup:
    """Everything that is needed to do it again and to see whether it is the same."""
    folder = f"runs/{run.name}"
    command = element("pre", f"llmprune prune recipe.yaml --out {folder}\nllmprune verify {folder}")
    recipe = folded(
        "The whole recipe",
        paragraph(
            "recipe.yaml in the run folder is this recipe; of paths on the machine of the run only "
            "the names are shown here.",
            class_="note",
        ),
        element("pre", shareable_yaml(run.recipe)),
    )
    parts = [command, _facts("The run", run_facts(run))]
    if run.verification is None:
        parts.append(absent("The saved model was not verified."))
    else:
        parts.append(_facts("Verification", verification_facts(run.verification)))
    if run.report is not None:
        found = [(k.replace("_", " "), str(v)) for k, v in run.report.environment.items()]
        parts.append(_facts("Measured with", found))
    return section("How to repeat it", *parts, recipe)


def _facts(caption: str, rows: Sequence[tuple[str, str]]) -> Markup:
    return element("div", table(caption, (), rows), class_="facts")


def run_facts(run: RunRecord) -> list[tuple[str, str]]:
    """What a run was made from and how, a fact a row."""
    recipe = run.recipe
    source = recipe.model
    rows = [("dense model", f"{_shared(source.source)}, revision {source.revision or 'latest'}")]
    if run.report is not None and run.report.origin:
        rows.append(("taken from", run.report.origin))
    rows_of = recipe.calibration
    own = f", {rows_of.self_generated:.0%} self-generated" if rows_of.self_generated else ""
    if own and rows_of.self_generated_as not in (None, "text"):
        own += f" ({rows_of.self_generated_as})"
    rows.append(
        (
            "calibration",
            f"{_shared(rows_of.dataset)}, {rows_of.split}: {rows_of.num_rows} rows of "
            f"{rows_of.row_length} tokens{own}",
        )
    )
    rows.append(("method", f"{_METHODS.get(recipe.method, recipe.method)}, seed {recipe.seed}"))
    if recipe.method == "sequential_attention":
        gates = recipe.gates
        rows.append(
            ("gates", f"{gates.variant}, prior {gates.prior}, {gates.steps} steps, {gates.loss}")
        )
    if recipe.budget is not None:
        budget = recipe.budget.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        rows.append(("budget", ", ".join(f"{key} {value}" for key, value in budget.items())))
    rows.append(("compensation", recipe.compensation))
    if recipe.reconstruction is not None:
        rows.append(("refit", f"{recipe.reconstruction.num_rows} rows"))
    if recipe.recovery.steps:
        tokens = f"{recovery_tokens(recipe):,} tokens"
        rows.append(
            ("recovery", f"{recipe.recovery.steps} steps, {tokens}, {recipe.recovery.loss}")
        )
    rows.append(("export", f"{recipe.export.format}, {recipe.export.dtype}"))
    rows += [(f"SHA-256 of {name}", digest) for name, digest in run.hashes.items()]
    return rows


def verification_facts(found: Verification) -> list[tuple[str, str]]:
    """How far the reloaded model's logits are from the recorded ones."""
    verdict = "passed" if found.passed else "FAILED"
    rows = [("verdict", f"{verdict}: at most {found.tolerance:g} in {found.arithmetic}")]
    rows.append(("loaded as", found.model_class + (", remote code" if found.remote_code else "")))
    rows.append(("held to", f"logits of the {found.reference} model"))
    for arithmetic, figures in found.max_abs_difference.items():
        words = ", ".join(f"{name.replace('_', ' ')} {v:.1e}" for name, v in figures.items())
        rows.append((f"largest difference, {arithmetic}", words))
    words = ", ".join(f"{value:.1e} in {name}" for name, value in found.cut_from_gated.items())
    rows.append(("cut against gated model", words))
    if found.block_sparse is not None:
        words = ", ".join(f"{value:.1e} in {name}" for name, value in found.block_sparse.items())
        rows.append(("block-sparse layers", words))
    return rows


def shareable_yaml(recipe: Recipe) -> str:
    """The recipe as YAML; of absolute paths only the last name, which may be shown to anyone."""
    return yaml.safe_dump(_without_paths(recipe.model_dump(mode="json")), sort_keys=False)


def _without_paths(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_paths(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_paths(value) for value in data]
    return _shared(data) if isinstance(data, str) else data


def _shared(value: str) -> str:
    path = Path(value)
    return path.name if path.is_absolute() or value.startswith("~") else value
