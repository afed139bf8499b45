"""Paired differences of tasks: a point and its interval for each, about the line of none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune_eval.markup import Markup
from llmprune_eval.pictures.axes import (
    CHARACTER,
    Scale,
    bottom_axis,
    dot,
    line,
    padded,
    picture,
    shortened,
    text,
)

_ROW = 30.0


@dataclass(frozen=True)
class Paired:
    """Pruned minus dense of one task, in points, with the bounds of its 95 % interval."""

    task: str
    value: float
    low: float
    high: float
    is_conclusive: bool


def differences(tasks: Sequence[Paired], width: int) -> Markup:
    """Left of the line the pruned model is worse; a ring where the test decides nothing."""
    longest = CHARACTER * max(len(task.task) for task in tasks)
    left = 12 + min(longest, 0.34 * width)
    right = float(width) - 52
    bounds = [bound for task in tasks for bound in (task.low, task.high)]
    scale = Scale(*padded([*bounds, 0.0], 0.06), left + 6, right)
    bottom = 8 + _ROW * len(tasks)
    words = "points, pruned minus dense"
    parts = [bottom_axis(scale, bottom, words, most=5, top=4)]
    parts.append(line(scale(0.0), 4, scale(0.0), bottom, "reference"))
    for index, task in enumerate(tasks):
        y = 8 + (index + 0.5) * _ROW
        parts.append(text(left - 4, y + 4, shortened(task.task, left - 8), anchor="end"))
        parts.append(line(scale(task.low), y, scale(task.high), y, "whisker"))
        parts += [
            line(scale(at), y - 5, scale(at), y + 5, "whisker") for at in (task.low, task.high)
        ]
        parts.append(dot(scale(task.value), y, 5, "pruned" if task.is_conclusive else "undecided"))
        parts.append(text(right + 8, y + 4, f"{task.value:+.1f}", class_="strong"))
    figures = "; ".join(
        f"{task.task} {task.value:+.1f} ({task.low:+.1f} to {task.high:+.1f})" for task in tasks
    )
    return picture(width, bottom + 38, f"Pruned minus dense, in points: {figures}", *parts)
