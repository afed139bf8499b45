"""Documents: which document of a text each of its tokens belongs to, for error bars over them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# How rows of text are joined: with the wikitext data set's, the string that GPTQ and Wanda score.
SEPARATOR = "\n\n"
# wikitext's heading of an article; those of sections have more signs.
_HEADING = re.compile(r"^ = (?!=).+ = $", re.MULTILINE)
# Of fewer, a figure for other documents cannot be had by drawing these anew.
LEAST_DOCUMENTS = 10

Kind = Literal["articles", "rows", "text"]


@dataclass(frozen=True)
class Documents:
    """The documents that the tokens of a text belong to.

    Attributes:
        kind: What a document is: an article, a row of a table, or the one text there is.
        of_token: The number of each token's document, shape (num_tokens,), int64, ascending.
    """

    kind: Kind
    of_token: Tensor


def encode(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Tokenize rows of text joined with a blank line, without special tokens.

    Returns:
        Token ids, shape (num_tokens,), int64.
    """
    return torch.tensor(_tokenize(texts, tokenizer)["input_ids"], dtype=torch.int64)


def encode_documents(texts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Documents]:
    """The same token ids, and which document each belongs to.

    Articles begin with wikitext's ` = Title = `, as a line of the one text or as a row; else every
    row that is not blank is a document. What stands between two belongs to the first. A tokenizer
    that does not tell where its tokens begin (a slow one) makes one document of everything.
    """
    kind, starts = _beginnings(texts)
    if kind == "text" or not getattr(tokenizer, "is_fast", False):
        ids = encode(texts, tokenizer)
        return ids, Documents("text", torch.zeros_like(ids))
    found = _tokenize(texts, tokenizer, return_offsets_mapping=True)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    offsets = torch.tensor([start for start, _ in found["offset_mapping"]], dtype=torch.int64)
    # what comes before the first beginning goes with it
    of_token = torch.bucketize(offsets, torch.tensor(starts[1:]), right=True)
    return ids, Documents(kind, of_token)


def _tokenize(texts: Sequence[str], tokenizer: Any, **options: bool) -> Any:
    # verbose=False: the whole text is longer than the model takes, which windows make right.
    text = SEPARATOR.join(texts)
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _beginnings(texts: Sequence[str]) -> tuple[Kind, list[int]]:
    """What the documents are, and where each begins in the joined text."""
    rows, offset = [], 0
    for text in texts:
        rows.append((offset, text))
        offset += len(text) + len(SEPARATOR)
    if len(texts) == 1:
        articles = [match.start() for match in _HEADING.finditer(texts[0])]
    else:
        articles = [start for start, row in rows if _HEADING.fullmatch(row.rstrip("\r\n"))]
    if len(articles) > 1:
        return "articles", articles
    starts = [start for start, row in rows if row.strip()]
    return ("rows", starts) if len(starts) > 1 else ("text", starts)
