"""Latency of prefill and decode, models timed in turn; ratios paired round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.recipe import Budget
from llmprune_eval.inference import check_count, check_length, device_of, eval_mode, vocab_size_of
from llmprune_eval.intervals import Ratio, median_ratio

_MIN_WARMUP_ROUNDS = 2
_MAX_WARMUP_ROUNDS = 5
# Warm when two passes in a row differ by no more than this share of the slower one.
_STEADY = 0.1
# Rounds for a latency budget, and decode steps in each where decoding is what it names.
PHASE_ROUNDS = 15
_PHASE_STEPS = 8


@dataclass(frozen=True)
class Latency:
    """Milliseconds over the rounds: the median and the fastest and slowest round."""

    median_ms: float
    min_ms: float
    max_ms: float


@dataclass(frozen=True)
class ModelSpeed:
    """One model's latency.

    Attributes:
        prefill: One forward pass over (batch_size, context) tokens: the time to the first token.
        decode: One greedy step with the KV cache, for the whole batch.
        decode_tokens_per_s: Tokens of all rows a second, at the median step.
        warmup_rounds: Untimed passes before the rounds.
    """

    prefill: Latency
    decode: Latency
    decode_tokens_per_s: float
    warmup_rounds: int


@dataclass(frozen=True)
class SpeedRatio:
    """One model's time over the first model's, paired by round; below 1.0 is faster."""

    prefill: Ratio
    decode: Ratio


@dataclass(frozen=True)
class SpeedReport:
    """Latency of some models timed in the same rounds.

    `ratios` has every model but the first, which is what the others are compared with.
    """

    batch_size: int
    context: int
    new_tokens: int
    rounds: int
    seed: int
    device: str
    dtype: str
    models: dict[str, ModelSpeed]
    ratios: dict[str, SpeedRatio]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain dicts."""
        return asdict(self)


@dataclass(frozen=True)
class _Pass:
    prefill_ms: float
    decode_ms: float


