"""Rivals: figures of a comparison that a run can be set against, from comparison.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError
from llmprune_eval.comparison import COMPARISON_FORMAT, STAGES

if TYPE_CHECKING:
    from llmprune_eval.report import TextResult
    from llmprune_eval.stored_results import Stage

# Two measurements of the dense model are of the same text where they agree to this share.
_SAME = 1e-3


@dataclass(frozen=True)
class Rival:
    """One method of a comparison in one stage.

    Attributes:
        label: What the method is called.
        block: The block of the comparison it is from.
        stage: What was done after the cut.
        perplexity: Mean over its seeds.
        parameters: Of the whole model.
        recovery_tokens: Tokens of training after the cut.
        is_control: A variant that answers a question, not a method to choose.
    """

    label: str
    block: str
    stage: Stage
    perplexity: float
    parameters: int
    recovery_tokens: int
    is_control: bool


@dataclass(frozen=True)
class BlockOfRivals:
    """A block of a comparison: what it was measured on, and its rivals."""

    name: str
    text: str
    window: int
    num_windows: int
    dense_perplexity: float
    rivals: tuple[Rival, ...]

    def fits(self, text: TextResult) -> bool:
        """Whether it was measured on the same windows of the same text, of the same dense model."""
        return (
            (self.text, self.window, self.num_windows)
            == (text.name, text.dense.window, text.dense.num_windows)
        ) and math.isclose(self.dense_perplexity, text.dense.value, rel_tol=_SAME)


def read_comparison(file: Path) -> tuple[BlockOfRivals, ...]:
    """The blocks of a comparison.json that `llmprune compare` wrote.

    Raises:
        InputError: It is not that.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != COMPARISON_FORMAT:
            raise InputError(
                f"{file}: format must be {COMPARISON_FORMAT!r}, got {data['format']!r}"
            )
        return tuple(_block(block) for block in data["blocks"] if _is_measured(block["dense"]))
    except OSError as error:
        raise InputError(f"{file}: --compare must be a readable file, got: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{file}: --compare must be a comparison.json of llmprune compare, got: {error!r}"
        ) from error


def rivals_of(blocks: Sequence[BlockOfRivals], text: TextResult) -> tuple[Rival, ...]:
    """Rivals that were measured on what a run was, best first."""
    found = [rival for block in blocks if block.fits(text) for rival in block.rivals]
    return tuple(sorted(found, key=lambda rival: rival.perplexity))


def _is_measured(result: Any) -> bool:
    return result is not None and "perplexity" in result


def _block(data: dict[str, Any]) -> BlockOfRivals:
    dense = data["dense"]
    rivals = []
    for row in data["rows"]:
        for stage in STAGES:
            seeded = row["stages"].get(stage)
            if seeded is None or seeded["mean"] is None:
                continue
            first = next(seed for seed in seeded["seeds"] if "perplexity" in seed)
            rivals.append(
                Rival(
                    label=str(row["label"]),
                    block=str(data["name"]),
                    stage=stage,
                    perplexity=float(seeded["mean"]),
                    parameters=int(first["parameters"]),
                    recovery_tokens=int(first["tokens"].get("recovery", 0)),
                    is_control=bool(row["is_control"]),
                )
            )
    return BlockOfRivals(
        name=str(data["name"]),
        text=str(data["text"]),
        window=int(dense["window"]),
        num_windows=int(dense["num_windows"]),
        dense_perplexity=float(dense["perplexity"]),
        rivals=tuple(rivals),
    )
