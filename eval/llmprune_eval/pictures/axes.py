"""Scales, ticks and labels: what every picture is drawn with.

A picture is inline SVG whose colours are classes of the page's style sheet, so that it follows the
page's theme, and whose text is text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmprune_eval.markup import Markup, element, join

# Pixels that a character of a picture's text takes, on average.
CHARACTER = 6.2
# Points of a curve that a screen can tell apart.
_MOST_POINTS = 400

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside land on the edge."""
        low, high, at = (self._linear(v) for v in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def _linear(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.is_log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the scale, `most` at most."""
        if not self.high > self.low:
            return [self.low]
        steps = self._log_ticks(most) if self.is_log else []
        if len(steps) >= 3:
            return steps
        return _linear_ticks(self.low, self.high, most)

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**d for d in decades for f in factors]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) <= most:
                return inside
        return inside[:: math.ceil(len(inside) / most)]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * f for f in (1, 2, 5, 10, 20) if size * f >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def padded(values: Sequence[float], share: float, *, is_log: bool = False) -> tuple[float, float]:
    """The span of values with room at both ends: `share` of it, or of the value where it is 0."""
    low, high = min(values), max(values)
    if is_log:
        room = (high / low) ** share if high > low else 1.2
        return low / room, high * room
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def number(value: float) -> str:
    """A tick's value, short."""
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:g} G"
    if size >= 1e6:
        return f"{value / 1e6:g} M"
    if size >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value:.4g}"


def text(
    x: float, y: float, words: str, *, anchor: Anchor = "start", class_: str | None = None
) -> Markup:
    """Words whose baseline is at (x, y)."""
    anchored = None if anchor == "start" else anchor
    return element("text", words, x=float(x), y=float(y), text_anchor=anchored, class_=class_)


def shortened(words: str, pixels: float) -> str:
    """Words cut so that they fit into so many pixels."""
    most = max(4, int(pixels / CHARACTER))
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    ends = {"x1": float(x1), "y1": float(y1), "x2": float(x2), "y2": float(y2)}
    return element("line", class_=class_, **ends)


def rect(x: float, y: float, width: float, height: float, class_: str, **more: str) -> Markup:
    """A rectangle; `more` are further attributes."""
    sizes = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
    return element("rect", class_=class_, **sizes, **more)


def rects(boxes: Sequence[tuple[float, float, float, float]], class_: str) -> Markup:
    """Many rectangles (x, y, width, height) of one kind as one element: a smaller page."""
    d = "".join(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z" for x, y, w, h in boxes)
    return element("path", d=d, class_=class_) if boxes else join([])


def dot(x: float, y: float, radius: float, class_: str) -> Markup:
    """A disc."""
    return element("circle", cx=float(x), cy=float(y), r=float(radius), class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, *, closed: bool = False) -> Markup:
    """A line through points, thinned to what a screen can show."""
    if len(points) > _MOST_POINTS and not closed:
        step = math.ceil(len(points) / _MOST_POINTS)
        points = [*points[::step], points[-1]]
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")
    return element("path", d=d, class_=class_)


def left_axis(scale: Scale, x: float, right: float, *, most: int = 6) -> Markup:
    """Grid lines from `x` to `right` with their values left of them."""
    parts = []
    for value in scale.ticks(most):
        y = scale(value)
        parts += [line(x, y, right, y, "grid"), text(x - 6, y + 4, number(value), anchor="end")]
    return join(parts)


def bottom_axis(
    scale: Scale, y: float, words: str, *, most: int = 6, top: float | None = None
) -> Markup:
    """Values below `y` and what they are; grid lines up to `top` where that is given."""
    parts = [line(scale.start, y, scale.stop, y, "axis")]
    for value in scale.ticks(most):
        x = scale(value)
        parts.append(line(x, y if top is None else top, x, y + 4, "grid" if top else "axis"))
        parts.append(text(x, y + 17, number(value), anchor="middle"))
    parts.append(text((scale.start + scale.stop) / 2, y + 34, words, anchor="middle"))
    return join(parts)


def numbered_columns(count: int, left: float, right: float, y: float, words: str) -> Markup:
    """Numbers from 0 under columns of equal width, as many as there is room for."""
    pitch = (right - left) / count
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if s * pitch >= 20 or s >= count)
    numbers = [
        text(left + (index + 0.5) * pitch, y + 15, str(index), anchor="middle")
        for index in range(0, count, step)
    ]
    return join([*numbers, text((left + right) / 2, y + 32, words, anchor="middle")])


def picture(width: float, height: float, label: str, *parts: Markup) -> Markup:
    """An SVG picture; `label` is what a screen reader says in its place."""
    box = f"0 0 {width:g} {height:g}"
    return element(
        "svg", *parts, role="img", aria_label=label, viewBox=box, width=width, height=height
    )


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order of `wanted` (ascending), `gap` apart, in [low, high] where they fit."""
    places: list[float] = []
    for value in wanted:
        places.append(max(value, places[-1] + gap if places else low))
    for index in reversed(range(len(places))):
        most = high - gap * (len(places) - 1 - index)
        places[index] = min(places[index], most)
    return places
