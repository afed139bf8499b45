"""Latency of prefill and decode, models timed in turn; ratios paired round by round."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from llmprune.errors import InputError
from llmprune.recipe import Budget
from llmprune_eval.inference import check_count, check_length, device_of, eval_mode
from llmprune_eval.intervals import Ratio, median_ratio
from llmprune_eval.shared_time import QUIETER, is_shared, whose_time
from llmprune_eval.timing import Pass, random_prompt, time_pass, time_rounds, warm_up

logger = logging.getLogger("llmprune")
# Rounds for a latency budget, and decode steps in each where decoding is what it names.
PHASE_ROUNDS = 15
_PHASE_STEPS = 8


@dataclass(frozen=True)
class Latency:
    """Milliseconds over the rounds: the median and the fastest and slowest round.

    `waited` is the median share of a round's time, in [0, 1], that the processor was not there.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    waited: float = 0.0


@dataclass(frozen=True)
class ModelSpeed:
    """One model's latency.

    Attributes:
        prefill: One forward pass over (batch_size, context) tokens: the time to the first token.
        decode: One greedy step with the KV cache, for the whole batch; of a round its median step.
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
    """Time prefill and greedy decoding of every model, each once a round, the order drawn by coin.

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
    prompt = random_prompt(models.values(), (batch_size, context), seed)

    def time_one(name: str) -> Pass:
        return time_pass(models[name], prompt, new_tokens)

    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        warmups = {name: warm_up(partial(time_one, name), new_tokens).passes for name in models}
        passes = time_rounds(list(models), time_one, rounds, seed=seed, on_round=on_round)
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
    """Median milliseconds of the phase that a latency budget names, of every model.

    Warns where other programs had the processor for too much of it.
    """
    timed = measure_phase(models, budget, on_round=on_round).models
    found: dict[str, Latency] = {n: getattr(speed, budget.phase) for n, speed in timed.items()}
    worst = max(found, key=lambda name: found[name].waited)
    if is_shared(found[worst].waited):
        logger.warning(
            "latency table: %s: do not trust the milliseconds of a plan chosen by it; %s",
            whose_time({worst: found[worst].waited}),
            QUIETER,
        )
    return {name: latency.median_ms for name, latency in found.items()}


def _summarise(passes: Sequence[Pass], batch_size: int, warmup_rounds: int) -> ModelSpeed:
    decode = _latency([(timed.decode_ms, timed.decode_waited) for timed in passes])
    return ModelSpeed(
        prefill=_latency([(timed.prefill_ms, timed.prefill_waited) for timed in passes]),
        decode=decode,
        decode_tokens_per_s=batch_size * 1e3 / decode.median_ms,
        warmup_rounds=warmup_rounds,
    )


def _latency(rounds: Sequence[tuple[float, float]]) -> Latency:
    """Of (milliseconds, share of them without the processor), a round each."""
    times_ms, waited = zip(*rounds, strict=True)
    middle = statistics.median(times_ms)
    return Latency(middle, min(times_ms), max(times_ms), statistics.median(waited))


def _compare(first: Sequence[Pass], other: Sequence[Pass]) -> SpeedRatio:
    pairs = list(zip(first, other, strict=True))
    return SpeedRatio(
        prefill=median_ratio([b.prefill_ms / a.prefill_ms for a, b in pairs]),
        decode=median_ratio([b.decode_ms / a.decode_ms for a, b in pairs]),
    )
