"""Where the gates of one kind stand at every step: open, between, closed, as bands of all gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmprune_eval.markup import Markup
from llmprune_eval.pictures.axes import Scale, path
from llmprune_eval.pictures.curves import HEIGHT, plot, steps_axis

if TYPE_CHECKING:
    from llmprune_eval.training_log import GateShares

# Steps that are drawn; of more, every other or fewer.
_MOST_STEPS = 100
# Class of the style sheet -> what the band holds, from the bottom to the top.
BANDS = {
    "open": "open (at least 0.99)",
    "half-open": "above one half",
    "half-closed": "below one half",
    "closed": "closed (at most 0.01)",
}


def gate_curves(name: str, rows: Sequence[GateShares], width: int) -> Markup:
    """Bands of the gates that are open, above and below one half, and closed; dashed, their mean.

    A step holds from its own number to the next one drawn, so that one step is a picture, too.
    """
    drawn = rows[:: math.ceil(len(rows) / _MOST_STEPS)]
    x = steps_axis(rows[0].step - 1, rows[-1].step, width)
    y = Scale(0.0, 1.0, HEIGHT, 8.0)
    edges = [row.step - 1 for row in drawn] + [rows[-1].step]
    tops = {
        "open": [row.open for row in drawn],
        "half-open": [row.half_open for row in drawn],
        "half-closed": [1 - row.closed for row in drawn],
        "closed": [1.0 for _ in drawn],
    }
    parts, below = [], [0.0 for _ in drawn]
    for class_, shares in tops.items():
        top = _stairs(edges, shares, x, y)
        bottom = _stairs(edges, below, x, y)
        parts.append(path([*top, *reversed(bottom)], class_, closed=True))
        below = shares
    mean = _stairs(edges, [row.mean for row in drawn], x, y)
    parts += [path(mean, "halo"), path(mean, "mean")]
    last = rows[-1]
    label = (
        f"{name}: share of the gates by step; at the last, {_percent(last.open)} open, "
        f"{_percent(last.closed)} closed, mean {last.mean:.3f}"
    )
    return plot(width, x, y, label, *parts)


def _stairs(
    edges: Sequence[int], values: Sequence[float], x: Scale, y: Scale
) -> list[tuple[float, float]]:
    """Corners of a line that has a value between each two edges."""
    corners = []
    for index, value in enumerate(values):
        corners += [(x(edges[index]), y(value)), (x(edges[index + 1]), y(value))]
    return corners


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
