"""Latency bars: medians of dense and pruned, with the fastest and the slowest round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune_eval.markup import Markup
from llmprune_eval.pictures.axes import CHARACTER, Scale, bottom_axis, line, picture, rect, text

_BAR = 26.0
_GAP = 12.0


@dataclass(frozen=True)
class Bar:
    """Milliseconds of one model: `low` to `high` is the spread, None where there is none."""

    label: str
    class_: str
    value: float
    low: float | None = None
    high: float | None = None


def latency_bars(name: str, bars: Sequence[Bar], width: int) -> Markup:
    """Horizontal bars from 0, with whiskers over the spread and the value at the end."""
    left = 22 + CHARACTER * max(len(bar.label) for bar in bars)
    right = float(width) - 76
    longest = max(bar.high or bar.value for bar in bars)
    scale = Scale(0.0, longest, left, right)
    bottom = 6 + len(bars) * (_BAR + _GAP)
    parts = [bottom_axis(scale, bottom, "milliseconds", most=5, top=4)]
    for index, bar in enumerate(bars):
        y = 8 + index * (_BAR + _GAP)
        middle = y + _BAR / 2
        parts.append(text(left - 8, middle + 4, bar.label, anchor="end"))
        parts.append(rect(left, y, scale(bar.value) - left, _BAR, bar.class_, rx="2"))
        end = scale(bar.high if bar.high is not None else bar.value)
        if bar.low is not None and bar.high is not None:
            low, high = scale(bar.low), scale(bar.high)
            parts.append(line(low, middle, high, middle, "whisker"))
            parts += [line(at, middle - 5, at, middle + 5, "whisker") for at in (low, high)]
        parts.append(text(end + 6, middle + 4, f"{bar.value:.1f} ms", class_="strong"))
    figures = "; ".join(f"{bar.label} {bar.value:.1f} ms" for bar in bars)
    return picture(width, bottom + 38, f"{name}: {figures}", *parts)
