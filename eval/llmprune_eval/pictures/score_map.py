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
    rect,
)
from llmprune_eval.pictures.kept_units import KeptModel, kept_model

if TYPE_CHECKING:
    from llmprune.scores import UnitScores
    from llmprune.weight_blocks import BlockPlan

_HEIGHT = 190.0
# Up to so many units of a group are drawn one by one.
_FEW = 16
# Height of a histogram's bins in all.
_BINS = 36
# Scores that span more than this factor are shown on a log scale.
_WIDE = 30.0


@dataclass(frozen=True)
class ScoredGroup:
    """The scores of one unit group and who of it stays.

    Attributes:
        layer: Where it is.
        scores: One a unit, higher stays.
        keep_mask: True = stays.
    """

    layer: int
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
            found.append((kind, ScoredGroup(index, tuple(values.tolist()), mask)))
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
    """Scores from bottom to top; a column a layer, or a unit where the kind spans layers."""
    groups = _as_columns(groups)
    scale = score_scale(groups)
    count = groups[-1].layer + 1
    left, right, bottom = 46.0, float(width) - 2, _HEIGHT + 8
    pitch = (right - left) / count
    parts = [left_axis(scale, left, right, most=5)]
    for group in groups:
        x = left + (group.layer + 0.5) * pitch
        parts.append(_column(group, scale, x, pitch))
        if group.cut is not None:
            y = scale(group.cut)
            parts.append(line(x - pitch / 2, y, x + pitch / 2, y, "cut"))
    if len({len(group.scores) for group in groups}) == 1 and len(groups[0].scores) == 1:
        parts.append(_one_cut(groups, scale, left, right))
    parts.append(numbered_columns(count, left, right, bottom, "layer"))
    kept = sum(sum(group.keep_mask) for group in groups)
    total = sum(len(group.keep_mask) for group in groups)
    label = f"Scores of {kind}, layer by layer, with the cut: {kept:,} of {total:,} units stay"
    return picture(width, bottom + 40, label, *parts)


def _as_columns(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """A kind of the whole model with few units (layers, sublayers): a column for every unit."""
    only = groups[0]
    if len(groups) > 1 or len(only.scores) > 400:
        return list(groups)
    pairs = zip(only.scores, only.keep_mask, strict=True)
    return [ScoredGroup(i, (score,), (stays,)) for i, (score, stays) in enumerate(pairs)]


def _one_cut(groups: Sequence[ScoredGroup], scale: Scale, left: float, right: float) -> Markup:
    """The cut between units that have a column each."""
    scores = tuple(group.scores[0] for group in groups)
    cut = ScoredGroup(0, scores, tuple(group.keep_mask[0] for group in groups)).cut
    return join([] if cut is None else [line(left, scale(cut), right, scale(cut), "cut")])


def score_scale(groups: Sequence[ScoredGroup]) -> Scale:
    """From the lowest to the highest score but for the last thousandth; log where they span far."""
    values = sorted(v for group in groups for v in group.scores if math.isfinite(v))
    if not values:
        return Scale(0.0, 1.0, _HEIGHT + 8, 8.0)
    edge = len(values) // 1000
    low, high = values[edge], values[-1 - edge]
    is_log = low > 0 and high / low > _WIDE
    if not is_log:
        room = (high - low) * 0.03 or 0.5
        low, high = low - room, high + room
    return Scale(low, high, _HEIGHT + 8, 8.0, is_log)


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
    found = []
    for index in range(_BINS):
        kept, lost = bins[True][index], bins[False][index]
        if kept + lost == 0:
            continue
        wide = 0.92 * pitch * (kept + lost) / most
        y, share = scale.start - (index + 1) * height, kept / (kept + lost)
        if lost:
            found.append(rect(x - wide / 2, y, wide * (1 - share), height, "lost"))
        if kept:
            found.append(rect(x - wide / 2 + wide * (1 - share), y, wide * share, height, "kept"))
    return found


def sorted_curve(kind: str, group: ScoredGroup, width: int) -> Markup:
    """The scores of one large group from the highest to the lowest, with the cut."""
    scale = score_scale([group])
    left, right, bottom = 46.0, float(width) - 2, _HEIGHT + 8
    across = Scale(0.0, float(len(group.scores)), left, right - 14)
    order = sorted(group.scores, reverse=True)
    parts = [left_axis(scale, left, right, most=5)]
    parts.append(path([(across(i), scale(s)) for i, s in enumerate(order)], "curve pruned"))
    if group.cut is not None:
        y = scale(group.cut)
        parts.append(line(left, y, right, y, "cut"))
    parts.append(bottom_axis(across, bottom, "units, best first"))
    label = f"Scores of {kind} from the highest to the lowest, {sum(group.keep_mask):,} stay"
    return picture(width, bottom + 40, label, *parts)
