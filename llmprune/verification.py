"""Verify, always: the written folder computes what the gated model computed.

The chain has two links. At the cut, the cut model's logits are compared with the gated model's, in
float32 and in memory. After writing, a fresh process with stock transformers loads the folder and
its logits are compared with the recorded ones: the gated model's own where nothing was trained or
rounded after the cut, the final model's otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llmprune import stock_logits
from llmprune.checkpoint import cast_parameters, model_folder
from llmprune.errors import InputError
from llmprune.files import save_tensors, save_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE_FILE = "verification.safetensors"
RESULT_FILE = "verification.json"
# float32 rounding through two paths of a small model stays well under this
TOLERANCE = 1e-4


class Verification(BaseModel):
    """What was compared and how far apart it was; differences are of logits, absolute, float32.

    `reference` says whose logits the fresh process is held to: `gated` or `final`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    cut_from_gated: float | None = None
    model_class: str
    remote_code: bool
    missing_keys: list[str]
    unexpected_keys: list[str]
    llmprune_imported: bool
    max_abs_difference: dict[str, float]
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether every figure is within the tolerance and no weight was made up or left over."""
        figures = [*self.max_abs_difference.values(), self.cut_from_gated or 0.0]
        clean = not (self.missing_keys or self.unexpected_keys or self.llmprune_imported)
        return clean and all(figure <= self.tolerance for figure in figures)


def reference_tokens(vocab_size: int, *, batch: int = 2, length: int = 24) -> Tensor:
    """Fixed tokens for every comparison, shape (batch, length), int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def reference_logits(model: PreTrainedModel) -> Tensor:
    """The model's logits on the reference tokens, computed and given in float32 on the CPU."""
    tokens = reference_tokens(model.config.vocab_size).to(model.device)
    was = model.dtype
    cast_parameters(model, torch.float32)
    logits = stock_logits.forward_logits(model, tokens).cpu()
    cast_parameters(model, was)
    return logits


def record_reference(
    logits: Tensor, folder: Path, *, reference: str, cut_from_gated: float | None
) -> None:
    """Write what the model in `folder` will be held to.

    Args:
        logits: Of the reference tokens, shape (batch, length, vocab_size), float32.
        folder: The run folder.
        reference: `gated` or `final`.
        cut_from_gated: Largest difference at the cut.
    """
    tokens = reference_tokens(logits.shape[-1])
    note = {"reference": reference, "cut_from_gated": json.dumps(cut_from_gated)}
    save_tensors({"tokens": tokens, "logits": logits}, folder / REFERENCE_FILE, note)


def verify(folder: Path) -> Verification:
    """Load the run folder's model in a fresh process and compare; writes verification.json.

    Raises:
        InputError: The folder has no recorded logits, the model does not load with stock
            transformers, or its logits are too far off; the message holds the figures.
    """
    from safetensors import safe_open

    reference = folder / REFERENCE_FILE
    if not reference.is_file():
        raise InputError(f"{folder}: must be a folder that prune wrote, got no {REFERENCE_FILE}")
    with safe_open(reference, "pt") as file:
        note = file.metadata()
    command = [sys.executable, "-P", stock_logits.__file__, str(model_folder(folder)), reference]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise InputError(f"{folder}: the model must load with stock transformers, got: {last[0]}")
    found = json.loads(child.stdout.strip().splitlines()[-1])
    result = Verification(
        reference=note["reference"], cut_from_gated=json.loads(note["cut_from_gated"]), **found
    )
    save_text(result.model_dump_json(indent=2) + "\n", folder / RESULT_FILE)
    if not result.passed:
        raise InputError(
            f"{folder}: the reloaded model must give the recorded logits within {TOLERANCE:g}, got "
            f"{result.model_dump_json(include={'max_abs_difference', 'cut_from_gated'})}, missing "
            f"{result.missing_keys}, unexpected {result.unexpected_keys}; do not use this folder"
        )
    return result
