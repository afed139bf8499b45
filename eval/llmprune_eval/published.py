"""The dense model's sanity gate: a published figure that is missed is told before any table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmprune.errors import InputError

# {task or text: {metric: value}}
Published = Mapping[str, Mapping[str, float]]
# A figure of some of the documents lies at most so many standard errors off, 19 times of 20.
_NORMAL = 1.96


@dataclass(frozen=True)
class Measured:
    """A figure of the dense model. `is_part`: from some of the documents only."""

    value: float
    stderr: float | None
    is_part: bool


def check_published(
    published: Published, measured: Mapping[str, Mapping[str, Measured]], tolerance: float
) -> list[str]:
    """A sentence for every published figure that is missed.

    A share (accuracy) may miss by `tolerance`, any other figure (perplexity) by that part of the
    published value; a figure of some of the documents by 1.96 standard errors more. What was not
    measured is not judged.

    Args:
        published: Figures as lm-eval gives them, accuracies as shares.
        measured: The dense model's figures.
        tolerance: Above 0.

    Raises:
        InputError: A task that was measured has no such metric, or a share is given in per cent.
    """
    sentences = []
    for task, figures in published.items():
        if task not in measured:
            continue
        for metric, wanted in figures.items():
            if metric not in measured[task]:
                names = ", ".join(measured[task])
                raise InputError(
                    f"published.{task}: {metric} is no metric of it; those are {names}"
                )
            got = measured[task][metric]
            is_share = not metric.startswith("perplexity")
            if is_share and wanted > 1.0:
                raise InputError(
                    f"published.{task}.{metric}: must be a share between 0 and 1, got {wanted:g}"
                )
            allowed = tolerance * (1.0 if is_share else wanted)
            if got.is_part and got.stderr is not None:
                allowed += _NORMAL * got.stderr
            if abs(got.value - wanted) > allowed:
                sentences.append(
                    f"{task} {metric}: the dense model has {got.value:.4g} here and "
                    f"{wanted:.4g} as published, more than {allowed:.2g} apart"
                )
    return sentences


def unmeasured(published: Published, measured: Mapping[str, object]) -> list[str]:
    """Tasks and texts with published figures that were not measured."""
    return [task for task in published if task not in measured]
