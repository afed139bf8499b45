"""The calibration and recovery loops on Accelerate; the only file that imports it.

Both loops take the global batch of a step from the calibration set as a pure function of the step,
share its rows out over the processes, and sum the gradients over micro-batches and processes: the
result does not depend on how many processes there are, and a resumed run sees the same rows.
"""

from __future__ import annotations

import atexit
import copy
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmprune.baselines import magnitude_scores
from llmprune.errors import InputError
from llmprune.files import save_tensors
from llmprune.gates import Gates
from llmprune.pool_logits import group_of, importances_of, starting_logits
from llmprune.scores import UnitScores
from llmprune.selection import Pool
from llmprune.sequential_attention import Schedule, SequentialAttention
from llmprune.signal import rank_correlation, shuffled_null
from llmprune.trained_weights import TrainedWeights, checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.calibration import CalibrationSet
    from llmprune.recipe import GateTraining, Recipe, Recovery, Training, UnitKind

Loss = Literal["distillation", "next_token"]
# step, of how many, the step's loss
OnStep = Callable[[int, int, float], None]

STATE_FORMAT = "llmprune-gate-state/1"
# Share of the steps over which the weights' learning rate rises, and where its cosine ends.
WARM_UP = 0.1
FINAL_RATE = 0.1
# The 95th percentile of a null of this size is known within two or three percent of itself.
AGREEMENT_SHUFFLES = 200


def start_accelerator(training: Training, seed: int) -> Accelerator:
    """The Accelerator of a run; seeds every generator. Several processes part when they end.

    Args:
        training: Its `mixed_precision` is no longer `auto`.
        seed: Of every generator.
    """
    set_seed(seed)
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    if accelerator.num_processes > 1:
        # threads of a process group that is still there can abort a process that is done
        atexit.register(accelerator.end_training)
    return accelerator


