"""Sections of a run's report about the plan: what was kept, and the scores it was chosen by."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llmprune.weight_blocks import BlockPlan
from llmprune_eval.markup import element, join
from llmprune_eval.page import (
    absent,
    figure,
    folded,
    legend,
    paragraph,
    percent,
    section,
    side_by_side,
    small_figure,
    table,
)
from llmprune_eval.pictures.axes import number
from llmprune_eval.pictures.block_map import block_map, blocked_kinds
from llmprune_eval.pictures.kept_units import KIND_NAMES, KeptModel, kept_model
from llmprune_eval.pictures.model_map import model_map
from llmprune_eval.pictures.score_map import (
    ScoredGroup,
    score_map,
    scored_groups,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmprune.scores import UnitScores
    from llmprune_eval.markup import Markup
    from llmprune_eval.run_record import RunRecord


def kept_section(run: RunRecord) -> Markup:
    """What was kept, kind by kind and layer by layer."""
    heading = "What was kept"
    if run.plan is None:
        return section(heading, absent("This run has no plan yet: nothing has been chosen."))
    if isinstance(run.plan, BlockPlan):
        return section(heading, *_kept_blocks(run.plan))
    model = kept_model(run.plan)
    return section(heading, *_kept_units(model))


def _kept_units(model: KeptModel) -> list[Markup]:
    rows = [
        (KIND_NAMES[kind], f"{kept:,}", f"{total:,}", percent(1 - kept / total))
        for kind, (kept, total) in model.counts().items()
    ]
    caption = (
        "Every column is a layer of the dense model, the first on the left. Filled: kept; "
        "outlined: removed; an empty frame with a stroke: the whole sublayer is gone."
    )
    return [
        legend([("kept", "kept"), ("removed", "removed")]),
        figure(partial(model_map, model), caption, folded("Layer by layer", _layers(model))),
        table("Units by kind", ("kind", "kept", "of", "removed"), rows),
    ]


def _layers(model: KeptModel) -> Markup:
    rows = [
        (
            str(index),
            f"{sum(layer.heads)} of {len(layer.heads)}" if layer.attention else "no attention",
            f"{sum(layer.kv_groups)} of {len(layer.kv_groups)}",
            f"{sum(layer.mlp_channels):,} of {len(layer.mlp_channels):,}"
            if layer.mlp
            else "no MLP",
        )
        for index, layer in enumerate(model.layers)
    ]
    return table(
        "Units that every layer keeps", ("layer", "heads", "KV groups", "MLP channels"), rows
    )


def _kept_blocks(plan: BlockPlan) -> list[Markup]:
    kinds = blocked_kinds(plan)
    rows = [
        (
            kind.name,
            f"{len(kind.keep_masks)}",
            f"{kind.block[0]} x {kind.block[1]}",
            f"{kind.kept:,}",
            f"{kind.total:,}",
            percent(kind.kept / kind.total),
        )
        for kind in kinds
    ]
    head = ("projection", "layers", "block", "blocks kept", "of", "density")
    layers = [
        (str(index), *(_density(kind.densities(), index) for kind in kinds))
        for index in range(max(len(kind.keep_masks) for kind in kinds))
    ]
    names = ("layer", *(kind.name for kind in kinds))
    return [
        paragraph(
            f"The model keeps its shape; {percent(plan.density)} of the weights of these "
            "projections stay, in blocks, and the rest are zero."
        ),
        side_by_side([small_figure(partial(block_map, kind), kind.name) for kind in kinds]),
        paragraph(
            "A column is a layer, a cell a column of blocks (neighbouring input features): the "
            "stronger its colour, the more of its blocks are kept; an empty cell reads nothing.",
            class_="note",
        ),
        table("Blocks by kind of projection", head, rows),
        folded("Layer by layer", table("Share of the blocks kept in every layer", names, layers)),
    ]


def _density(densities: Sequence[float], index: int) -> str:
    return percent(densities[index]) if index < len(densities) else ""


def scores_section(run: RunRecord) -> Markup:
    """The scores, kind by kind, with the cut."""
    heading = "Scores and the cut"
    if run.scores is None:
        sentence = "This run has no scores: its plan was written by hand, or is yet to be chosen."
        return section(heading, absent(sentence))
    if run.plan is None:
        return section(heading, absent("The scores are there, but no plan was chosen from them."))
    kinds = scored_groups(run.scores, run.plan)
    if not kinds:
        return section(
            heading, absent("The scores are of no kind of unit that the plan removes anything of.")
        )
    parts = [
        legend([("kept", "kept"), ("lost", "removed"), ("cut", "cut")]),
        *(_scores_of(kind, groups) for kind, groups in kinds.items()),
    ]
    return section(heading, paragraph(_how_scored(run, run.scores)), *parts)


def _how_scored(run: RunRecord, scores: UnitScores) -> str:
    if run.recipe.method != "sequential_attention":
        return f"Units were scored by {run.recipe.method.replace('_', ' ')}; higher stays."
    text = "SequentialAttention++ gives every unit a logit that is trained; the higher stays."
    if "rank_correlation" in scores.agreement:
        text += (
            f" Seeds agree on what training did with a rank correlation of "
            f"{scores.agreement['rank_correlation']:.2f}"
            f" (chance reaches {scores.agreement.get('chance', 0.0):.2f})."
        )
    return text


def _scores_of(kind: str, groups: tuple[ScoredGroup, ...]) -> Markup:
    words = KIND_NAMES.get(kind, kind)
    draw = partial(score_map, words, groups)
    across = sum(group.num_across for group in groups)
    units = sum(len(group.scores) for group in groups)
    caption = "The line is the cut."
    if groups[0].layer is not None:
        caption = "The line in each layer is its cut; a layer without one lost nothing."
    if across:
        caption += (
            f" {across:,} of {units:,} units went although they score above a cut: units leave in "
            "whole bundles, in an order, or in rows that choose by themselves."
        )
    rows = [_score_row(group) for group in groups]
    head = ("layer", "kept", "of", "lowest", "median", "highest", "cut")
    figures = table(f"Scores of {words}", head, rows)
    return join(
        [element("h3", words), figure(draw, caption, folded(f"Figures of {words}", figures))]
    )


def _score_row(group: ScoredGroup) -> tuple[str, ...]:
    ordered = sorted(group.scores)
    cut = "" if group.cut is None else number(group.cut)
    return (
        "all" if group.layer is None else str(group.layer),
        f"{sum(group.keep_mask):,}",
        f"{len(group.keep_mask):,}",
        number(ordered[0]),
        number(ordered[len(ordered) // 2]),
        number(ordered[-1]),
        cut,
    )
