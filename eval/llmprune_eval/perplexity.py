"""Perplexity of a text in windows that don't overlap, and the losses of its documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune_eval.documents import LEAST_DOCUMENTS, Documents
from llmprune_eval.inference import check_count, check_length, device_of, eval_mode, vocab_size_of

# Positions that go through the head at once: 128 rows of 150k fp32 logits are 77 MB.
_HEAD_POSITIONS = 128
# Tokens on which the head applied to the hidden states is compared with the model's own logits.
_PROBE_TOKENS = 16

_Body = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        value: exp(`nll_mean`).
        num_tokens: Scored tokens: every token of a window but its first.
        num_windows: Windows, the shorter last one included.
        window: Tokens in a full window.
        nll_mean: Mean negative log-likelihood of a scored token, in nats.
        nll_stderr: Standard error of `nll_mean` over the windows, taken as independent; None for
            one window.
        window_nlls: `nll_mean` of each window, in the text's order.
        document_kind: What stands below: articles, rows of a table, or blocks of windows that
            stand in for documents where there are fewer than ten; empty for none of them.
        document_nlls: Each document's summed negative log-likelihood, in the text's order.
        document_tokens: Each document's scored tokens.
    """

    value: float
    num_tokens: int
    num_windows: int
    window: int
    nll_mean: float
    nll_stderr: float | None
    window_nlls: tuple[float, ...]
    document_kind: Literal["", "articles", "rows", "blocks"] = ""
    document_nlls: tuple[float, ...] = ()
    document_tokens: tuple[int, ...] = ()

    def window_weights(self) -> tuple[float, ...]:
        """Each window's share of the scored tokens; only the last can differ."""
        full = (self.num_windows - 1) * (self.window - 1)
        counts = [self.window - 1] * (self.num_windows - 1) + [self.num_tokens - full]
        return tuple(count / self.num_tokens for count in counts)

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain dict."""
        return asdict(self)


def measure_perplexity(
    model: Any,
    token_ids: Tensor,
    *,
    window: int,
    max_windows: int | None,
    batch_size: int = 1,
    documents: Documents | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score `token_ids` in windows that don't overlap: exp(sum of NLL / scored tokens).

    The model runs in eval mode on its own device and gets its modes back.

    Args:
        model: A Hugging Face causal LM.
        token_ids: Shape (num_tokens,), int64, no special tokens added.
        window: Tokens in a window, at least 2; its first token is not scored.
        max_windows: Windows from the start of the text; None for all. A shorter last window of at
            least 2 tokens counts as one.
        batch_size: Windows in one forward pass.
        documents: The tokens' documents, whose losses are then kept as well.
        on_window: Called after each forward pass with windows done and windows in all.

    Raises:
        InputError: The text has fewer than 2 tokens or ids that the model has no embedding for, a
            count is too small, a window exceeds the model's positions, or the model's NLL is not
            finite.
    """
    check_count("window", window, 2)
    check_count("batch_size", batch_size, 1)
    rows = _split_windows(token_ids, window, max_windows)
    check_length(model, len(rows[0]), what="perplexity window")
    _check_vocabulary(token_ids, vocab_size_of(model))
    losses: list[Tensor] = []
    with eval_mode(model):
        body, head = _split_head(model, rows[0][None, :_PROBE_TOKENS].to(device_of(model)))
        for batch in _batches(rows, batch_size):
            losses += _score(body, head, batch.to(device_of(model)))
            if on_window is not None:
                on_window(len(losses), len(rows))
    found = _summarise([float(loss.mean()) for loss in losses], [len(x) for x in losses], window)
    return found if documents is None else _with_documents(found, losses, documents)


def _split_windows(token_ids: Tensor, window: int, max_windows: int | None) -> list[Tensor]:
    if max_windows is not None:
        check_count("max_windows", max_windows, 1)
    rows = [row for row in token_ids.split(window) if len(row) >= 2][:max_windows]
    if not rows:
        raise InputError(
            f"perplexity needs a text of at least 2 tokens, got {token_ids.numel()}; take more text"
        )
    return rows


