"""Result: one measured figure with what it took; StoredResults: a JSON file for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmprune.errors import InputError
from llmprune.files import save_text
from llmprune.recipe import Recipe
from llmprune_eval.perplexity import Perplexity

RESULT_FORMAT = "llmprune-comparison-result/1"

# compensated: cut, the means of removed units left as biases; refit: least squares after that;
# recovered: trained after that
Stage = Literal["dense", "compensated", "refit", "recovered"]


@dataclass(frozen=True)
class Result:
    """One figure: a model's perplexity on one text, or why there is none.

    Attributes:
        perplexity: With the NLL of every window, so that paired intervals can be had; None where
            the method was refused.
        refused: Why it was.
        removed: Share of the decoder's parameters that went.
        parameters: Of the whole model that was measured, biases of compensation included.
        units: Kind -> units removed, of how many.
        tokens: `scores`, `gates`, `refit`, `recovery`: calibration tokens that each step took.
        seconds: Wall time of each step, and of `evaluation`.
        is_partial_time: A step was taken up from a killed run; its seconds lack what came before.
        environment: Machine, versions and date.
    """

    perplexity: Perplexity | None
    refused: str = ""
    removed: float = 0.0
    parameters: int = 0
    units: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    is_partial_time: bool = False
    environment: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The perplexity itself."""
        return None if self.perplexity is None else self.perplexity.value

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Result:
        """Read what `asdict` gave, after a way through JSON."""
        found = data["perplexity"]
        perplexity = None
        if found is not None:
            lists = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
            perplexity = Perplexity(**found | lists)
        units = {kind: (gone, total) for kind, (gone, total) in data["units"].items()}
        return Result(**{**data, "perplexity": perplexity, "units": units})


def request_of(recipe: Recipe, stage: Stage, windows: int | None) -> str:
    """What asks for a result, as far as a recipe tells without a model at hand; a hash."""
    task = recipe.evaluation.perplexity[0]
    sources = [recipe.model, recipe.calibration, task.model_copy(update={"max_windows": windows})]
    asked = [source.model_dump(mode="json", exclude_none=True) for source in sources]
    if stage == "dense":
        return hash_of([asked[0], asked[2], stage])
    return hash_of([asked, stage_parts(recipe, stage)])


def plan_parts(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a plan depends on, besides the model and the calibration rows."""
    whole = recipe.model_dump(mode="json", exclude_none=True)
    parts = {key: whole[key] for key in ("method", "prune", "budget", "compensation", "seed")}
    trains = recipe.method == "sequential_attention"
    parts["gates"] = whole["gates"] if trains else {"prior_rows": recipe.gates.prior_rows}
    parts["format"] = recipe.export.format
    parts["mixed_precision"] = recipe.training.mixed_precision
    return parts


def stage_parts(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What of a recipe a result depends on, besides model, calibration rows and text."""
    whole = recipe.model_dump(mode="json", exclude_none=True)
    parts = plan_parts(recipe) | {"stage": stage}
    if stage in ("refit", "recovered"):
        parts["reconstruction"] = whole.get("reconstruction")
    if stage == "recovered":
        parts["recovery"] = whole["recovery"]
    return parts


def hash_of(parts: Any) -> str:
    """A short name for anything that JSON holds."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


class StoredResults:
    """The results in a folder, `KEY.json` each, with every request that they answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asked: dict[str, Result] | None = None

    def get(self, key: str, request: str) -> Result | None:
        """The result of that key; from now on it answers `request`, too."""
        file = self.folder / f"{key}.json"
        if not file.is_file():
            return None
        data = self._read(file)
        if request not in data["requests"]:
            save_text(_to_json(data | {"requests": [*data["requests"], request]}), file)
        return Result.from_dict(data["result"])

    def put(self, key: str, request: str, inputs: Mapping[str, Any], result: Result) -> None:
        """Write a result with what it depends on."""
        data = {
            "format": RESULT_FORMAT,
            "requests": [request],
            "inputs": inputs,
            "result": asdict(result),
        }
        save_text(_to_json(data), self.folder / f"{key}.json")

    def asked(self, request: str) -> Result | None:
        """The newest result that was computed for a request."""
        return self.all_asked().get(request)

    def all_asked(self) -> dict[str, Result]:
        """Request -> the newest result that was computed for it."""
        if self._asked is None:
            files = [self._read(file) for file in sorted(self.folder.glob("*.json"))]
            files.sort(key=lambda data: str(data["result"]["environment"].get("date", "")))
            self._asked = {
                name: Result.from_dict(data["result"])
                for data in files
                for name in data["requests"]
            }
        return self._asked

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["format"] != RESULT_FORMAT:
                raise InputError(
                    f"{file.name}: format must be {RESULT_FORMAT!r}, got {data['format']!r}; "
                    "delete it or choose another --out"
                )
            Result.from_dict(data["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file.name}: must be a result ({error!r}); delete it") from error
        return dict(data)


def _to_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"
