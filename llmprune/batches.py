"""What both training loops share: the rows of a step, the losses, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmprune.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from llmprune.calibration import CalibrationSet
    from llmprune.recipe import GateTraining, Recovery, Training

Loss = Literal["distillation", "next_token"]
# step, of how many, the step's figures: its loss, rates, and what a schedule had then
OnStep = Callable[[int, int, Mapping[str, float]], None]

# Share of the steps over which the weights' learning rate rises, and where its cosine ends.
WARM_UP = 0.1
FINAL_RATE = 0.1


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
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for micro in self._micro_batches(step):
            before_each()
            with self.accelerator.autocast():
                loss = loss_of(micro) * (len(micro) / self.batch_size)
            self.accelerator.backward(loss)
            total += loss.detach().double()
        self._sum_over_processes(optimizer)
        optimizer.step()
        return self._over_processes(total)

    @torch.no_grad()
    def mean_loss(self, step: int, loss_of: Callable[[Tensor], Tensor]) -> float:
        """The mean loss of the global batch of `step`; nothing is changed."""
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for micro in self._micro_batches(step):
            with self.accelerator.autocast():
                total += loss_of(micro).double() * (len(micro) / self.batch_size)
        return self._over_processes(total)

    def _micro_batches(self, step: int) -> tuple[Tensor, ...]:
        """What this process has of the global batch, a micro-batch at a time."""
        rows = self.calibration_set.batch(step, self.batch_size)
        first = self.accelerator.process_index * self.local_size
        mine = rows[first : first + self.local_size].to(self.accelerator.device)
        return mine.split(self.micro_size)

    def _over_processes(self, total: Tensor) -> float:
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total.float(), "sum")
        return float(total)

    def _sum_over_processes(self, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.num_processes == 1:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "sum")


def loss_of(
    kind: Loss, model: PreTrainedModel, teacher: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The loss of rows (batch, length): from the teacher's logits, or of the next tokens."""

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


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of every parameter group, by a name for logs."""
    return {f"{group['name']}_learning_rate": group["lr"] for group in optimizer.param_groups}


def set_rate(
    optimizer: torch.optim.Optimizer, name: str, peak: float, step: int, num_steps: int
) -> None:
    """Linear warm-up, then a cosine down to a tenth, for the parameter group of that name."""
    warm = max(1.0, WARM_UP * num_steps)
    progress = min(1.0, max(0.0, (step + 1 - warm) / max(1.0, num_steps - warm)))
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        if group["name"] == name:
            group["lr"] = peak * min(1.0, (step + 1) / warm) * cosine
