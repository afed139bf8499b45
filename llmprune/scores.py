"""UnitScores: what calibration found out about every unit; JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import InputError

SCORES_FORMAT = "llmprune-scores/1"


@dataclass(frozen=True)
class UnitScores:
    """What calibration found out about every unit.

    Attributes:
        scores: Group name -> score per unit, higher stays; comparable inside one pool.
        dropped_at: Group name -> step at which a unit left for good, -1 for those that never did;
            who left earlier goes first. Empty where nothing leaves before the end.
        scale: Group name -> the gate that each unit ends with; absent means 1.
        agreement: Of two seeds, `rank_correlation` of what training did to the logits and what
            `chance` reaches; empty where there was one seed.
    """

    scores: Mapping[str, Tensor]
    dropped_at: Mapping[str, Tensor] = field(default_factory=dict)
    scale: Mapping[str, Tensor] = field(default_factory=dict)
    agreement: Mapping[str, float] = field(default_factory=dict)

    def order(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Rank of every unit in a pool of groups, int64, higher stays; ties to low indices."""
        keys: list[tuple[float, float, int, str, int]] = []
        for name in names:
            left = self.dropped_at.get(name)
            for unit, score in enumerate(self.scores[name].tolist()):
                step = -1 if left is None else int(left[unit])
                keys.append((math.inf if step < 0 else step, score, -len(keys), name, unit))
        ranks = {name: torch.zeros(len(self.scores[name]), dtype=torch.int64) for name in names}
        for rank, (_, _, _, name, unit) in enumerate(sorted(keys)):
            ranks[name][unit] = rank
        return ranks

    def to_json(self) -> str:
        """JSON, one group a line; floats round-trip exactly."""
        tables = {"scores": self.scores, "dropped_at": self.dropped_at, "scale": self.scale}
        parts = [f'"format": {json.dumps(SCORES_FORMAT)}']
        for key, table in tables.items():
            rows = [f"{json.dumps(n)}: {json.dumps(v.tolist())}" for n, v in table.items()]
            parts.append(f'"{key}": {{\n' + ",\n".join(rows) + "\n}")
        parts.append(f'"agreement": {json.dumps(dict(self.agreement))}')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @staticmethod
    def from_json(text: str, *, name: str = "scores") -> UnitScores:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is not that.
        """
        try:
            data = json.loads(text)
            if data["format"] == SCORES_FORMAT:
                return UnitScores(
                    scores={k: torch.tensor(v) for k, v in data["scores"].items()},
                    dropped_at={k: torch.tensor(v) for k, v in data["dropped_at"].items()},
                    scale={k: torch.tensor(v) for k, v in data["scale"].items()},
                    agreement={k: float(v) for k, v in data.get("agreement", {}).items()},
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{name}: must be a scores file, got: {error!r}") from error
        raise InputError(f"{name}: format must be {SCORES_FORMAT!r}, got {data['format']!r}")
