"""Sections of a run's report about what was measured: perplexity, latency, samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from llmprune_eval.bench_section import bench_parts
from llmprune_eval.markup import element
from llmprune_eval.page import (
    absent,
    figure,
    folded,
    legend,
    paragraph,
    section,
    side_by_side,
    small_figure,
    table,
)
from llmprune_eval.perplexity_intervals import interval_note, paired_ratio
from llmprune_eval.pictures.latency_bars import Bar, latency_bars
from llmprune_eval.pictures.perplexity_map import FARTHEST, Point, Role, drawn, perplexity_map
from llmprune_eval.rivals import BlockOfRivals, Rival, rivals_of

if TYPE_CHECKING:
    from llmprune.recipe import Recipe
    from llmprune_eval.markup import Markup
    from llmprune_eval.report import EvalReport, LatencyResult, TextResult
    from llmprune_eval.run_record import RunRecord
    from llmprune_eval.speed import Latency, SpeedReport

_RIVALS_NOTE = (
    "Compensated: cut, the means of removed units left as biases; refit: least squares after that; "
    "recovered: trained after that. Only equal stages and equal recovery tokens compare."
)


def perplexity_section(run: RunRecord, blocks: Sequence[BlockOfRivals]) -> Markup:
    """Perplexity against parameters, a picture a text."""
    heading = "Perplexity against parameters"
    if run.report is None or not run.report.perplexities:
        return section(heading, absent("No perplexity was measured in this run."))
    parts = [
        part
        for text in run.report.perplexities
        for part in _text_parts(run, run.report, text, rivals_of(blocks, text))
    ]
    if blocks and not any(b.fits(text) for b in blocks for text in run.report.perplexities):
        texts = ", ".join(sorted({f"{b.text} ({b.num_windows} windows)" for b in blocks}))
        parts.append(
            absent(
                "No block of the comparison was measured on the text and windows of this run with "
                f"the same dense model; it has: {texts}."
            )
        )
    return section(heading, *parts)


def _text_parts(
    run: RunRecord, report: EvalReport, text: TextResult, rivals: Sequence[Rival]
) -> list[Markup]:
    ratio = paired_ratio(text.dense, text.pruned)
    interval = None
    if ratio.low is not None and ratio.high is not None:
        interval = (ratio.low * text.dense.value, ratio.high * text.dense.value)
    points = [
        Point("dense", report.dense.parameters, text.dense.value, "dense"),
        Point("this run", report.pruned.parameters, text.pruned.value, "run", interval),
        *(_point(rival) for rival in rivals),
    ]
    mark = ", a text of the corpus that calibration read" if text.in_domain else ""
    caption = (
        f"{text.name}{mark}: {text.dense.num_windows} windows of {text.dense.window} tokens; log "
        "scale, lower is better."
    )
    if interval:
        caption += f" Whisker: 95 % of the ratio to the dense model; {interval_note(text.dense)}."
    left_out = len(points) - len(drawn(points))
    if left_out:
        caption += f" {left_out} above {FARTHEST:g} times the dense figure are in the table only."
    marks = [("dense", "dense"), ("pruned", "this run")]
    if rivals:
        marks += [("rival", "other methods"), ("control", "controls")]
    head = (
        "model",
        "block",
        "after the cut",
        "recovery tokens",
        "parameters",
        "perplexity",
        "/ dense",
    )
    figures = table(f"Perplexity of {text.name}", head, _text_rows(run, report, text, rivals))
    below = folded("Figures of every model", figures) if rivals else figures
    note = [paragraph(_RIVALS_NOTE, class_="note")] if rivals else []
    picture = figure(partial(perplexity_map, points), caption, *note, below)
    return [element("h3", text.name), legend(marks), picture]


def _text_rows(
    run: RunRecord, report: EvalReport, text: TextResult, rivals: Sequence[Rival]
) -> list[tuple[str, ...]]:
    """The dense model, this run, then the rest: stage, tokens, parameters, perplexity, ratio."""
    tokens, dense, pruned = recovery_tokens(run.recipe), report.dense, report.pruned
    found = [
        ("dense", "", "", 0, dense.parameters, text.dense.value),
        ("this run", "", stage_of(run.recipe), tokens, pruned.parameters, text.pruned.value),
        *(
            (r.label, r.block, r.stage, r.recovery_tokens, r.parameters, r.perplexity)
            for r in rivals
        ),
    ]
    return [
        (
            label,
            block,
            stage,
            f"{tokens:,}" if tokens else "",
            f"{parameters / 1e6:.2f} M",
            f"{perplexity:.2f}",
            f"{perplexity / text.dense.value:.3f}",
        )
        for label, block, stage, tokens, parameters, perplexity in found
    ]


def _point(rival: Rival) -> Point:
    name = rival.label.partition(" (")[0].partition(",")[0]
    role: Role = "control" if rival.is_control else "rival"
    return Point(f"{name} {rival.stage}", rival.parameters, rival.perplexity, role, method=name)


def stage_of(recipe: Recipe) -> str:
    """What a recipe does after the cut, in the words of a comparison."""
    if recipe.recovery.steps:
        return "recovered"
    if recipe.reconstruction is not None:
        return "refit"
    return "compensated" if recipe.compensation == "mean" else "cut"


def recovery_tokens(recipe: Recipe) -> int:
    """Tokens of the training after the cut."""
    return recipe.recovery.steps * recipe.recovery.batch_size * recipe.calibration.row_length


def latency_section(run: RunRecord) -> Markup:
    """Latency bars with their spread, a picture a phase."""
    heading = "Latency"
    parts: list[Markup] = []
    report = run.report
    if report is not None:
        if report.speed is not None:
            parts += _speed_parts(report.speed, str(report.environment.get("device", "")))
        if report.latency is not None:
            parts += _promise_parts(report.latency)
        if parts and report.backends:
            parts.append(element("ul", *(element("li", note) for note in report.backends)))
    if run.bench is not None:
        parts += bench_parts(run.bench)
    if not parts:
        sentence = "No latency was measured in this run; llmprune bench does so."
        return section(heading, absent(sentence))
    return section(heading, *parts)


def _speed_parts(speed: SpeedReport, device: str) -> list[Markup]:
    """Bars, how they were measured, and their figures; `device` is its name."""
    cells, rows = [], []
    for phase, name in (("prefill", "prefill"), ("decode", "decode, a token")):
        bars = []
        for model in ("dense", "pruned"):
            latency: Latency = getattr(speed.models[model], phase)
            spread = (latency.median_ms, latency.min_ms, latency.max_ms)
            bars.append(Bar(model, model, *spread))
            rows.append((f"{name}, {model}", *(f"{value:.1f} ms" for value in spread)))
        cells.append(small_figure(partial(latency_bars, name, bars), name))
    caption = (
        f"Bar: median of {speed.rounds} rounds in which dense and pruned take turns; whisker: the "
        f"fastest and the slowest. {speed.batch_size} x {speed.context} tokens, "
        f"{speed.new_tokens} decode steps, {device or speed.device}, {speed.dtype}; eager PyTorch."
    )
    head = ("", "median", "fastest", "slowest")
    return [
        side_by_side(cells),
        paragraph(caption, class_="note"),
        table("Latency in milliseconds", head, rows),
    ]


def _promise_parts(latency: LatencyResult) -> list[Markup]:
    bars, rows = [], []
    for when, found in (("predicted", latency.predicted), ("measured", latency.measured)):
        for model in ("dense", "pruned"):
            bars.append(Bar(f"{when}, {model}", model, found[model]))
            rows.append((f"{when}, {model}", f"{found[model]:.1f} ms"))
    name = f"{latency.phase} budget"
    caption = (
        f"The budget of {latency.batch_size} x {latency.context} tokens: predicted by the table "
        "that the plan was chosen by, and measured again."
    )
    cell = small_figure(partial(latency_bars, name, bars), name)
    figures = table("The latency budget", ("", "milliseconds"), rows)
    return [side_by_side([cell]), paragraph(caption, class_="note"), figures]


def samples_section(run: RunRecord) -> Markup:
    """A greedy continuation of each model, side by side."""
    heading = "Samples"
    if run.report is None or not run.report.samples:
        return section(heading, absent("No sample was generated in this run."))
    prompt = run.recipe.evaluation.prompt
    cells = []
    for name, sample in run.report.samples.items():
        words = [element("span", prompt, class_="prompt"), sample.removeprefix(prompt)]
        if not sample.startswith(prompt):
            words = [sample]
        quote = element("blockquote", *words, class_=None if name == "dense" else "pruned")
        cells.append(element("div", element("h3", name), quote, class_="cell"))
    return section(heading, paragraph("Greedy continuations."), side_by_side(cells))
