"""Verify, always: the written folder computes what the gated model computed.

The chain has two links. At the cut, the cut model's logits are compared with the gated model's, in
memory. After writing, a fresh process with stock transformers loads the folder, and its logits -
whole rows, through the KV cache, with left padding - are compared with recorded ones: the gated
model's own where nothing was trained or rounded after the cut, the final model's otherwise.

Two orders of the same float32 sums differ by as much as 1e-4 in a model's logits (measured on the
dense SmolLM2-135M: 8e-5 between a forward pass and its KV cache), so models small enough are also
compared in float64 arithmetic, where rounding can neither fail an equal model nor hide an unequal
one, and that figure decides. Where only float32 was possible, the bound grows with the logits.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from llmprune import stock_logits
from llmprune.checkpoint import cast_parameters, has_blocks, load_block_sparse, model_folder
from llmprune.errors import InputError
from llmprune.files import save_tensors, save_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE_FILE = "verification.safetensors"
RESULT_FILE = "verification.json"
# The files of a model's folder that decide what it computes.
DECIDING = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "*.py",
    "llmprune/block_index.safetensors",
)
TOLERANCE = 1e-4
# Float32 sums of logits near 33 differ by 8e-5: a few parts in a million of the largest.
FLOAT32_TOLERANCE = 1e-5
# Above this many parameters a float64 copy would not fit where the model does.
FLOAT64_PARAMETERS = 2_000_000_000

# Arithmetic -> logits of the reference tokens, shape (batch, length, vocab_size).
Logits = dict[str, Tensor]


class Verification(BaseModel):
    """What was compared and how far apart it was: largest absolute differences of logits.

    `reference` says whose logits the fresh process is held to: `gated` or `final`. The keys of the
    differences are the arithmetic (the weights are always those saved). `block_sparse` is how far
    the same weights are off in block-sparse layers, where weight blocks were pruned. `dense_model`
    is where the model before pruning came from, with its commit or hash where it has one. `sha256`
    has what was verified: hex digests of the weights, the config, the modeling file and the block
    index, by name in the model's folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    dense_model: str = ""
    sha256: dict[str, str] = {}
    cut_from_gated: dict[str, float]
    model_class: str
    remote_code: bool
    missing_keys: list[str]
    unexpected_keys: list[str]
    llmprune_imported: bool
    largest_logit: float
    max_abs_difference: dict[str, dict[str, float]]
    block_sparse: dict[str, float] | None = None

    @property
    def arithmetic(self) -> str:
        """The most exact arithmetic that was used; its figures decide."""
        return "float64" if "float64" in self.max_abs_difference else "float32"

    @property
    def tolerance(self) -> float:
        """The bound that the deciding figures are held to."""
        if self.arithmetic == "float64":
            return TOLERANCE
        return max(TOLERANCE, FLOAT32_TOLERANCE * self.largest_logit)

    @property
    def passed(self) -> bool:
        """Whether every figure is within the tolerance and no weight was made up or left over."""
        figures = [
            *self.max_abs_difference[self.arithmetic].values(),
            self.cut_from_gated[self.arithmetic],
            0.0 if self.block_sparse is None else self.block_sparse[self.arithmetic],
        ]
        clean = not (self.missing_keys or self.unexpected_keys or self.llmprune_imported)
        # written so that a NaN fails
        return clean and all(figure <= self.tolerance for figure in figures)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: Tensor) -> Logits:
    """The model's logits on (batch, length) tokens, on the CPU, in each arithmetic it allows."""
    was, logits = model.dtype, {}
    count = sum(parameter.numel() for parameter in model.parameters())
    for name in ("float32", "float64")[: 2 if count < FLOAT64_PARAMETERS else 1]:
        cast_parameters(model, getattr(torch, name))
        logits[name] = stock_logits.forward_logits(model, tokens.to(model.device)).cpu()
    cast_parameters(model, was)
    return logits


