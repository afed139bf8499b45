"""The parts of a recipe that say how things are trained: gates, refit, recovery."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0)]
Prior = Literal["fisher", "integrated", "activation", "omp", "none"]


class Part(BaseModel):
    """A frozen part of a recipe; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GateTraining(Part):
    """How SequentialAttention++ finds the survivors (docs/sequential-attention.md).

    `variant: plus_plus` is the published algorithm; `capped` the default for language models;
    `magnitude` is its control, the same phases with weight norms in place of learned logits.
    `curve` is how the budget falls in a sparsify phase: `gradual` as published, or `at_once`, the
    final budget from the first step; without it `capped` takes `at_once`, the others `gradual`.
    With `seeds` above 1 the gates are trained that often, on the rows in different orders, and
    their logits averaged.
    `prior` is the importance whose logarithm the logits start from, on `prior_rows` rows: `fisher`
    (the diagonal of the gates' Fisher information), `integrated` (gradients along a path on which
    all gates close together), `activation` (activations and weights), `omp` (backward matching).
    `learning_rate` is the logits': without it 0.05, but `auto` where `capped` gates on units start
    from a prior, which few rows should overrule the less the less its own choice loses: the loss at
    the first step times 0.05 (nats a token), within 0.02 and 0.05 (docs/decisions/0017).
    `train` says what learns along with the logits. `dense`, `sparsify`, `sparse` are the shares of
    the steps in the phases of one cycle; `cycles` repeats it (the last sparse phase is the end).
    """

    variant: Literal["capped", "plus_plus", "magnitude"] = "capped"
    curve: Literal["gradual", "at_once"] = "gradual"
    loss: Literal["distillation", "next_token"] = "distillation"
    train: Literal["gates", "lora", "all"] = "gates"
    prior: Prior = "fisher"
    prior_rows: Positive = 64
    steps: Annotated[int, Field(ge=0)] = 60
    batch_size: Positive = 2
    micro_batch_size: Positive | None = None
    learning_rate: Rate | Literal["auto"] = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    weights_learning_rate: Rate = 1e-4
    lora_rank: Positive = 8
    dense: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    sparsify: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    sparse: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    cycles: Positive = 1
    temperature: tuple[float, float] = (1.0, 30.0)
    seeds: Positive = 1

    @model_validator(mode="before")
    @classmethod
    def _what_suits_the_variant(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("variant", "capped") == "capped":
            rate = {} if data.get("prior", "fisher") == "none" else {"learning_rate": "auto"}
            return {"curve": "at_once", **rate, **data}
        return data

    @model_validator(mode="after")
    def _phases_fill_the_run(self) -> GateTraining:
        total = self.dense + self.sparsify + self.sparse
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"dense + sparsify + sparse must be 1, got {total:g}")
        if self.variant == "plus_plus" and self.prior == "none" and not self.dense:
            raise ValueError(
                "variant: plus_plus with prior: none must begin with a dense phase, got dense 0: "
                "units would leave before a logit has learned anything"
            )
        if self.variant == "magnitude" and self.train != "all":
            raise ValueError(
                f"variant: magnitude needs train: all, got {self.train}: with fixed weights it is "
                "method: magnitude"
            )
        if self.learning_rate == "auto" and (self.variant != "capped" or self.prior == "none"):
            raise ValueError(
                f"learning_rate: auto needs variant: capped and a prior, got {self.variant} and "
                f"prior: {self.prior}: what the prior's choice loses sets it; give a number"
            )
        if self.seeds > 1 and (self.train != "gates" or self.variant != "capped"):
            raise ValueError(
                f"seeds: {self.seeds} needs train: gates and variant: capped, got {self.train} and "
                f"{self.variant}: only logits can be averaged"
            )
        if not 0 < self.temperature[0] <= self.temperature[1]:
            raise ValueError(f"temperature must be 0 < first <= last, got {self.temperature}")
        return self


class Reconstruction(Part):
    """Least-squares refit of what writes to the residual stream, on the calibration rows.

    `ridge` pulls towards the cut weights, as a share of the mean squared input.
    """

    num_rows: Positive = 64
    ridge: Annotated[float, Field(gt=0.0)] = 1e-3


class Recovery(Part):
    """The training after the cut: `loss` against the dense model on the calibration rows."""

    train: Literal["lora", "all"] = "all"
    loss: Literal["distillation", "next_token"] = "distillation"
    steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 2
    micro_batch_size: Positive | None = None
    learning_rate: Rate = 1e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    lora_rank: Positive = 8


class Tracking(Part):
    """Who is told of every step besides log.jsonl, through Accelerate (docs/tracking.md).

    `project` is what runs are filed under.
    """

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    project: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "llmprune"


class Training(Part):
    """What both loops share.

    `mixed_precision: auto` takes bf16 where a matrix product in it is clearly faster on the machine
    that begins the run; what was taken stands in the run folder's recipe.yaml.
    """

    mixed_precision: Literal["no", "bf16", "auto"] = "no"
    activation_checkpointing: bool = False
    save_every: Positive = 5

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        # YAML reads a bare `no` as false
        return "no" if value is False else value
