"""Recipe: everything a run needs, frozen and strict; reading YAML; overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from llmprune.errors import InputError
from llmprune.overrides import apply_override, kind_of
from llmprune.recipe_training import (
    GateTraining,
    Part,
    Positive,
    Reconstruction,
    Recovery,
    Tracking,
    Training,
)

UnitKind = Literal[
    "heads",
    "kv_groups",
    "mlp_channels",
    "hidden_channels",
    "attention_sublayers",
    "mlp_sublayers",
    "layers",
]
UNIT_KINDS: tuple[UnitKind, ...] = get_args(UnitKind)

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelSource(Part):
    """Where the dense model comes from.

    `source` and `fallback` are a Hub id, a folder, a GGUF file, or
    `pypi:NAME==VERSION/PATH.gguf[#sha256=HEX]` (a GGUF file inside a wheel). `fallback` is taken,
    and said so, only where `source` is a Hub id that can be reached neither on the network nor in
    the cache.
    """

    source: str
    revision: str | None = None
    fallback: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False


class TextSource(Part):
    """A text: `builtin:python-reference`, a local file, or a Hub data set.

    To calibrate on there is also `builtin:self-generated`: what the dense model itself writes.
    A .jsonl, .json or .parquet file (a .gz, too) is a table with the text in `column`; any other
    file is one plain text. The built-in text has the splits `train` and `test`. `fallback` (a
    local file or the built-in text; to calibrate on also self-generated rows) is taken, and said
    so, where `dataset` is a Hub data set that can be reached neither on the network nor in the
    cache; `column` holds for it, too.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    fallback: str | None = None


class Calibration(TextSource):
    """The token rows that gates and weights are trained on: (num_rows, row_length) tokens.

    `self_generated` is the share of the rows that the dense model writes itself, mixed among those
    of the data set: they hold on to what the text does not speak of. `self_generated_as` is what it
    writes: `text` from nothing (as without it), `conversations` (both sides, in the tokenizer's
    chat template), or `both` in turn.
    """

    dataset: str = "builtin:python-reference"
    num_rows: Positive = 128
    row_length: Annotated[int, Field(ge=8)] = 256
    self_generated: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    self_generated_as: Literal["text", "conversations", "both"] | None = None


class KindRule(Part):
    """What may go of one kind of unit.

    Without `sparsity` (the share of units removed) the kind takes its part of `budget`.
    `multiple_of` rounds the count kept per layer, `min_kept` is the least of it; `scope` is where
    units compete: within their layer (equal counts in every layer) or across the model
    (`export.format: per_layer` only).
    """

    sparsity: Sparsity | None = None
    multiple_of: Positive = 1
    min_kept: Positive | None = None
    scope: Literal["layer", "model"] = "layer"


class WeightBlocks(Part):
    """Rectangles of weights that become zero; the model keeps its shape.

    `block` is (rows, columns) in output and input features; a projection that it does not divide
    takes the nearest block that fits. `modules` names the sublayers whose projections are pruned.
    `rows: balanced` leaves equally many blocks in every block row of a projection (no program of a
    kernel waits for another), `free` lets them compete across the projection.
    """

    block: tuple[Literal[16, 32, 64, 128], Literal[16, 32, 64, 128]] = (128, 32)
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)]
    modules: tuple[Literal["attention", "mlp"], ...] = Field(("mlp",), min_length=1)
    rows: Literal["balanced", "free"] = "balanced"


class Prune(Part):
    """The kinds of unit that may be removed; a kind that is not named stays whole.

    Counts of pruned heads, KV groups and MLP channels are multiples of `tensor_parallel_size`.
    `weight_blocks` stands alone: prune units first, and the result by another recipe.
    """

    heads: KindRule | None = None
    kv_groups: KindRule | None = None
    mlp_channels: KindRule | None = None
    hidden_channels: KindRule | None = None
    attention_sublayers: KindRule | None = None
    mlp_sublayers: KindRule | None = None
    layers: KindRule | None = None
    weight_blocks: WeightBlocks | None = None
    tensor_parallel_size: Positive = 1

    def rules(self) -> dict[UnitKind, KindRule]:
        """The named kinds with their rules, in the order of `UNIT_KINDS`."""
        named = ((kind, getattr(self, kind)) for kind in UNIT_KINDS)
        return {kind: rule for kind, rule in named if rule is not None}


