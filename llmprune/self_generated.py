"""Calibration rows that the dense model writes itself.

Sampled at temperature 1 from the full vocabulary, they are text as the model has it: what it should
still be able to say after pruning, with nothing to download and no corpus to leak. (Data-free
distillation on a language model's own samples: LLM-QAT, arXiv 2305.17888.) A model with a chat
template also writes conversations: it is given the template as far as what a user says begins, and
goes on for both sides (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmprune.calibration import CalibrationSet
from llmprune.errors import InputError
from llmprune.files import save_tensors
from llmprune.texts import SELF_GENERATED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CORPUS = "self-generated"
# Rows sampled at once: decoding costs little more for many rows than for one.
ROWS_AT_ONCE = 128

# stands where a user's words would, and in no template
_WORDS = "(words of a user)"

# tokens done, of how many
OnToken = Callable[[int, int], None]


@torch.no_grad()
def sample_rows(
    model: PreTrainedModel,
    *,
    num_rows: int,
    row_length: int,
    seed: int,
    starts: Sequence[Sequence[int]] | None = None,
    on_token: OnToken = lambda done, total: None,
) -> Tensor:
    """Rows of text that the model writes.

    A row goes on behind an end-of-text token with whatever the model puts there.

    Args:
        model: The dense model, ungated.
        num_rows: Rows.
        row_length: Tokens in a row, those that it begins with included.
        seed: Of the sampling; equal arguments on one machine give equal rows.
        starts: Tokens that rows begin with, taken in turn; by default the begin-of-text token.
        on_token: Called with decode steps done and decode steps in all.

    Returns:
        (num_rows, row_length), int64, on the CPU.

    Raises:
        InputError: The model has neither a begin-of-text nor an end-of-text token, or rows are
            full with what they begin with.
    """
    starts = starts or [[_first_token(model)]]
    longest = max(len(start) for start in starts)
    if longest >= row_length:
        raise InputError(
            f"calibration.row_length must be above the {longest} tokens that a row which the model "
            f"writes begins with, got {row_length}"
        )
    batches: list[Tensor] = []
    for index, start in enumerate(starts):
        count = len(range(index, num_rows, len(starts)))
        prompts = torch.tensor(start, device=model.device).expand(count, -1)
        batches += prompts.split(ROWS_AT_ONCE) if count else ()
    total = sum(row_length - prompt.shape[1] for prompt in batches)
    done = 0

    def count_step() -> None:
        nonlocal done
        done += 1
        on_token(done, total)

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        found = torch.cat([_continued(model, one, row_length, count_step) for one in batches])
    # they were written start by start
    order = [row for index in range(len(starts)) for row in range(index, num_rows, len(starts))]
    rows = torch.empty_like(found)
    rows[order] = found
    return rows


def _continued(
    model: PreTrainedModel, prompt: Tensor, row_length: int, on_step: Callable[[], None]
) -> Tensor:
    """Rows (batch, row_length) on the CPU that begin with a prompt (batch, length)."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Count(StoppingCriteria):
        """Tells of every decode step, and stops nothing."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            on_step()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=row_length - prompt.shape[1],
        # None would be filled in from the model; no token has this id
        eos_token_id=-1,
        pad_token_id=0,
    )
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([Count()]),
    )
    return output.cpu()


def row_starts(
    kind: Literal["text", "conversations", "both"] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """What rows of a kind (`calibration.self_generated_as`) begin with, for `sample_rows`.

    Raises:
        InputError: The model has no begin-of-text token, or the tokenizer no chat template, and
            such rows are asked for.
    """
    starts = []
    if kind in (None, "text", "both"):
        starts.append([_first_token(model)])
    if kind in ("conversations", "both"):
        starts.append(conversation_start(tokenizer))
    return starts


def conversation_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a chat template up to where the words of a first user begin.

    Raises:
        InputError: There is no chat template, or none that repeats what a user says.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "calibration.self_generated_as: conversations need a tokenizer with a chat template, "
            "this one has none; take text"
        )
    message = [{"role": "user", "content": _WORDS}]
    before, found, _ = str(tokenizer.apply_chat_template(message, tokenize=False)).partition(_WORDS)
    tokens = list(tokenizer(before, add_special_tokens=False).input_ids)
    if not found or not tokens:
        raise InputError(
            "calibration.self_generated_as: conversations need a chat template with something "
            "before the words of a user; take text"
        )
    return tokens


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