def measure_speed(
    models: Mapping[str, Any],
    *,
    batch_size: int,
    context: int,
    new_tokens: int,
    rounds: int,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> SpeedReport:
    """Time prefill and greedy decoding of every model, each once a round, the order alternating.

    The prompt is random tokens below the smallest vocabulary, the same for all. Each model is
    warmed up until two passes agree within 10 % (2 to 5 passes). `generate` is not used: its own
    overhead would hide a small model's gain.

    Args:
        models: Name to Hugging Face causal LM; the first is what the others are compared with.
        batch_size: Rows in the prompt.
        context: Tokens in a row of the prompt.
        new_tokens: Decode steps in a pass.
        rounds: Timed rounds; from 6 on the interval of a ratio is distribution-free.
        seed: Of the prompt's tokens.
        on_round: Called after each round with rounds done and rounds in all.

    Raises:
        InputError: No model, a count below 1, or context + new_tokens above a model's positions.
    """
    counts = {"batch_size": batch_size, "context": context, "new_tokens": new_tokens}
    for name, value in (counts | {"rounds": rounds}).items():
        check_count(name, value, 1)
    if not models:
        raise InputError("speed needs at least one model, got none; name the dense model first")
    for model in models.values():
        check_length(model, context + new_tokens, what="speed context + new_tokens")
    prompt = _random_prompt(models.values(), (batch_size, context), seed)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        warmups = {name: _warm_up(m, prompt, new_tokens) for name, m in models.items()}
        passes = _time_rounds(models, prompt, new_tokens, rounds, on_round)
    first_name, first = next(iter(models.items()))
    return SpeedReport(
        **counts,
        rounds=rounds,
        seed=seed,
        device=device_of(first).type,
        dtype=str(first.dtype).removeprefix("torch."),
        models={name: _summarise(passes[name], batch_size, warmups[name]) for name in models},
        ratios={
            name: _compare(passes[first_name], passes[name])
            for name in models
            if name != first_name
        },
    )


def measure_phase(
    models: Mapping[str, Any],
    budget: Budget,
    *,
    on_round: Callable[[int, int], None] | None = None,
) -> SpeedReport:
    """`measure_speed` at what a latency budget names, with no more decode steps than it needs."""
    return measure_speed(
        models,
        batch_size=budget.batch_size,
        context=budget.context,
        new_tokens=1 if budget.phase == "prefill" else _PHASE_STEPS,
        rounds=PHASE_ROUNDS,
        on_round=on_round,
    )


def phase_ms(
    models: Mapping[str, Any],
    budget: Budget,
    *,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Median milliseconds of the phase that a latency budget names, of every model."""
    timed = measure_phase(models, budget, on_round=on_round).models
    return {name: getattr(speed, budget.phase).median_ms for name, speed in timed.items()}


def _random_prompt(models: Any, shape: tuple[int, int], seed: int) -> Tensor:
    """Token ids of `shape` (batch_size, context), int64, on the CPU."""
    vocab_size = min(vocab_size_of(model) for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def _warm_up(model: Any, prompt: Tensor, new_tokens: int) -> int:
    """Run untimed passes until steady; returns how many."""
    totals: list[float] = []
    while len(totals) < _MAX_WARMUP_ROUNDS:
        timed = _time_pass(model, prompt, new_tokens)
        totals.append(timed.prefill_ms + new_tokens * timed.decode_ms)
        last = totals[-2:]
        if len(totals) >= _MIN_WARMUP_ROUNDS and min(last) >= (1 - _STEADY) * max(last):
            break
    return len(totals)


def _time_rounds(
    models: Mapping[str, Any],
    prompt: Tensor,
    new_tokens: int,
    rounds: int,
    on_round: Callable[[int, int], None] | None,
) -> dict[str, list[_Pass]]:
    passes: dict[str, list[_Pass]] = {name: [] for name in models}
    for index in range(rounds):
        # Drift within a round (heat, other load) favours no model when the order alternates.
        order = list(models) if index % 2 == 0 else list(models)[::-1]
        for name in order:
            passes[name].append(_time_pass(models[name], prompt, new_tokens))
        if on_round is not None:
            on_round(index + 1, rounds)
    return passes


def _time_pass(model: Any, prompt: Tensor, new_tokens: int) -> _Pass:
    """Time one prefill and the `new_tokens` greedy steps that follow it."""
    device = device_of(model)
    ids = prompt.to(device)
    start = _now(device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefilled = _now(device)
    decode_greedily(model, output, new_tokens)
    decoded = _now(device)
    return _Pass((prefilled - start) * 1e3, (decoded - prefilled) * 1e3 / new_tokens)


def decode_greedily(model: Any, output: Any, new_tokens: int) -> None:
    """Take `new_tokens` single-token steps from a prefill's `output`, whose KV cache grows."""
    for _ in range(new_tokens):
        ids = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)


def _now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _summarise(passes: Sequence[_Pass], batch_size: int, warmup_rounds: int) -> ModelSpeed:
    decode = _latency([timed.decode_ms for timed in passes])
    return ModelSpeed(
        prefill=_latency([timed.prefill_ms for timed in passes]),
        decode=decode,
        decode_tokens_per_s=batch_size * 1e3 / decode.median_ms,
        warmup_rounds=warmup_rounds,
    )


def _latency(times_ms: Sequence[float]) -> Latency:
    return Latency(statistics.median(times_ms), min(times_ms), max(times_ms))


def _compare(first: Sequence[_Pass], other: Sequence[_Pass]) -> SpeedRatio:
    pairs = list(zip(first, other, strict=True))
    return SpeedRatio(
        prefill=median_ratio([b.prefill_ms / a.prefill_ms for a, b in pairs]),
        decode=median_ratio([b.decode_ms / a.decode_ms for a, b in pairs]),
    )