class Budget(Part):
    """How much must go: exactly one of `sparsity`, `latency_ms` and `latency`.

    `sparsity` is a share of the total named by `of`; `latency` a ratio to the dense model's time
    for one `phase` at (batch_size, context) tokens, `latency_ms` that time. Met within `tolerance`
    of the total. `allocation` says how kinds and layers divide it: equal shares, or what loses the
    least importance (llmprune/allocation.py).
    """

    sparsity: Sparsity | None = None
    of: Literal["decoder_parameters", "parameters", "flops", "kv_bytes"] = "decoder_parameters"
    latency_ms: Annotated[float, Field(gt=0.0)] | None = None
    latency: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    phase: Literal["prefill", "decode"] = "prefill"
    batch_size: Positive = 1
    context: Positive = 128
    tolerance: Annotated[float, Field(gt=0.0, le=0.1)] = 0.01
    allocation: Literal["equal", "importance"] = "equal"

    @model_validator(mode="after")
    def _one_goal(self) -> Budget:
        given = [name for name in BUDGET_GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"must have exactly one of {', '.join(BUDGET_GOALS)}, got {got}")
        return self


BUDGET_GOALS = ("sparsity", "latency_ms", "latency")


Method = Literal[
    "sequential_attention",
    "random",
    "magnitude",
    "wanda",
    "flap",
    "taylor",
    "taylor_squared",
    "block_influence",
    "omp",
]
# Those of them that score weight blocks.
BLOCK_METHODS = ("sequential_attention", "random", "magnitude", "wanda", "taylor", "taylor_squared")


class Export(Part):
    """What is written: `uniform` loads in stock classes, `per_layer` lets layers differ."""

    format: Literal["uniform", "per_layer"] = "uniform"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class PerplexityTask(TextSource):
    """Perplexity of a text in non-overlapping windows; the first `max_windows` of them."""

    window: Annotated[int, Field(ge=2)] = 512
    max_windows: Positive | None = None


class SpeedTask(Part):
    """Latency of prefill (`context` tokens a row) and of `new_tokens` decode steps."""

    batch_size: Positive = 1
    context: Positive = 128
    new_tokens: Positive = 16
    rounds: Annotated[int, Field(ge=3)] = 7


class Evaluation(Part):
    """What is measured on the dense and the pruned model.

    `published` are figures of the dense model that others report, {task or text: {metric: value}};
    `llmprune eval` warns where it measures one further off than `published_tolerance`.
    """

    perplexity: tuple[PerplexityTask, ...] = ()
    speed: SpeedTask | None = SpeedTask()
    prompt: str = "The capital of France is"
    published: dict[str, dict[str, float]] = {}
    published_tolerance: Annotated[float, Field(gt=0.0)] = 0.02


