"""Calibration rows that the dense model writes itself.

Sampled at temperature 1 from the full vocabulary, they are text as the model has it: what it should
still be able to say after pruning, with nothing to download and no corpus to leak. (Data-free
distillation on a language model's own samples: LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmprune.calibration import CalibrationSet
from llmprune.errors import InputError
from llmprune.files import save_tensors
from llmprune.texts import SELF_GENERATED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CORPUS = "self-generated"
# Rows sampled at once: decoding costs little more for many rows than for one.
ROWS_AT_ONCE = 128

# tokens done, of how many
OnToken = Callable[[int, int], None]


@torch.no_grad()
def sample_rows(
    model: PreTrainedModel,
    *,
    num_rows: int,
    row_length: int,
    seed: int,
    on_token: OnToken = lambda done, total: None,
) -> Tensor:
    """Rows of text that the model writes, each begun by its begin-of-text token.

    A row goes on behind an end-of-text token with whatever the model puts there.

    Args:
        model: The dense model, ungated.
        num_rows: Rows.
        row_length: Tokens in a row, the first one included.
        seed: Of the sampling; equal arguments on one machine give equal rows.
        on_token: Called with decode steps done and decode steps in all.

    Returns:
        (num_rows, row_length), int64, on the CPU.

    Raises:
        InputError: The model has neither a begin-of-text nor an end-of-text token.
    """
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    first = _first_token(model)
    batches = torch.full((num_rows, 1), first, device=model.device).split(ROWS_AT_ONCE)
    total = len(batches) * (row_length - 1)
    done = 0

    class Count(StoppingCriteria):
        """Tells of every decode step, and stops nothing."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            nonlocal done
            done += 1
            on_token(done, total)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=row_length - 1,
        # None would be filled in from the model; no token has this id
        eos_token_id=-1,
        pad_token_id=first,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    rows = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for prompt in batches:
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([Count()]),
            )
            rows.append(output.cpu())
    return torch.cat(rows)


def self_generated_set(
    file: Path, sample: Callable[[], Tensor], *, seed: int, may_write: bool
) -> CalibrationSet:
    """The rows kept in `file`, sampled and kept there first where there are none yet.

    Args:
        file: In the run folder, so that a resumed run trains on the same rows.
        sample: Gives the rows.
        seed: Of the order of later epochs.
        may_write: Whether this process keeps the rows (the others read them afterwards).

    Raises:
        InputError: The file is damaged, or can't be written.
    """
    if may_write and not file.is_file():
        save_tensors({"rows": sample()}, file, {"of": CORPUS})
    try:
        rows = load_file(file)["rows"]
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{file.name}: is damaged ({error}); delete it, then --resume") from error
    return CalibrationSet(rows, CORPUS, CORPUS, seed)


def _first_token(model: PreTrainedModel) -> int:
    for token in (model.config.bos_token_id, model.config.eos_token_id):
        if isinstance(token, list):
            token = token[0]
        if token is not None:
            return int(token)
    raise InputError(
        f"calibration.dataset: {SELF_GENERATED} needs a model with a begin-of-text token, "
        "this one's config names none; calibrate on a text instead"
    )
