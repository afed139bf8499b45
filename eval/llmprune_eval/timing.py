"""Passes on a clock: one prefill and its decode steps, models in turn, in an order drawn by coin.

Two equal models must come out equal whatever else the machine does. So rounds go in pairs: a coin
draws the order of the first, the second has it reversed. What favours whoever runs first cancels
within a pair, and no rhythm of the machine can keep step with the coin.

What a coin cannot cancel is a processor that is taken away for most of the time: then the slices of
other programs are timed. On the CPU every lapse is therefore held against the time that its thread
ran for. The thread takes part in all work and sleeps where another thread of its own is late, so
that a processor taken from any of them shows in it.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune_eval.inference import device_of, vocab_size_of

_MIN_WARMUP_PASSES = 2
_MAX_WARMUP_PASSES = 5
# Warm when two passes in a row differ by no more than this share of the slower one.
_STEADY = 0.1


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one prefill and of the median of the decode steps after it.

    Attributes:
        prefill_ms, decode_ms: Wall time.
        prefill_waited, decode_waited: Share of it, in [0, 1], that the processor was not there;
            of the decode steps the median. 0 on a GPU, whose own clock is read.
        switches: How often the processor was taken from this process during the pass.
    """

    prefill_ms: float
    decode_ms: float
    prefill_waited: float = 0.0
    decode_waited: float = 0.0
    switches: int = 0


@dataclass(frozen=True)
class Lapse:
    """Milliseconds between two marks, and the share of them that the processor was not there."""

    ms: float
    waited: float


@dataclass(frozen=True)
class WarmUp:
    """Untimed passes, and whether the last two of them agreed within 10 %."""

    passes: int
    steady: bool


class _Clock:
    """Marks of moments on a device; on a GPU its own events, so that steps need not wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []
        self._synchronize()

    def mark(self) -> None:
        """Remember when everything given to the device so far is done."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
            return
        self._synchronize()
        self._marks.append((time.perf_counter(), time.thread_time()))

    def lapses(self) -> list[Lapse]:
        """What lies between each mark and the next."""
        self._synchronize()
        pairs = itertools.pairwise(self._marks)
        if self.device.type == "cuda":
            return [Lapse(start.elapsed_time(end), 0.0) for start, end in pairs]
        found = [(end[0] - start[0], end[1] - start[1]) for start, end in pairs]
        if self.device.type != "cpu":
            return [Lapse(wall * 1e3, 0.0) for wall, _ in found]
        return [Lapse(wall * 1e3, _share_waited(wall, ran)) for wall, ran in found]

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def time_pass(model: Any, prompt: Tensor, new_tokens: int, cache: Any = None) -> Pass:
    """Time one prefill and the greedy steps that follow it.

    Args:
        model: A Hugging Face causal LM in eval mode.
        prompt: Token ids (batch_size, context), int64.
        new_tokens: Steps, at least one.
        cache: A KV cache of fixed size to fill anew; None grows one.
    """
    ids = prompt.to(device_of(model))
    before = involuntary_switches()
    clock = _Clock(ids.device)
    clock.mark()
    output = prefill(model, ids, cache)
    clock.mark()
    decode_greedily(model, output, new_tokens, on_step=clock.mark)
    first, *steps = clock.lapses()
    return Pass(
        first.ms,
        statistics.median(step.ms for step in steps),
        first.waited,
        statistics.median(step.waited for step in steps),
        involuntary_switches() - before,
    )


def involuntary_switches() -> int:
    """How often the processor was taken from this process so far; 0 where nobody counts."""
    if importlib.util.find_spec("resource") is None:
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _share_waited(wall_s: float, ran_s: float) -> float:
    """Share of a wall time that a thread did not run, in [0, 1]: clocks differ a little."""
    return min(1.0, max(0.0, 1 - ran_s / wall_s)) if wall_s > 0 else 0.0


def prefill(model: Any, ids: Tensor, cache: Any = None) -> Any:
    """The output of a forward pass over a prompt, logits of its last token only."""
    if cache is not None:
        cache.reset()
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def decode_greedily(
    model: Any, output: Any, new_tokens: int, on_step: Callable[[], None] | None = None
) -> None:
    """Take `new_tokens` single-token steps from a prefill's `output`, whose KV cache grows."""
    for _ in range(new_tokens):
        ids = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
        if on_step is not None:
            on_step()


def random_prompt(models: Iterable[Any], shape: tuple[int, int], seed: int) -> Tensor:
    """Token ids of `shape` (batch_size, context) that all models know, int64, on the CPU."""
    vocab_size = min(vocab_size_of(model) for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def warm_up(time_one: Callable[[], Pass], new_tokens: int) -> WarmUp:
    """Run passes that are not counted until two in a row agree, 2 to 5 of them."""
    totals: list[float] = []
    while len(totals) < _MAX_WARMUP_PASSES:
        timed = time_one()
        totals.append(timed.prefill_ms + new_tokens * timed.decode_ms)
        last = totals[-2:]
        if len(totals) >= _MIN_WARMUP_PASSES and min(last) >= (1 - _STEADY) * max(last):
            return WarmUp(len(totals), steady=True)
    return WarmUp(len(totals), steady=False)


def time_rounds(
    names: Sequence[str],
    time_one: Callable[[str], Pass],
    rounds: int,
    *,
    seed: int,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, list[Pass]]:
    """Time everyone once a round; passes by name, in the order of the rounds.

    Args:
        names: Who is timed.
        time_one: Times one pass.
        rounds: How many; an even number leaves no order ahead of its reverse.
        seed: Of the coin.
        on_round: Called after each round with rounds done and rounds in all.
    """
    coin = random.Random(seed)
    passes: dict[str, list[Pass]] = {name: [] for name in names}
    order: list[str] = []
    for index in range(rounds):
        order = order[::-1] if index % 2 else coin.sample(list(names), len(names))
        for name in order:
            passes[name].append(time_one(name))
        if on_round is not None:
            on_round(index + 1, rounds)
    return passes