class Recipe(Part):
    """Everything a run needs. Read one with `Recipe.read(path)`.

    `method` is how units are scored: `sequential_attention` trains gates as `gates` says; the
    others are baselines (llmprune/baselines.py), with all else the same. `compensation: mean` keeps
    what removed units add on average as a bias (llmprune/compensation.py).
    """

    model: ModelSource
    calibration: Calibration = Calibration()
    prune: Prune
    budget: Budget | None = None
    method: Method = "sequential_attention"
    gates: GateTraining = GateTraining()
    compensation: Literal["none", "mean"] = "none"
    reconstruction: Reconstruction | None = None
    recovery: Recovery = Recovery()
    training: Training = Training()
    tracking: Tracking = Tracking()
    export: Export = Export()
    evaluation: Evaluation = Evaluation()
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _gates_of_blocks_learn_faster(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("prune"), dict):
            return data
        gates = data.get("gates", {})
        if data["prune"].get("weight_blocks") is None or not isinstance(gates, dict):
            return data
        return {**data, "gates": {"learning_rate": 0.05, **gates}}

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        rules = self.prune.rules()
        if self.prune.weight_blocks is not None:
            self._fits_weight_blocks(rules)
            return self
        if not rules:
            raise ValueError(
                f"prune must name at least one kind of unit ({', '.join(UNIT_KINDS)}) or "
                "weight_blocks"
            )
        open_kinds = [kind for kind, rule in rules.items() if rule.sparsity is None]
        if open_kinds and self.budget is None:
            raise ValueError(f"prune.{open_kinds[0]} has no sparsity and there is no budget")
        if self.budget is not None and not open_kinds:
            raise ValueError("budget has no kind to act on: every kind in prune has a sparsity")
        if self.budget is not None:
            self._budget_fits(self.budget, rules)
        if self.export.format == "uniform":
            across = [kind for kind, rule in rules.items() if _crosses_layers(kind, rule)]
            if across:
                raise ValueError(
                    f"prune.{across[0]}.scope: model gives layers different widths; "
                    "it needs export.format: per_layer"
                )
        return self

    def _fits_weight_blocks(self, rules: dict[UnitKind, KindRule]) -> None:
        """Refuse what has no meaning where the model keeps its shape."""
        conflicts = {
            f"prune.{next(iter(rules), '')}": bool(rules),
            "budget": self.budget is not None,
            "compensation: mean": self.compensation != "none",
            "recovery.train: lora": self.recovery.train != "all" and self.recovery.steps > 0,
            "gates.train: lora": self.gates.train == "lora",
            "export.format: per_layer": self.export.format != "uniform",
            f"gates.prior: {self.gates.prior}": self.gates.prior in ("omp", "integrated"),
            f"method: {self.method}": self.method not in BLOCK_METHODS,
        }
        for name, is_there in conflicts.items():
            if is_there:
                raise ValueError(
                    f"prune.weight_blocks can't be combined with {name}; take it out, or use a "
                    "second recipe on the result of the first"
                )

    def _budget_fits(self, budget: Budget, rules: dict[UnitKind, KindRule]) -> None:
        if budget.sparsity is None and "hidden_channels" in rules:
            raise ValueError(
                "a latency budget is measured at the dense hidden size, got prune.hidden_channels; "
                "take it out or give budget.sparsity"
            )
        if budget.allocation == "equal":
            return
        fixed = [k for k, rule in rules.items() if rule.sparsity and _crosses_layers(k, rule)]
        if fixed:
            raise ValueError(
                f"prune.{fixed[0]} must have no sparsity of its own to compete across layers "
                "where budget.allocation is importance"
            )
        trains = self.method == "sequential_attention" and self.export.format == "uniform"
        if trains and self.gates.prior == "none":
            raise ValueError(
                "budget.allocation: importance in a uniform export finds its counts before gates "
                "train, so it needs gates.prior, got none"
            )

    @staticmethod
    def read(path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Read a recipe from YAML.

        Args:
            path: The YAML file.
            overrides: `dotted.key=value` pairs; each value is read as YAML.

        Raises:
            InputError: The file can't be read, a key is unknown or a value impossible; the message
                names the file, the key, the rule and what was got.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such recipe file") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: a recipe must be a readable text file, got: {error}"
            ) from error
        except yaml.YAMLError as error:
            where = " ".join(str(error).split())
            raise InputError(f"{path}: a recipe must be YAML, got: {where}") from error
        if not isinstance(data, dict):
            raise InputError(f"{path}: a recipe must be a mapping of keys, got {kind_of(data)}")
        for override in overrides or []:
            apply_override(data, override)
        return Recipe.parse(data, name=str(path))

    @staticmethod
    def parse(data: dict[str, Any], *, name: str = "recipe") -> Recipe:
        """Check a mapping read from YAML or JSON; `name` begins the error message."""
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            raise InputError(_one_line(name, error)) from error

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _crosses_layers(kind: UnitKind, rule: KindRule) -> bool:
    per_layer_kinds = ("heads", "kv_groups", "mlp_channels")
    return kind in per_layer_kinds and rule.scope == "model"


def _one_line(name: str, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown key {key}; see docs/recipe.md for the keys there are{more}"
    rule = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{name}: {key}: {rule[0].lower()}{rule[1:]}{got}{more}"
