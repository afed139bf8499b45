"""CalibrationSet: text -> fixed-length token rows, seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token rows that gates and weights are trained on.

    `rows` is (num_rows, row_length), int64, on the CPU. `name` is for people; `corpus` is what the
    leak guard compares with the evaluation texts; `seed` orders the epochs after the first.
    """

    rows: Tensor
    name: str
    corpus: str
    seed: int = 0

    @staticmethod
    def from_texts(
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_rows: int,
        row_length: int,
        seed: int,
        name: str,
        corpus: str,
    ) -> CalibrationSet:
        """Cut a text into non-overlapping rows and draw `num_rows` of them, each at most once.

        The documents are joined by an empty line and tokenized as one, without special tokens; the
        tokens after the last whole row are dropped. Equal arguments give equal rows.

        Raises:
            InputError: The text is shorter than one row, or has fewer than `num_rows` rows.
        """
        tokens = _tokenize("\n\n".join(texts), tokenizer)
        if len(tokens) < row_length:
            raise InputError(
                f"{name}: a calibration text must fill a row of {row_length} tokens, got "
                f"{len(tokens)}; take a longer text or lower calibration.row_length"
            )
        available = len(tokens) // row_length
        if available < num_rows:
            raise InputError(
                f"{name}: calibration.num_rows must be at most the {available} rows of "
                f"{row_length} tokens in the text, got {num_rows}; lower calibration.num_rows or "
                "calibration.row_length"
            )
        rows = tokens[: available * row_length].view(available, row_length)
        drawn = torch.randperm(available, generator=_generator(seed, "draw"))[:num_rows]
        return CalibrationSet(rows[drawn], name, corpus, seed)

    def batch(self, step: int, batch_size: int) -> Tensor:
        """The rows of one optimizer step, a pure function of (seed, step, batch_size).

        Every epoch holds each row once: the first in the order of `rows`, each later one in an
        order of its own. A batch may span epochs.

        Args:
            step: Counts from 0.
            batch_size: Rows in the batch; may exceed the number of rows.

        Returns:
            (batch_size, row_length), int64, on the CPU.

        Raises:
            ValueError: `step` is negative or `batch_size` is not positive.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(f"step must be >= 0 and batch_size >= 1, got {step} and {batch_size}")
        num_rows = len(self.rows)
        first, end = step * batch_size, (step + 1) * batch_size
        epochs = range(first // num_rows, (end - 1) // num_rows + 1)
        order = torch.cat([self._order(epoch) for epoch in epochs])
        offset = first - epochs.start * num_rows
        return self.rows[order[offset : offset + batch_size]]

    def reordered(self, index: int) -> CalibrationSet:
        """The same rows in another order, a pure function of (seed, index); 0: as they are."""
        if index == 0:
            return self
        order = torch.randperm(len(self.rows), generator=_generator(self.seed, f"order {index}"))
        return replace(self, rows=self.rows[order])

    def mixed_with(self, other: CalibrationSet) -> CalibrationSet:
        """The rows of both in one order, a pure function of the seed; the corpus stays this one's.

        The other rows come from no corpus that could be measured on.
        """
        rows = torch.cat([self.rows, other.rows])
        order = torch.randperm(len(rows), generator=_generator(self.seed, "mix"))
        return replace(self, rows=rows[order], name=f"{self.name} and {other.name}")

    def fingerprint(self) -> str:
        """The sha256 of the rows and their shape, in hex."""
        digest = hashlib.sha256(str(tuple(self.rows.shape)).encode())
        digest.update(self.rows.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _order(self, epoch: int) -> Tensor:
        if epoch == 0:
            return torch.arange(len(self.rows))
        return torch.randperm(len(self.rows), generator=_generator(self.seed, f"epoch {epoch}"))


def _generator(seed: int, purpose: str) -> torch.Generator:
    # Hashed, so that neighbouring seeds share no stream and a seed may be of any size.
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)
