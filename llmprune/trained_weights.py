"""TrainedWeights: the weights that learn in a loop, and activation checkpointing around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.recipe import Training


class TrainedWeights:
    """The weights that learn in a loop: none, LoRA adapters, or all.

    Build it before gates are attached: LoRA puts its own modules in place of the projections.

    Attributes:
        parameters: What the optimizer gets, by name.
    """

    def __init__(self, model: PreTrainedModel, train: str, rank: int, seed: int) -> None:
        self.model = model
        self._adapted: Any = None
        self._was_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        model.requires_grad_(False)
        if train == "lora":
            # the adapters' start must not depend on what was drawn before
            torch.manual_seed(seed)
            self._adapted = _with_lora(model, rank)
        elif train == "all":
            model.requires_grad_(True)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The model without its adapters inside the block."""
        with self._adapted.disable_adapter() if self._adapted is not None else nullcontext():
            yield

    def finish(self) -> None:
        """Merge adapters into the weights and restore `requires_grad`, in place."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._was_trainable.get(name, True))


def _with_lora(model: PreTrainedModel, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from llmprune.architectures import architecture_of

    architecture = architecture_of(model.config.model_type)
    targets = [
        name
        for name, module in model.get_submodule(architecture.layers).named_modules(
            prefix=architecture.layers
        )
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    is_conv = isinstance(model.get_submodule(targets[0]), Conv1D)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=is_conv,
    )
    return get_peft_model(model, config)


@contextmanager
def checkpointing(model: PreTrainedModel, training: Training) -> Iterator[None]:
    """Activation checkpointing inside the block, without waking dropout."""
    if not training.activation_checkpointing:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        # the flag of the layer alone: its dropout modules stay in eval mode
        layer.training = True
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        for layer in layers:
            layer.training = False