def _check_vocabulary(token_ids: Tensor, vocab_size: int) -> None:
    largest = int(token_ids.max())
    if largest >= vocab_size:
        raise InputError(
            f"token ids must be below the model's vocabulary of {vocab_size}, got {largest}; "
            "encode the text with the model's own tokenizer"
        )


def _batches(rows: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    for _, same in groupby(rows, key=len):
        equal = list(same)
        for start in range(0, len(equal), batch_size):
            yield torch.stack(equal[start : start + batch_size])


def _split_head(model: Any, probe: Tensor) -> tuple[_Body, nn.Module]:
    """Split `model` into token ids -> hidden states and hidden states -> logits.

    Some families (Gemma 2, Granite, Cohere, Falcon-H1) cap or scale logits after the head, each
    under a config key of its own. So the split is kept only where it gives the model's logits on
    `probe`, shape (1, num_tokens); else the body gives whole logits and the head changes nothing.
    """
    head = model.get_output_embeddings()
    output = model.base_model(input_ids=probe, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    logits = _full_logits(model, probe)
    if head is not None and hidden is not None:
        split = head(hidden)
        if split.shape == logits.shape and torch.allclose(split, logits, rtol=1e-4, atol=1e-5):
            return lambda ids: model.base_model(input_ids=ids, use_cache=False)[0], head
    return lambda ids: _full_logits(model, ids), nn.Identity()


def _full_logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _score(body: _Body, head: nn.Module, ids: Tensor) -> list[Tensor]:
    """NLL of every token but the first of each row of `ids`, float64 on the CPU, row by row."""
    batch, length = ids.shape
    hidden = body(ids)
    step = max(1, _HEAD_POSITIONS // batch)
    parts = []
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        logits = head(hidden[:, start:stop]).float()
        targets = ids[:, start + 1 : stop + 1].to(logits.device)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        parts.append(nll.view(batch, -1).double().cpu())
    return list(torch.cat(parts, dim=1))


def _summarise(nlls: list[float], counts: list[int], window: int) -> Perplexity:
    bad = [index for index, nll in enumerate(nlls) if not math.isfinite(nll)]
    if bad:
        raise InputError(
            f"the model's NLL must be finite, got {nlls[bad[0]]} in window {bad[0]}; "
            "evaluate in float32 or bfloat16, or prune less"
        )
    weights = [count / sum(counts) for count in counts]
    mean = math.fsum(w * nll for w, nll in zip(weights, nlls, strict=True))
    return Perplexity(
        value=math.exp(mean),
        num_tokens=sum(counts),
        num_windows=len(nlls),
        window=window,
        nll_mean=mean,
        nll_stderr=window_stderr(nlls, weights, mean),
        window_nlls=tuple(nlls),
    )


def _with_documents(found: Perplexity, losses: list[Tensor], documents: Documents) -> Perplexity:
    """The same with the losses of documents, or of blocks of windows where they are too few."""
    of_token = torch.cat(
        [
            documents.of_token[index * found.window + 1 :][: len(loss)]
            for index, loss in enumerate(losses)
        ]
    )
    kind: Literal["articles", "rows", "blocks"] = "blocks"
    if documents.kind != "text" and len(of_token.unique()) >= LEAST_DOCUMENTS:
        kind = documents.kind
    elif found.num_windows >= LEAST_DOCUMENTS:
        # The usual length, n^(1/3), unless that leaves too few.
        length = min(round(found.num_windows ** (1 / 3)), found.num_windows // LEAST_DOCUMENTS)
        of_window = [torch.full((len(x),), i // length) for i, x in enumerate(losses)]
        of_token = torch.cat(of_window)
    else:
        return found
    _, of_token, counts = of_token.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, of_token, torch.cat(losses))
    return replace(
        found,
        document_kind=kind,
        document_nlls=tuple(sums.tolist()),
        document_tokens=tuple(counts.tolist()),
    )


def window_stderr(values: Sequence[float], weights: Sequence[float], mean: float) -> float | None:
    """Standard error of a weighted mean; s / sqrt(n) for equal weights."""
    count = len(values)
    if count < 2:
        return None
    spread = math.fsum((w * (x - mean)) ** 2 for w, x in zip(weights, values, strict=True))
    return math.sqrt(spread * count / (count - 1))
