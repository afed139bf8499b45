"""recover(model): the training after the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.batches import Batches, OnStep, loss_of, rates_of, set_rate
from llmprune.trained_weights import TrainedWeights, checkpointing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from llmprune.calibration import CalibrationSet
    from llmprune.recipe import Recipe


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

    loss = loss_of(settings.loss, model, teach)
    with checkpointing(model, recipe.training):
        for step in range(settings.steps):
            set_rate(optimizer, "weights", settings.learning_rate, step, settings.steps)
            found = batches.train_step(step + offset, optimizer, loss)
            on_step(step + 1, settings.steps, {"loss": found, **rates_of(optimizer)})
    weights.finish()
