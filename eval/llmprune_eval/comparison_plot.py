"""The chart of a comparison: perplexity by method, a panel a block, a marker a stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llmprune.files import replacing
from llmprune_eval.comparison import BlockTable, Comparison
from llmprune_eval.stored_results import Stage

logger = logging.getLogger("llmprune")

# Okabe and Ito's colours, which the colour-blind tell apart; the shape says it once more.
MARKS: dict[Stage, tuple[str, str]] = {
    "compensated": ("#E69F00", "o"),
    "refit": ("#0072B2", "s"),
    "recovered": ("#009E73", "D"),
}
ROW_INCHES = 0.32


def plot(comparison: Comparison, file: Path) -> bool:
    """Draw the chart; False, with a warning, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s: drawing it needs pip install 'llmprune[plots]'", file.name)
        return False
    blocks = [block for block in comparison.blocks if block.stages]
    if not blocks:
        return False
    heights = [len(block.ranked(block.stages[0])) + 3 for block in blocks]
    figure = Figure(figsize=(9, ROW_INCHES * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)
    for (panel,), block in zip(panels, blocks, strict=True):
        _draw(panel, block)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return True


def _draw(panel: Any, block: BlockTable) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    last = block.stages[-1]
    furthest = block.ranked(last)
    rest = [row for row in block.ranked(block.stages[0]) if row not in furthest]
    rows = [*furthest, *rest]
    for stage in block.stages:
        colour, mark = MARKS[stage]
        points = [(i, row, row.mean(stage)) for i, row in enumerate(rows)]
        known = [(i, row.stages[stage].spread or 0.0, mean) for i, row, mean in points if mean]
        panel.errorbar(
            [mean for _, _, mean in known],
            [i for i, _, _ in known],
            xerr=[spread for _, spread, _ in known],
            fmt=mark,
            color=colour,
            markersize=7,
            markeredgecolor="black",
            markeredgewidth=0.6,
            capsize=3,
            label=stage,
            zorder=3,
        )
    for i, row in enumerate(rows):
        means = [mean for stage in block.stages if (mean := row.mean(stage))]
        panel.plot([min(means), max(means)], [i, i], color="0.7", linewidth=1.5, zorder=1)
    if block.dense is not None and block.dense.value is not None:
        panel.axvline(block.dense.value, color="black", linestyle="--", linewidth=1)
        panel.plot([], [], "k--", linewidth=1, label=f"dense {block.dense.value:.2f}")
    panel.set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.method == "sequential_attention" else "normal")
        label.set_fontstyle("italic" if row.is_control else "normal")
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="x", color="0.9", zorder=0)
    mark = ", in-domain" if block.in_domain else ""
    panel.set_xlabel(f"perplexity of {block.text}{mark} (log scale, lower is better)")
    panel.set_title(f"{block.name}: {block.budget} removed", loc="left", fontsize=11)
    panel.legend(loc="best", fontsize=8, framealpha=0.9)