def train_gates(
    model: PreTrainedModel,
    gates: Gates,
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
            run=run.seed(index),
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
    gates: Gates,
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
    loss_of = _loss_of(settings.loss, model, run.teacher)
    with checkpointing(model, recipe.training):
        for step in range(first, num_steps):
            if engine.schedule.at(step).begins_phase:
                # "crucial": what was learned under another mask misleads (arXiv 2402.17902, app. C)
                optimizer.state.clear()

            if settings.variant == "magnitude":
                # the norms move with the weights that learn along
                norms = magnitude_scores(model, gates.unit_map, _kinds_of(gates))
                engine.set_scores(starting_logits(norms, pools))

            def set_gates(step: int = step) -> None:
                gates.set(_unpooled(engine.gates(step), pools, gates))

            _set_rate(optimizer, "weights", settings.weights_learning_rate, step, settings.steps)
            loss = batches.train_step(step, optimizer, loss_of, before_each=set_gates)
            done = step + 1
            is_whole = done == num_steps and settings.seeds > 1
            if is_whole or (done % recipe.training.save_every == 0 and done < num_steps):
                run.save(engine, weights, optimizer, done)
            run.on_step(done, num_steps, loss)
    return engine


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


def _kinds_of(gates: Gates) -> set[UnitKind]:
    return {gates.unit_map.groups[name].kind for name in gates.group_names}


def recover(
    model: PreTrainedModel,
    calibration_set: CalibrationSet,
    *,
    recipe: Recipe,
    accelerator: Accelerator,
    teacher: PreTrainedModel | None,
    on_step: OnStep,
    first_row: int = 0,
) -> None:
    """Train the pruned model's weights for a while, in place; adapters are merged at the end.

    Args:
        model: The cut model.
        calibration_set: The rows to train on.
        recipe: Its `recovery`, `training` and `seed` are used.
        accelerator: Of this run.
        teacher: The dense model; needed where `recipe.recovery.loss` is distillation.
        on_step: Called after every step.
        first_row: Where in the calibration set to begin: a reconstruction fits the rows that it
            saw so closely that they have little left to teach.
    """
    settings = recipe.recovery
    weights = TrainedWeights(model, settings.train, settings.lora_rank, recipe.seed)
    groups = [{"params": list(weights.parameters.values()), "name": "weights"}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = Batches(accelerator, calibration_set, settings, recipe.training)
    offset = first_row // settings.batch_size

    def teach(rows: Tensor) -> Tensor:
        assert teacher is not None
        return teacher(input_ids=rows, use_cache=False).logits

    loss_of = _loss_of(settings.loss, model, teach)
    with checkpointing(model, recipe.training):
        for step in range(settings.steps):
            _set_rate(optimizer, "weights", settings.learning_rate, step, settings.steps)
            loss = batches.train_step(step + offset, optimizer, loss_of)
            on_step(step + 1, settings.steps, loss)
    weights.finish()


class GateRun:
    """What one run of `train_gates` has around it.

    Attributes:
        accelerator: Of this run.
        weights: The weights that learn along.
        teacher: Rows (batch, length) -> the dense model's logits (batch, length, vocab_size).
        priors: Group name -> importance that the logits start from (their logarithm), or None.
        state_file: Where the state is kept every `training.save_every` steps, or None for nowhere.
        identity: What must be equal for a state to be taken up again.
        on_step: Called after every step.
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
        on_step: OnStep = lambda step, steps, loss: None,
    ) -> None:
        self.accelerator = accelerator
        self.weights = weights
        self.teacher = teacher
        self.priors = priors
        self.state_file = state_file
        self.identity = identity
        self.on_step = on_step

    def seed(self, index: int) -> GateRun:
        """The run of one seed of several; each keeps a state of its own."""
        one = copy.copy(self)
        if index and self.state_file is not None:
            one.state_file = self.state_file.with_stem(f"{self.state_file.stem}-{index}")
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
        note = {"format": STATE_FORMAT, "step": str(step), "identity": self.identity}
        save_tensors(tensors, self.state_file, note)


class Batches:
    """The rows of every step, shared out over processes and micro-batches."""

    def __init__(
        self,
        accelerator: Accelerator,
        calibration_set: CalibrationSet,
        settings: GateTraining | Recovery,
        training: Training,
    ) -> None:
        self.accelerator = accelerator
        self.calibration_set = calibration_set
        self.batch_size = settings.batch_size
        workers = accelerator.num_processes
        if self.batch_size % workers:
            raise InputError(
                f"batch_size must be a multiple of the number of processes, "
                f"got {self.batch_size} for {workers} processes"
            )
        self.local_size = self.batch_size // workers
        self.micro_size = min(settings.micro_batch_size or self.local_size, self.local_size)

    def train_step(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[Tensor], Tensor],
        *,
        before_each: Callable[[], None] = lambda: None,
    ) -> float:
        """One optimizer step on the global batch of `step`; returns its mean loss."""
        optimizer.zero_grad(set_to_none=True)
        rows = self.calibration_set.batch(step, self.batch_size)
        first = self.accelerator.process_index * self.local_size
        mine = rows[first : first + self.local_size].to(self.accelerator.device)
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for micro in mine.split(self.micro_size):
            before_each()
            with self.accelerator.autocast():
                loss = loss_of(micro) * (len(micro) / self.batch_size)
            self.accelerator.backward(loss)
            total += loss.detach().double()
        self._sum_over_processes(optimizer)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total.float(), "sum")
        optimizer.step()
        return float(total)

    def _sum_over_processes(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.num_processes == 1:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "sum")


def _loss_of(
    kind: Loss, model: PreTrainedModel, teacher: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def next_token(rows: Tensor) -> Tensor:
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), rows[:, 1:].reshape(-1).to(logits.device)
        )

    def distillation(rows: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.log_softmax(teacher(rows).float(), -1)
        got = torch.log_softmax(model(input_ids=rows, use_cache=False).logits.float(), -1)
        return (target.exp() * (target - got)).sum(-1).mean()

    return distillation if kind == "distillation" else next_token


def _gate_optimizer(
    engine: SequentialAttention, weights: dict[str, nn.Parameter], settings: GateTraining
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {
            "params": list(engine.logits),
            "lr": settings.learning_rate,
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


def _set_rate(
    optimizer: torch.optim.Optimizer, name: str, peak: float, step: int, num_steps: int
) -> None:
    """Linear warm-up, then a cosine down to a tenth, for the parameter group of that name."""
    warm = max(1.0, WARM_UP * num_steps)
    progress = min(1.0, max(0.0, (step + 1 - warm) / max(1.0, num_steps - warm)))
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        if group["name"] == name:
            group["lr"] = peak * min(1.0, (step + 1) / warm) * cosine


def _resume(
    run: GateRun,
    engine: SequentialAttention,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take up the kept state where there is one; the number of steps that are done."""
    if run.state_file is None or not run.state_file.exists():
        return 0
    try:
        with safe_open(run.state_file, "pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{run.state_file.name}: is damaged ({error}); delete it") from error
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
    return int(note["step"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _unpooled(values: list[Tensor], pools: list[Pool], gates: Gates) -> dict[str, Tensor]:
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
    gates: Gates,
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
    model: PreTrainedModel, gates: Gates, weights: TrainedWeights
) -> Callable[[Tensor], Tensor]:
    """The dense model as a teacher: this model with gates open and adapters left out."""

    def teach(rows: Tensor) -> Tensor:
        open_gates: AbstractContextManager[None] = gates.opened()
        with open_gates, weights.left_out():
            return model(input_ids=rows, use_cache=False).logits

    return teach
