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

# Without others beside it a run needs less room.
_HEIGHT, _LOW_HEIGHT = 300.0, 180.0
# Perplexities above this many times the dense model's are named in the table, not drawn.
FARTHEST = 4.0
_LABEL_GAP = 15.0
# Two models are of one size where their parameters differ by less than this share.
_SAME_SIZE = 0.03
# Pixels from which on there is room for models of other sizes.
_ROOMY = 500
# Names stand right of points that are left of this share of the width.
_RIGHT_SIDE = 0.62

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
        method: Of a rival: which of its figures belong together.
    """

    label: str
    parameters: int
    perplexity: float
    role: Role
    interval: tuple[float, float] | None = None
    method: str = ""


def perplexity_map(points: Sequence[Point], width: int) -> Markup:
    """Parameters from left to right, perplexity upwards on a log scale: low and left is good."""
    dense = next(point for point in points if point.role == "dense")
    run = next(point for point in points if point.role == "run")
    near = drawn(points)
    if width < _ROOMY:
        # there is room for the names of one size only
        near = [point for point in near if point is dense or _is_near(point, run)]
    ends = [end for point in near for end in (point.interval or ())]
    left, right, top, bottom = (
        46.0,
        float(width) - 10,
        10.0,
        _HEIGHT if len(near) > 2 else _LOW_HEIGHT,
    )
    spans = padded([p.perplexity for p in near] + ends, 0.14, is_log=True)
    y = Scale(*spans, bottom, top, is_log=True)
    x = Scale(*padded([p.parameters for p in near], 0.12), left, right - 14)
    parts = [left_axis(y, left, right, most=7)]
    parts.append(bottom_axis(x, bottom, "parameters", most=4 if width < _ROOMY else 7))
    level = y(dense.perplexity)
    parts.append(line(left, level, right, level, "reference"))
    named = _named(near, run)
    parts.append(_labels(named, x, y, (left, right)))
    parts += [_mark(point, x, y) for point in sorted(near, key=_depth)]
    parts.append(_dense_label(dense, x, y, right))
    label = (
        f"Perplexity against parameters: dense {dense.perplexity:.2f} at "
        f"{dense.parameters / 1e6:.1f} M, this run {run.perplexity:.2f} at "
        f"{run.parameters / 1e6:.1f} M, {len(near) - 2} others; the table has every number"
    )
    return picture(width, bottom + 40, label, *parts)


def _named(points: Sequence[Point], run: Point) -> list[Point]:
    """This run, and of every method of about its size the best figure."""
    best: dict[str, Point] = {}
    for point in points:
        if point.role == "rival" and _is_near(point, run):
            other = best.get(point.method)
            if other is None or point.perplexity < other.perplexity:
                best[point.method] = point
    return [run, *best.values()]


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
        parts += [line(at - 4, end, at + 4, end, "whisker") for end in (low, high)]
    if point.role == "dense":
        parts.append(rect(at - 5, height - 5, 10, 10, "dense"))
    elif point.role == "run":
        corners = [(at, height - 6.5), (at + 6.5, height), (at, height + 6.5), (at - 6.5, height)]
        parts.append(path(corners, "pruned", closed=True))
    else:
        parts.append(dot(at, height, 4.5, "rival" if point.role == "rival" else "control"))
    return element("g", *parts)


def _labels(points: Sequence[Point], x: Scale, y: Scale, edges: tuple[float, float]) -> Markup:
    """A column of names beside points of about one size, pushed apart, on the roomier side."""
    ordered = sorted(points, key=lambda point: y(point.perplexity))
    wanted = [y(point.perplexity) for point in ordered]
    places = spread_out(wanted, _LABEL_GAP, y.stop + 4, y.start - 6)
    pixels = [x(point.parameters) for point in ordered]
    is_right = max(pixels) < edges[0] + _RIGHT_SIDE * (edges[1] - edges[0])
    side: Anchor = "start" if is_right else "end"
    column = max(pixels) + 34 if is_right else min(pixels) - 34
    room = edges[1] - column if is_right else column - edges[0]
    parts = []
    for point, at, height, place in zip(ordered, pixels, wanted, places, strict=True):
        # the figure first: what is cut off a phone's screen is the name
        words = shortened(f"{point.perplexity:.2f} {point.label}", room)
        face = "strong" if point.role == "run" else None
        parts.append(line(at, height, column + (-4 if is_right else 4), place, "leader"))
        parts.append(text(column, place + 4, words, anchor=side, class_=face))
    return join(parts)


def _dense_label(dense: Point, x: Scale, y: Scale, right: float) -> Markup:
    at = min(x(dense.parameters) + 6, right)
    words = f"{dense.perplexity:.2f} dense"
    level = y(dense.perplexity)
    place = level + 20 if y.start - level > 28 else level - 12
    return text(at, place, words, anchor="end", class_="strong")