def largest_difference(found: Logits, expected: Logits) -> dict[str, float]:
    """Largest absolute difference in each arithmetic."""
    return {name: float((found[name] - logits).abs().max()) for name, logits in expected.items()}


def record_reference(
    logits: Logits,
    tokens: Tensor,
    folder: Path,
    *,
    reference: str,
    dense_model: str,
    cut_from_gated: dict[str, float],
) -> None:
    """Write what the model in `folder` will be held to.

    Args:
        logits: Of the tokens.
        tokens: Shape (batch, length), int64.
        folder: The run folder.
        reference: `gated` or `final`.
        dense_model: Where the dense model came from.
        cut_from_gated: Differences at the cut.
    """
    note = {
        "reference": reference,
        "dense_model": dense_model,
        "cut_from_gated": json.dumps(cut_from_gated),
    }
    save_tensors({"tokens": tokens.clone(), **logits}, folder / REFERENCE_FILE, note)


def verify(folder: Path) -> Verification:
    """Load the run folder's model in a fresh process and compare; writes verification.json.

    Raises:
        InputError: The folder has no recorded logits, the model does not load with stock
            transformers, or its logits are too far off; the message holds the figures.
    """
    reference = folder / REFERENCE_FILE
    note = _read_note(reference)
    # before the model is loaded: what is changed while it loads must not pass for verified
    sha256 = model_sha256(Path(model_folder(folder)))
    command = [
        sys.executable,
        "-P",
        stock_logits.__file__,
        str(model_folder(folder)),
        str(reference),
    ]
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise InputError(f"{folder}: the model must load with stock transformers, got: {last[0]}")
    found = json.loads(child.stdout.strip().splitlines()[-1])
    result = Verification(
        reference=note["reference"],
        dense_model=note.get("dense_model", ""),
        sha256=sha256,
        cut_from_gated=json.loads(note["cut_from_gated"]),
        block_sparse=_block_sparse_difference(folder),
        **found,
    )
    save_text(result.model_dump_json(indent=2) + "\n", folder / RESULT_FILE)
    if not result.passed:
        figures = result.model_dump(
            include={
                "max_abs_difference",
                "cut_from_gated",
                "block_sparse",
                "missing_keys",
                "unexpected_keys",
            }
        )
        raise InputError(
            f"{folder}: the reloaded model must give the recorded logits within "
            f"{result.tolerance:g}, got {json.dumps(figures)}; do not use this folder, prune again"
        )
    return result


def read_verification(folder: Path) -> Verification:
    """What the last verification of a run folder found.

    Raises:
        InputError: There was none, or the file is damaged.
    """
    file = folder / RESULT_FILE
    try:
        return Verification.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: must be verified, got no {RESULT_FILE}; run `llmprune verify {folder}`"
        ) from error
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{file}: is damaged or of another version; run `llmprune verify {folder}`"
        ) from error


def model_sha256(folder: Path) -> dict[str, str]:
    """Hex digests of the files in a model's folder that decide what it computes, by name."""
    files = [file for pattern in DECIDING for file in folder.glob(pattern)]
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _block_sparse_difference(folder: Path) -> dict[str, float] | None:
    """How far the block-sparse layers are from the recorded logits; None without weight blocks."""
    if not has_blocks(folder):
        return None
    recorded = load_file(folder / REFERENCE_FILE)
    logits = {name: value for name, value in recorded.items() if name != "tokens"}
    return largest_difference(
        reference_logits(load_block_sparse(folder), recorded["tokens"]), logits
    )


def _read_note(reference: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not reference.is_file():
        raise InputError(
            f"{reference.parent}: must be a folder that prune wrote, got no {REFERENCE_FILE}"
        )
    try:
        with safe_open(reference, "pt") as file:
            return dict(file.metadata())
    except SafetensorError as error:
        raise InputError(f"{reference.name}: is damaged ({error}); prune again") from error
