"""Curves over training steps: losses measured and smoothed, the budget, units in the running."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from llmprune_eval.markup import Markup
from llmprune_eval.pictures.axes import (
    Scale,
    bottom_axis,
    left_axis,
    padded,
    path,
    picture,
)

# Of the area that is drawn in, in pixels.
HEIGHT = 180.0
# A loss that falls by more than this factor is shown on a log scale.
_WIDE = 12.0


def loss_curve(name: str, rows: Sequence[tuple[int, float]], width: int) -> Markup:
    """The loss of every step, faint, and its running median."""
    losses = [loss for _, loss in rows]
    is_log = min(losses) > 0 and max(losses) / min(losses) > _WIDE
    y = Scale(*padded(losses, 0.05, is_log=is_log), HEIGHT, 8.0, is_log)
    x = steps_axis(rows[0][0], rows[-1][0], width)
    measured = [(x(step), y(loss)) for step, loss in rows]
    smooth = smoothed(losses)
    run = [(x(step), y(loss)) for (step, _), loss in zip(rows, smooth, strict=True)]
    label = f"Loss of {name} over {len(rows)} steps, from {smooth[0]:.3g} to {smooth[-1]:.3g}"
    return plot(width, x, y, label, path(measured, "curve faint"), path(run, "curve pruned"))


def survivor_curve(alive: Sequence[tuple[int, int]], width: int) -> Markup:
    """Units that are still in the running after every step that took some out."""
    counts = [count for _, count in alive]
    y = Scale(0.0, max(counts) * 1.05, HEIGHT, 8.0)
    x = steps_axis(alive[0][0], alive[-1][0], width)
    corners = []
    for index, (step, count) in enumerate(alive):
        if index:
            corners.append((x(step), y(alive[index - 1][1])))
        corners.append((x(step), y(count)))
    label = f"Units in the running, from {counts[0]:,} to {counts[-1]:,}"
    return plot(width, x, y, label, path(corners, "curve pruned"))


def budget_curve(allowed: Sequence[tuple[int, float]], width: int) -> Markup:
    """The share of the units that the calibration allowed, step by step."""
    y = Scale(0.0, 1.0, HEIGHT, 8.0)
    x = steps_axis(allowed[0][0], allowed[-1][0], width)
    first, last = allowed[0][1], allowed[-1][1]
    label = f"Budget of the gates: {first:.3f} of the units at first, {last:.3f} at last"
    return plot(width, x, y, label, path([(x(s), y(v)) for s, v in allowed], "curve pruned"))


def smoothed(losses: Sequence[float]) -> list[float]:
    """The running median over a tenth of the steps; as it is where there are few."""
    half = len(losses) // 20
    return [statistics.median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def steps_axis(first: int, last: int, width: int) -> Scale:
    """Where steps are, from the left axis to the right edge."""
    return Scale(float(first), float(last), 46.0, float(width) - 16)


def plot(width: int, x: Scale, y: Scale, label: str, *curves: Markup) -> Markup:
    """Curves over the grid and the numbers of both axes."""
    parts = [left_axis(y, x.start, x.stop, most=5), bottom_axis(x, HEIGHT, "step", most=5)]
    return picture(width, HEIGHT + 40, label, *parts, *curves)
