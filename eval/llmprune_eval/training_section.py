"""The training of a run's report: losses, gates, budget, and units in the running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llmprune_eval.page import (
    absent,
    folded,
    legend,
    paragraph,
    percent,
    section,
    side_by_side,
    small_figure,
    table,
)
from llmprune_eval.pictures.curves import budget_curve, loss_curve, smoothed, survivor_curve
from llmprune_eval.pictures.gate_curves import BANDS, gate_curves
from llmprune_eval.pictures.kept_units import KIND_NAMES

if TYPE_CHECKING:
    from llmprune_eval.markup import Markup
    from llmprune_eval.run_record import RunRecord
    from llmprune_eval.training_log import GateShares

_GATES = "gates"
_PHASES = {_GATES: "calibration of the gates", "recovery": "recovery"}
_GATES_NOTE = (
    "Share of the gates at every step, from the bottom: open, above and below one half, closed; "
    "dashed: their mean."
)


def training_section(run: RunRecord) -> Markup:
    """Losses of calibration and recovery, and what became of the gates on the way."""
    return section("Training", *_loss_parts(run), *_gate_parts(run))


def _loss_parts(run: RunRecord) -> Iterator[Markup]:
    """A picture a phase, how to read them, and their figures."""
    if not run.log.losses:
        yield absent("This run has no log: nothing was trained in it, or the log is gone.")
        return
    cells, rows = [], []
    for phase, losses in run.log.losses.items():
        name = _PHASES.get(phase, phase)
        cells.append(small_figure(partial(loss_curve, name, losses), f"loss, {name}"))
        smooth = smoothed([loss for _, loss in losses])
        lowest = min(loss for _, loss in losses)
        ends = (f"{smooth[0]:.4g}", f"{smooth[-1]:.4g}", f"{lowest:.4g}")
        rows.append((name, f"{len(losses):,}", *ends))
    kinds = sorted({run.recipe.gates.loss, run.recipe.recovery.loss})
    note = f"Faint: every step; line: running median. Loss: {', '.join(kinds)}."
    first, last = run.recipe.gates.temperature
    if _GATES in run.log.losses and last > first:
        note += (
            f" The temperature of the gates rises from {first:g} to {last:g}: they close harder, "
            "and the loss of the calibration may rise."
        )
    yield side_by_side(cells)
    yield paragraph(note, class_="note")
    yield table("Losses, smoothed", ("", "steps", "first", "last", "lowest step"), rows)


def _gate_parts(run: RunRecord) -> Iterator[Markup]:
    """A picture a kind of gates, the budget that they share, and their figures."""
    cells = [
        small_figure(partial(gate_curves, f"gates, {_name(kind)}", rows), f"gates, {_name(kind)}")
        for kind, rows in run.log.gates.items()
    ]
    allowed = [share for _, share in run.log.budget]
    if allowed and max(allowed) - min(allowed) > 1e-6:
        cells.append(small_figure(partial(budget_curve, run.log.budget), "budget of the gates"))
    alive = survivors(run)
    if alive:
        cells.append(small_figure(partial(survivor_curve, alive), "units in the running"))
    if run.log.gates:
        yield legend([*BANDS.items(), ("mean", "mean")])
    if cells:
        yield side_by_side(cells)
    if run.log.gates:
        yield paragraph(_GATES_NOTE + _budget_note(allowed), class_="note")
        rows = [row for kind, steps in run.log.gates.items() for row in _gate_rows(kind, steps)]
        head = ("", "step", *BANDS.values(), "mean")
        yield folded("Figures of the gates", table("Gates by kind and step", head, rows))
    elif _GATES in run.log.losses:
        yield absent("The log of this run has no gates: it was calibrated before logs held them.")


def _budget_note(allowed: Sequence[float]) -> str:
    """What the budget does; a sentence where there is no curve of it."""
    if not allowed or max(allowed) - min(allowed) > 1e-6:
        return ""
    return f" The budget allows {percent(allowed[0])} of the units from the first step on."


def _gate_rows(kind: str, steps: Sequence[GateShares]) -> Iterator[tuple[str, ...]]:
    """The gates of a kind at the first step, at quarters of the way, and at the last."""
    for index in sorted({round(part * (len(steps) - 1) / 4) for part in range(5)}):
        step = steps[index]
        between = (step.half_open - step.open, 1 - step.closed - step.half_open)
        # rounded shares may add up to a little more than all
        shares = (step.open, *(max(0.0, share) for share in between), step.closed)
        cells = (f"{step.step:,}", *map(percent, shares), f"{step.mean:.3f}")
        yield (_name(kind), *cells)


def _name(kind: str) -> str:
    return KIND_NAMES.get(kind, kind)


def survivors(run: RunRecord) -> list[tuple[int, int]]:
    """(step, units still in the running), where units leave for good during the calibration."""
    if run.scores is None:
        return []
    left = Counter(
        step for steps in run.scores.dropped_at.values() for step in steps.tolist() if step >= 0
    )
    if not left:
        return []
    alive = sum(len(steps) for steps in run.scores.dropped_at.values())
    found = [(0, alive)]
    for step in sorted(left):
        alive -= left[step]
        found.append((step, alive))
    last = max((step for step, _ in run.log.losses.get(_GATES, ())), default=found[-1][0])
    return [*found, (max(last, found[-1][0]), alive)]
