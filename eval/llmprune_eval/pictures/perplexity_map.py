"""Perplexity against parameters: the dense model, this run, and others where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmprune_eval.markup import Markup, element, join
from llmprune_eval.pictures.axes import (
    Anchor,
    Scale,
    bottom_axis,
    dot,
    left_axis,
    line,
    padded,
    path,
    picture,
    rect,
    shortened,
    spread_out,
    text,
)

_HEIGHT = 300.0
# Perplexities above this many times the dense model's are named in the table, not drawn.
FARTHEST = 6.0
_LABEL_GAP = 15.0
# Two models are of one size where their parameters differ by less than this share.
_SAME_SIZE = 0.03

Role = Literal["dense", "run", "rival", "control"]


@dataclass(frozen=True)
class Point:
    """One model: its size and what its text costs it.

    Attributes:
        label: What is written beside it.
        parameters: Of the whole model.
        perplexity: On the text of the picture.
        role: Which of the picture's models it is.
        interval: Ends of the perplexity's 95 % interval against the dense model's.
    """

    label: str
    parameters: int
    perplexity: float
    role: Role
    interval: tuple[float, float] | None = None


def perplexity_map(points: Sequence[Point], width: int) -> Markup:
    """Parameters from left to right, perplexity upwards on a log scale: low and left is good."""
    dense = next(point for point in points if point.role == "dense")
    run = next(point for point in points if point.role == "run")
    near = drawn(points)
    ends = [end for point in near for end in (point.interval or ())]
    left, right, top, bottom = 46.0, float(width) - 10, 10.0, _HEIGHT
    spans = padded([p.perplexity for p in near] + ends, 0.08, is_log=True)
    y = Scale(*spans, bottom, top, is_log=True)
    x = Scale(*padded([p.parameters for p in near], 0.12), left, right)
    parts = [left_axis(y, left, right, most=7)]
    parts.append(bottom_axis(x, bottom, "parameters", most=4 if width < 500 else 7))
    level = y(dense.perplexity)
    parts.append(line(left, level, right, level, "reference"))
    parts += [_mark(point, x, y) for point in sorted(near, key=_depth)]
    labelled = [p for p in near if p.role != "control" and (p is dense or _is_near(p, run))]
    parts.append(_labels(labelled, x, y, left, right))
    label = (
        f"Perplexity against parameters: dense {dense.perplexity:.2f} at "
        f"{dense.parameters / 1e6:.1f} M, this run {run.perplexity:.2f} at "
        f"{run.parameters / 1e6:.1f} M, {len(near) - 2} others; the table has every number"
    )
    return picture(width, bottom + 40, label, *parts)


def drawn(points: Sequence[Point]) -> list[Point]:
    """Points that the picture shows: this run and the dense model always, of the rest the near."""
    dense = next(point for point in points if point.role == "dense")
    return [
        point
        for point in points
        if point.role in ("dense", "run") or point.perplexity <= FARTHEST * dense.perplexity
    ]


def _is_near(point: Point, run: Point) -> bool:
    return abs(point.parameters - run.parameters) <= _SAME_SIZE * run.parameters


def _depth(point: Point) -> int:
    return ("control", "rival", "dense", "run").index(point.role)


def _mark(point: Point, x: Scale, y: Scale) -> Markup:
    at, height = x(point.parameters), y(point.perplexity)
    parts = [element("title", f"{point.label}: {point.perplexity:.2f}")]
    if point.interval:
        low, high = (y(end) for end in point.interval)
        parts.append(line(at, low, at, high, "whisker"))
    if point.role == "dense":
        parts.append(rect(at - 5, height - 5, 10, 10, "dense"))
    elif point.role == "run":
        corners = [(at, height - 8), (at + 8, height), (at, height + 8), (at - 8, height)]
        parts.append(path(corners, "pruned", closed=True))
    else:
        parts.append(dot(at, height, 4.5, "rival" if point.role == "rival" else "control"))
    return element("g", *parts)


def _labels(points: Sequence[Point], x: Scale, y: Scale, left: float, right: float) -> Markup:
    """Names beside their points, pushed apart, each on the side that has more room."""
    parts = []
    sides: tuple[Anchor, ...] = ("start", "end")
    for side in sides:
        mine = [p for p in points if _side(x(p.parameters), left, right) == side]
        mine.sort(key=lambda p: y(p.perplexity))
        wanted = [y(p.perplexity) for p in mine]
        places = spread_out(wanted, _LABEL_GAP, y.stop + 4, y.start - 6)
        if not mine:
            continue
        # one column of names for all points of about one size
        edges = [x(p.parameters) for p in mine]
        column = max(edges) + 26 if side == "start" else min(edges) - 14
        room = (right - column if side == "start" else column - left) + 4
        for point, height, place in zip(mine, wanted, places, strict=True):
            words = shortened(f"{point.label}, {point.perplexity:.2f}", room)
            at, toward = x(point.parameters), 1 if side == "start" else -1
            parts.append(line(at + toward * 7, height, column - toward * 4, place, "leader"))
            parts.append(text(column, place + 4, words, anchor=side, class_=_face(point)))
    return join(parts)


def _side(at: float, left: float, right: float) -> Anchor:
    return "start" if at < (left + right) / 2 else "end"


def _face(point: Point) -> str | None:
    return "strong" if point.role in ("run", "dense") else None
