"""The calibration loop on Accelerate.

This loop and that of recovery take the global batch of a step from the calibration set as a pure
function of the step, share its rows out over the processes, and sum the gradients over
micro-batches and processes: the result does not depend on how many processes there are, and a
resumed run sees the same rows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmprune.batches import Batches, OnStep, loss_of, rates_of, set_rate
from llmprune.errors import InputError
from llmprune.files import save_tensors
from llmprune.gate_figures import gate_figures
from llmprune.pool_logits import group_of, importances_of, starting_logits
from llmprune.scores import UnitScores
from llmprune.selection import Pool
from llmprune.sequential_attention import Schedule, SequentialAttention
from llmprune.signal import rank_correlation, shuffled_null
from llmprune.trained_weights import TrainedWeights, checkpointing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from llmprune.calibration import CalibrationSet
    from llmprune.recipe import GateTraining, Recipe


class TrainableGates(Protocol):
    """Gates of any kind: on units of a model, or on blocks of its weights."""

    group_names: tuple[str, ...]

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take new values, by group."""

    def opened(self) -> AbstractContextManager[None]:
        """All gates open inside the block."""

    def magnitudes(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The weight norm of every unit, by group."""


STATE_FORMAT = "llmprune-gate-state/1"
# The 95th percentile of a null of this size is known within two or three percent of itself.
AGREEMENT_SHUFFLES = 200
# `learning_rate: auto` (docs/decisions/0017): per nat a token that the start loses, and its limits.
RATE_PER_NAT = 0.05
AUTO_RATES = (0.02, 0.05)


def train_gates(
    model: PreTrainedModel,
    gates: TrainableGates,
    calibration_set: CalibrationSet,
    pools: list[Pool],
    *,
    recipe: Recipe,
    run: GateRun,
) -> UnitScores:
    """Let SequentialAttention++ find the survivors.

    Args:
        model: The model that the gates are attached to; its weights change only where
            `recipe.gates.train` says so.
        gates: Open gates on every group that `pools` names; left at the last step's values.
        calibration_set: The rows to train on.
        pools: Who competes with whom.
        recipe: Its `gates`, `training` and `seed` are used.
        run: Accelerator, priors, teacher and where to keep the state.

    Raises:
        InputError: A state to resume from that belongs to another run.
    """
    engines = [
        _train_engine(
            model,
            gates,
            calibration_set.reordered(index),
            pools,
            recipe=recipe,
            run=run.seed(index, recipe.gates),
        )
        for index in range(recipe.gates.seeds)
    ]
    starts = starting_logits(run.priors, pools) if run.priors else None
    agreement = _agreement(engines, starts) if len(engines) > 1 else {}
    engine = engines[0]
    with torch.no_grad():
        for index, logits in enumerate(engine.logits):
            logits.copy_(torch.stack([one.logits[index] for one in engines]).mean(0))
    if recipe.budget is not None and recipe.budget.allocation == "importance":
        values = importances_of(engine, pools, run.priors)
    else:
        values = [parameter.detach().float().cpu() for parameter in engine.logits]
    return _scores(engine, values, pools, gates, agreement)


def _train_engine(
    model: PreTrainedModel,
    gates: TrainableGates,
    calibration_set: CalibrationSet,
    pools: list[Pool],
    *,
    recipe: Recipe,
    run: GateRun,
) -> SequentialAttention:
    """Train the logits of one seed, or take up its state."""
    settings = recipe.gates
    engine = SequentialAttention(
        [group_of(pool) for pool in pools],
        Schedule.of_cycles(
            settings.steps,
            dense=settings.dense,
            sparsify=settings.sparsify,
            sparse=settings.sparse,
            cycles=settings.cycles,
        ),
        variant=settings.variant,
        priors=starting_logits(run.priors, pools) if run.priors else None,
        temperature=settings.temperature,
        curve=settings.curve,
    ).to(run.accelerator.device)
    num_steps = engine.schedule.num_steps
    weights = run.weights.parameters
    optimizer = _gate_optimizer(engine, weights, settings)
    first = _resume(run, engine, weights, optimizer)
    batches = Batches(run.accelerator, calibration_set, settings, recipe.training)
    loss_of_rows = loss_of(settings.loss, model, run.teacher)
    values: dict[str, Tensor] = {}
    if settings.learning_rate == "auto" and not first and num_steps:
        whole = 0.0
        if settings.loss != "distillation":
            with gates.opened():
                whole = batches.mean_loss(0, loss_of_rows)
        with torch.no_grad():
            gates.set(_unpooled(engine.gates(0), pools, gates))
        optimizer.param_groups[0]["lr"] = rate_for(batches.mean_loss(0, loss_of_rows) - whole)
    with checkpointing(model, recipe.training):
        for step in range(first, num_steps):
            if engine.schedule.at(step).begins_phase:
                # "crucial": what was learned under another mask misleads (arXiv 2402.17902, app. C)
                optimizer.state.clear()

            if settings.variant == "magnitude":
                # the norms move with the weights that learn along
                engine.set_scores(starting_logits(gates.magnitudes(model), pools))

            def set_gates(step: int = step) -> None:
                values.update(_unpooled(engine.gates(step), pools, gates))
                gates.set(values)

            set_rate(optimizer, "weights", settings.weights_learning_rate, step, settings.steps)
            loss = batches.train_step(step, optimizer, loss_of_rows, before_each=set_gates)
            done = step + 1
            is_whole = done == num_steps and settings.seeds > 1
            if is_whole or (done % recipe.training.save_every == 0 and done < num_steps):
                run.save(engine, weights, optimizer, done)
            figures = {"loss": loss, **engine.settings_at(step), **rates_of(optimizer)}
            run.on_step(done, num_steps, {**figures, **gate_figures(values)})
    return engine


def rate_for(lost: float) -> float:
    """The logits' learning rate under `learning_rate: auto`.

    Args:
        lost: What the gates that the prior gives lose at the first step, nats a token.
    """
    least, most = AUTO_RATES
    return min(most, max(least, RATE_PER_NAT * lost))


def _agreement(engines: list[SequentialAttention], starts: list[Tensor] | None) -> dict[str, float]:
    """How far two seeds agree on what training did to the logits, and what chance reaches.

    Warns where they agree no more than chance does.
    """

    def moves(engine: SequentialAttention) -> list[Tensor]:
        logits = [parameter.detach().cpu() for parameter in engine.logits]
        return logits if starts is None else [a - b for a, b in zip(logits, starts, strict=True)]

    first, second = moves(engines[0]), moves(engines[1])
    correlation = rank_correlation(first, second)
    chance = shuffled_null(first, second, num_shuffles=AGREEMENT_SHUFFLES)
    if correlation <= chance:
        warnings.warn(
            f"gates: two seeds agree no more than chance does (rank correlation {correlation:.3f}, "
            f"chance {chance:.3f}); take more steps, a larger batch_size or another loss",
            stacklevel=2,
        )
    return {"rank_correlation": correlation, "chance": chance}


class GateRun:
    """What one run of `train_gates` has around it.

    Attributes:
        accelerator: Of this run.
        weights: The weights that learn along.
        teacher: Rows (batch, length) -> the dense model's logits (batch, length, vocab_size).
        priors: Group name -> importance that the logits start from (their logarithm), or None.
        state_file: Where the state is kept every `training.save_every` steps, or None for nowhere.
        identity: What must be equal for a state to be taken up again.
        on_step: Called after every step; steps are counted over all seeds.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        weights: TrainedWeights,
        teacher: Callable[[Tensor], Tensor],
        *,
        priors: dict[str, Tensor] | None = None,
        state_file: Path | None = None,
        identity: str = "",
        on_step: OnStep = lambda step, steps, figures: None,
    ) -> None:
        self.accelerator = accelerator
        self.weights = weights
        self.teacher = teacher
        self.priors = priors
        self.state_file = state_file
        self.identity = identity
        self.on_step = on_step

    def seed(self, index: int, settings: GateTraining) -> GateRun:
        """The run of one seed of several: each keeps a state, and steps are counted on."""
        one = copy.copy(self)
        if self.state_file is not None:
            one.state_file = state_of_seed(self.state_file, index)
        before, total = index * settings.steps, settings.seeds * settings.steps
        one.on_step = lambda step, steps, figures: self.on_step(before + step, total, figures)
        return one

    def save(
        self,
        engine: SequentialAttention,
        weights: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        step: int,
    ) -> None:
        """Write the state after `step` steps, on the main process."""
        if self.state_file is None or not self.accelerator.is_main_process:
            return
        tensors = {f"engine.{name}": value for name, value in engine.state().items()}
        for name, parameter in weights.items():
            tensors[f"weights.{name}"] = parameter.detach().cpu().contiguous()
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value).detach().cpu()
        rate = optimizer.param_groups[0]["lr"]
        note = {"format": STATE_FORMAT, "step": str(step), "identity": self.identity}
        note["logits_learning_rate"] = repr(rate)
        save_tensors(tensors, self.state_file, note)


