"""Scores with the cut line: how the units of every layer are spread, and where the cut fell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.plan import PrunePlan
from llmprune.recipe import UNIT_KINDS
from llmprune_eval.markup import Markup, element, join
from llmprune_eval.pictures.axes import (
    Scale,
    bottom_axis,
    dot,
    left_axis,
    line,
    numbered_columns,
    path,
    picture,
    rects,
)
from llmprune_eval.pictures.kept_units import KeptModel, kept_model

if TYPE_CHECKING:
    from llmprune.scores import UnitScores
    from llmprune.weight_blocks import BlockPlan

_LEFT, _TOP, _BOTTOM = 46.0, 8.0, 198.0
# Up to so many units of a group are drawn one by one.
_FEW = 16
# Of a kind of the whole model, up to so many units have a column each.
_COLUMNS = 64
# Height of a histogram's bins in all.
_BINS = 36
# Scores that span more than this factor are shown on a log scale.
_WIDE = 30.0


@dataclass(frozen=True)
class ScoredGroup:
    """The scores of one unit group and who of it stays.

    Attributes:
        layer: Where it is; None for a kind of the whole model.
        scores: One a unit, higher stays.
        keep_mask: True = stays.
    """

    layer: int | None
    scores: tuple[float, ...]
    keep_mask: tuple[bool, ...]

    @property
    def cut(self) -> float | None:
        """Between the lowest kept and the highest removed score; None where nothing went.

        Where the two overlap (whole bundles, an order of leaving, rows that choose by themselves)
        it is the score that as many units reach as stay.
        """
        kept = [s for s, stays in zip(self.scores, self.keep_mask, strict=True) if stays]
        removed = [s for s, stays in zip(self.scores, self.keep_mask, strict=True) if not stays]
        if not kept or not removed:
            return None
        if min(kept) >= max(removed):
            return (min(kept) + max(removed)) / 2
        return sorted(self.scores, reverse=True)[len(kept) - 1]

    @property
    def num_across(self) -> int:
        """Units that went although they scored above the cut."""
        cut = self.cut
        if cut is None:
            return 0
        pairs = zip(self.scores, self.keep_mask, strict=True)
        return sum(score > cut and not stays for score, stays in pairs)


def scored_groups(
    scores: UnitScores, plan: PrunePlan | BlockPlan
) -> dict[str, tuple[ScoredGroup, ...]]:
    """Kind -> its groups in layer order, of the kinds that lost units; empty where none fits."""
    pairs = _unit_groups(scores, plan) if isinstance(plan, PrunePlan) else _blocks(scores, plan)
    found: dict[str, list[ScoredGroup]] = {}
    for kind, group in pairs:
        found.setdefault(kind, []).append(group)
    return {
        kind: tuple(groups)
        for kind, groups in found.items()
        if any(group.cut is not None for group in groups)
    }


def _unit_groups(scores: UnitScores, plan: PrunePlan) -> list[tuple[str, ScoredGroup]]:
    model = kept_model(plan)
    found: list[tuple[str, ScoredGroup]] = []
    for kind in UNIT_KINDS:
        masks = model.masks(kind)
        spans = kind in scores.scores
        for index, mask in enumerate(masks):
            values = scores.scores.get(kind if spans else f"layers.{index}.{kind}")
            if values is None or len(values) != len(mask) or _went_whole(model, kind, index):
                continue
            layer = None if spans else index
            found.append((kind, ScoredGroup(layer, tuple(values.tolist()), mask)))
    return found


def _went_whole(model: KeptModel, kind: str, index: int) -> bool:
    """Whether a group went with its sublayer, by no score of its own."""
    if kind == "mlp_channels":
        return not model.layers[index].mlp
    return kind in ("heads", "kv_groups") and not model.layers[index].attention


def _blocks(scores: UnitScores, plan: BlockPlan) -> list[tuple[str, ScoredGroup]]:
    found = []
    layers: dict[str, int] = {}
    for name, mask in plan.keep_masks.items():
        kind = name.rpartition(".")[2]
        index = layers[kind] = layers.get(kind, -1) + 1
        values = scores.scores.get(name)
        if values is not None and len(values) == mask.numel():
            flat = tuple(mask.flatten().tolist())
            found.append((kind, ScoredGroup(index, tuple(values.tolist()), flat)))
    return found


def score_map(kind: str, groups: Sequence[ScoredGroup], width: int) -> Markup:
    """Scores from bottom to top, the cut as a line.

    From left to right: the layers; of a kind of the whole model its units, in their order where
    they are few, else from the best to the worst.
    """
    scale = score_scale(groups)
    right = float(width) - 2
    if groups[0].layer is not None:
        inside = _layers(groups, scale, right)
    elif len(groups[0].scores) <= _COLUMNS:
        inside = _units(kind, groups[0], scale, right)
    else:
        inside = _sorted_units(groups[0], scale, right)
    kept = sum(sum(group.keep_mask) for group in groups)
    total = sum(len(group.keep_mask) for group in groups)
    label = f"Scores of {kind} with the cut: {kept:,} of {total:,} units stay"
    axis = left_axis(scale, _LEFT, right, most=5)
    return picture(width, _BOTTOM + 40, label, axis, inside)


def _layers(groups: Sequence[ScoredGroup], scale: Scale, right: float) -> Markup:
    count = max(group.layer or 0 for group in groups) + 1
    pitch = (right - _LEFT) / count
    parts = []
    for group in groups:
        x = _LEFT + ((group.layer or 0) + 0.5) * pitch
        parts.append(_column(group, scale, x, pitch))
        parts.append(_cut(group, scale, x - pitch / 2, x + pitch / 2))
    return join([*parts, numbered_columns(count, _LEFT, right, _BOTTOM, "layer")])


def _units(kind: str, group: ScoredGroup, scale: Scale, right: float) -> Markup:
    pitch = (right - _LEFT) / len(group.scores)
    pairs = zip(group.scores, group.keep_mask, strict=True)
    dots = [
        dot(_LEFT + (unit + 0.5) * pitch, scale(score), 4.0, "kept" if stays else "lost")
        for unit, (score, stays) in enumerate(pairs)
    ]
    words = "layer" if kind.endswith("layers") else "unit"
    columns = numbered_columns(len(group.scores), _LEFT, right, _BOTTOM, words)
    return join([*dots, _cut(group, scale, _LEFT, right), columns])


def _sorted_units(group: ScoredGroup, scale: Scale, right: float) -> Markup:
    across = Scale(0.0, float(len(group.scores)), _LEFT, right - 14)
    order = sorted((score for score in group.scores if math.isfinite(score)), reverse=True)
    curve = path([(across(i), scale(score)) for i, score in enumerate(order)], "curve pruned")
    axis = bottom_axis(across, _BOTTOM, "units, best first")
    return join([curve, _cut(group, scale, _LEFT, right), axis])


def _cut(group: ScoredGroup, scale: Scale, left: float, right: float) -> Markup:
    if group.cut is None:
        return join([])
    return line(left, scale(group.cut), right, scale(group.cut), "cut")


def score_scale(groups: Sequence[ScoredGroup]) -> Scale:
    """From the lowest to the highest score but for the last thousandth; log where they span far."""
    values = sorted(v for group in groups for v in group.scores if math.isfinite(v))
    if not values:
        return Scale(0.0, 1.0, _BOTTOM, _TOP)
    edge = len(values) // 1000
    low, high = values[edge], values[-1 - edge]
    is_log = low > 0 and high / low > _WIDE
    if not is_log:
        room = (high - low) * 0.03 or 0.5
        low, high = low - room, high + room
    return Scale(low, high, _BOTTOM, _TOP, is_log)


def _column(group: ScoredGroup, scale: Scale, x: float, pitch: float) -> Markup:
    words = f"layer {group.layer}: {sum(group.keep_mask):,} of {len(group.keep_mask):,} stay"
    title = element("title", words)
    if len(group.scores) <= _FEW:
        radius = min(4.0, pitch * 0.32)
        dots = [
            dot(x, scale(score), radius, "kept" if stays else "lost")
            for score, stays in zip(group.scores, group.keep_mask, strict=True)
        ]
        return element("g", title, *dots)
    return element("g", title, *_histogram(group, scale, x, pitch))


def _histogram(group: ScoredGroup, scale: Scale, x: float, pitch: float) -> list[Markup]:
    """Two outlines about the middle of the column: who stays and who goes, bin by bin."""
    bins = {True: [0] * _BINS, False: [0] * _BINS}
    height = (scale.start - scale.stop) / _BINS
    for score, stays in zip(group.scores, group.keep_mask, strict=True):
        index = int((scale.start - scale(score)) / height) if math.isfinite(score) else 0
        bins[stays][min(_BINS - 1, index)] += 1
    most = max(a + b for a, b in zip(bins[True], bins[False], strict=True))
    boxes: dict[bool, list[tuple[float, float, float, float]]] = {True: [], False: []}
    for index in range(_BINS):
        kept, lost = bins[True][index], bins[False][index]
        left = x - 0.46 * pitch * (kept + lost) / most
        y = scale.start - (index + 1) * height
        for stays, count in ((False, lost), (True, kept)):
            wide = 0.92 * pitch * count / most
            if count:
                boxes[stays].append((left, y, wide, height))
            left += wide
    return [rects(boxes[False], "lost"), rects(boxes[True], "kept")]