def _gate_optimizer(
    engine: SequentialAttention, weights: dict[str, nn.Parameter], settings: GateTraining
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {
            "params": list(engine.logits),
            # "auto" is known when the first batch has been looked at
            "lr": AUTO_RATES[0] if settings.learning_rate == "auto" else settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "name": "logits",
        }
    ]
    if weights:
        groups.append(
            {
                "params": list(weights.values()),
                "lr": settings.weights_learning_rate,
                "weight_decay": settings.weight_decay,
                "name": "weights",
            }
        )
    return torch.optim.AdamW(groups)


def _resume(
    run: GateRun,
    engine: SequentialAttention,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take up the kept state where there is one; the number of steps that are done."""
    if run.state_file is None or not run.state_file.exists():
        return 0
    note = read_note(run.state_file)
    with safe_open(run.state_file, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if note.get("format") != STATE_FORMAT or note.get("identity") != run.identity:
        raise InputError(
            f"{run.state_file.name}: must come from this recipe, model and calibration set; "
            "delete it, or resume with the recipe that began the run"
        )
    engine.load_state(_under("engine.", tensors))
    with torch.no_grad():
        for name, value in _under("weights.", tensors).items():
            weights[name].copy_(value)
    state = optimizer.state_dict()
    for name, value in _under("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
    # states of before `auto` have none, and a number in their recipe
    known = note.get("logits_learning_rate", optimizer.param_groups[0]["lr"])
    optimizer.param_groups[0]["lr"] = float(known)
    return int(note["step"])


def state_of_seed(first: Path, index: int) -> Path:
    """The state file of one seed, from that of the first."""
    return first.with_stem(f"{first.stem}-{index}") if index else first


def read_note(state_file: Path) -> dict[str, str]:
    """What a kept state says of itself, such as its `step`.

    Raises:
        InputError: The file is damaged.
    """
    try:
        with safe_open(state_file, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{state_file.name}: is damaged ({error}); delete it") from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _unpooled(values: list[Tensor], pools: list[Pool], gates: TrainableGates) -> dict[str, Tensor]:
    """Values per pool -> values per unit group."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for value, pool in zip(values, pools, strict=True):
        offset = 0
        for name, start, stop in pool.members:
            part = value[offset : offset + stop - start]
            parts.setdefault(name, []).append((start, part))
            offset += stop - start
    return {
        name: torch.cat([part for _, part in sorted(own, key=lambda pair: pair[0])])
        for name, own in parts.items()
        if name in gates.group_names
    }


def _scores(
    engine: SequentialAttention,
    values: list[Tensor],
    pools: list[Pool],
    gates: TrainableGates,
    agreement: dict[str, float],
) -> UnitScores:
    scale: dict[str, Tensor] = {}
    dropped: dict[str, Tensor] = {}
    if engine.variant != "capped":
        scale = _unpooled(engine.scales(), pools, gates)
        dropped = _unpooled(engine.dropped_at, pools, gates)
    scores = _unpooled(values, pools, gates)
    return UnitScores(scores=scores, dropped_at=dropped, scale=scale, agreement=agreement)


def teacher_of(
    model: PreTrainedModel, gates: TrainableGates, weights: TrainedWeights
) -> Callable[[Tensor], Tensor]:
    """The dense model as a teacher: this model with gates open and adapters left out."""

    def teach(rows: Tensor) -> Tensor:
        open_gates: AbstractContextManager[None] = gates.opened()
        with open_gates, weights.left_out():
            return model(input_ids=rows, use_cache=False).logits

    return teach
