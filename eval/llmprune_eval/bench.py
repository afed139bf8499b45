"""bench: latency, memory and load time of some models, timed in the same rounds, with a verdict."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from llmprune.recipe import SpeedTask
from llmprune_eval.bench_report import (
    BenchReport,
    Comparison,
    ModelFacts,
    Phase,
    PhaseName,
    Point,
    PointComparison,
    PointModel,
    judge,
    noise_warnings,
    times_of,
)
from llmprune_eval.evaluation import backend_notes
from llmprune_eval.footprint import (
    Backend,
    Contender,
    check_lengths,
    contenders_of,
    load_in_turn,
    peak_memory_at,
)
from llmprune_eval.inference import check_count, device_of, eval_mode
from llmprune_eval.intervals import median_ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.report import environment
from llmprune_eval.roofline import Rates, Shape, decode_work, measure_rates, prefill_work, shape_of
from llmprune_eval.subjects import Subject
from llmprune_eval.timing import (
    Pass,
    WarmUp,
    prefill,
    random_prompt,
    time_pass,
    time_rounds,
    warm_up,
)

# task, done, of how many
OnProgress = Callable[[str, int, int], None]
# The first model under a name of its own, timed as if it were another.
CONTROL = "control"
# How a pass calls the phases of a report.
_PASS_NAMES: dict[PhaseName, str] = {"first_token": "prefill", "decode": "decode"}
# Above so many waiting programs a core the machine is shared.
_BUSY = 0.5


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        batch_sizes, contexts: Every pair of them is a point.
        new_tokens: Decode steps in a pass.
        rounds: Timed rounds; from 6 on intervals are free of a distribution.
        backend: None takes block-sparse layers where a model has them, else eager.
        check: Time the first model as its own control.
        memory: Measure peak memory, on the CPU in a fresh process for each model and point.
        seed: Of prompts and of the order within rounds.
    """

    batch_sizes: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128,)
    new_tokens: int = 64
    rounds: int = 10
    backend: Backend | None = None
    check: bool = False
    memory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check counts.

        Raises:
            InputError: One is too small.
        """
        for name, least in (("new_tokens", 1), ("rounds", 3)):
            check_count(name.replace("_", "-"), getattr(self, name), least)
        for name, values in (("batch", self.batch_sizes), ("context", self.contexts)):
            for value in values:
                check_count(name, value, 1)

    @property
    def points(self) -> list[tuple[int, int]]:
        """All (batch_size, context), as asked, none twice."""
        return list(dict.fromkeys((b, c) for b in self.batch_sizes for c in self.contexts))


@dataclass(frozen=True)
class _Loaded:
    """A model ready to be timed, and what is known of it."""

    model: Any
    shape: Shape
    rates: Rates
    memory: Mapping[tuple[int, int], PeakMemory | None]


def bench(
    subjects: Sequence[Subject], settings: BenchSettings, on_progress: OnProgress
) -> BenchReport:
    """Measure the subjects in the same rounds; the first is what the others are compared with.

    Raises:
        InputError: A point is too long for a model, a model can't be loaded, or none has the
            block-sparse layers asked for.
    """
    check_lengths(subjects, max(settings.contexts) + settings.new_tokens)
    contenders = contenders_of(subjects, settings.backend)
    load_average = _load_average()
    memory = _measure_memory(contenders, settings, on_progress)
    on_progress("load", 0, 1)
    models, load_s = load_in_turn(contenders)
    on_progress("load", 1, 1)
    loaded = {
        label: _Loaded(model, shape := shape_of(model), measure_rates(model, shape), memory[label])
        for label, model in models.items()
    }
    points = tuple(
        _measure_point(loaded, point, settings, on_progress) for point in settings.points
    )
    facts = {c.subject.label: _facts(c, loaded[c.subject.label], load_s) for c in contenders}
    first = next(iter(models.values()))
    return BenchReport(
        environment=environment(device_of(first), first.dtype),
        backend=settings.backend or "as stored",
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
        seed=settings.seed,
        load_average=load_average,
        models=facts,
        points=points,
        warnings=(*_setting_warnings(facts, load_average), *noise_warnings(points)),
    )


def compare_passes(
    first: Sequence[Pass], other: Sequence[Pass], roofline: Mapping[str, float]
) -> PointComparison:
    """Ratios of the other's times to the first's, round by round.

    Args:
        first: Passes of what is compared with.
        other: Passes of the other in the same rounds.
        roofline: The ratio that the roofline has, by phase.
    """
    found = {}
    for phase, name in _PASS_NAMES.items():
        ms, waited = attrgetter(f"{name}_ms"), attrgetter(f"{name}_waited")
        ratio = median_ratio([ms(b) / ms(a) for a, b in zip(first, other, strict=True)])
        waits = (statistics.median(map(waited, first)), statistics.median(map(waited, other)))
        found[phase] = Comparison(
            ratio=ratio, roofline=roofline[phase], waited=waits, verdict=judge(ratio, max(waits))
        )
    return PointComparison(**found)


def _measure_memory(
    contenders: Sequence[Contender], settings: BenchSettings, on_progress: OnProgress
) -> dict[str, dict[tuple[int, int], PeakMemory | None]]:
    """Peak memory of all, by label and point; before anything is loaded here."""
    found: dict[str, dict[tuple[int, int], PeakMemory | None]] = {}
    if not settings.memory:
        return {c.subject.label: dict.fromkeys(settings.points) for c in contenders}
    for index, contender in enumerate(contenders):
        on_progress("peak memory", index, len(contenders))
        peaks = peak_memory_at(contender, settings.points, settings.new_tokens)
        found[contender.subject.label] = dict(zip(settings.points, peaks, strict=True))
    on_progress("peak memory", len(contenders), len(contenders))
    return found


def _measure_point(
    loaded: Mapping[str, _Loaded],
    point: tuple[int, int],
    settings: BenchSettings,
    on_progress: OnProgress,
) -> Point:
    first = next(iter(loaded))
    models = {label: known.model for label, known in loaded.items()}
    timed = models | ({CONTROL: models[first]} if settings.check else {})
    prompt = random_prompt(models.values(), point, settings.seed)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eval_mode(model))
        caches = _prepare(models, prompt, settings)

        def time_one(name: str) -> Pass:
            cache = caches[first if name == CONTROL else name]
            return time_pass(timed[name], prompt, settings.new_tokens, cache)

        warm = {label: warm_up(partial(time_one, label), settings.new_tokens) for label in models}
        passes = time_rounds(
            list(timed),
            time_one,
            settings.rounds,
            seed=settings.seed,
            on_round=partial(on_progress, f"batch {point[0]}, context {point[1]}"),
        )
    found = {
        label: _point_model(known, passes[label], warm[label], point, settings)
        for label, known in loaded.items()
    }
    return Point(
        batch_size=point[0],
        context=point[1],
        models=found,
        comparisons={
            label: compare_passes(
                passes[first], passes[label], _roofline(found[first], found[label])
            )
            for label in models
            if label != first
        },
        control=compare_passes(
            passes[first], passes[CONTROL], _roofline(found[first], found[first])
        )
        if settings.check
        else None,
    )


def _prepare(models: Mapping[str, Any], prompt: Tensor, settings: BenchSettings) -> dict[str, Any]:
    """KV caches of fixed size and compiled models where that is the backend; else no caches."""
    if settings.backend != "compile":
        return dict.fromkeys(models)
    from transformers import StaticCache

    torch._dynamo.reset()
    caches: dict[str, Any] = {}
    for label, model in models.items():
        cache = StaticCache(model.config, max_cache_len=prompt.shape[1] + settings.new_tokens)
        # memory is given to the cache outside of compiled code, hence a first pass without it
        prefill(model.forward, prompt.to(device_of(model)), cache)
        # on a GPU a step is hundreds of launches, which take longer than its kernels: one graph
        on_gpu = device_of(model).type == "cuda"
        model.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)
        caches[label] = cache
    return caches


def _point_model(
    known: _Loaded,
    passes: Sequence[Pass],
    warm: WarmUp,
    point: tuple[int, int],
    settings: BenchSettings,
) -> PointModel:
    batch_size, context = point
    steps = times_of([timed.decode_ms for timed in passes])
    work = decode_work(known.shape, batch_size, context, settings.new_tokens)
    task = SpeedTask(batch_size=batch_size, context=context, new_tokens=settings.new_tokens)
    return PointModel(
        first_token=Phase(
            ms=times_of([timed.prefill_ms for timed in passes]),
            waited=tuple(timed.prefill_waited for timed in passes),
            roofline_ms=known.rates.least_ms(prefill_work(known.shape, batch_size, context)),
        ),
        decode=Phase(
            ms=steps,
            waited=tuple(timed.decode_waited for timed in passes),
            roofline_ms=known.rates.least_ms(work),
        ),
        switches=tuple(timed.switches for timed in passes),
        decode_tokens_per_s=batch_size * 1e3 / steps.median,
        peak_memory=known.memory[point],
        warmup_passes=warm.passes,
        steady=warm.steady,
        backends=backend_notes(known.model, task),
    )


def _roofline(first: PointModel, other: PointModel) -> dict[str, float]:
    """The other's roofline over the first's, by phase."""
    return {
        "first_token": other.first_token.roofline_ms / first.first_token.roofline_ms,
        "decode": other.decode.roofline_ms / first.decode.roofline_ms,
    }


def _facts(
    contender: Contender, known: _Loaded, load_s: Mapping[str, Sequence[float]]
) -> ModelFacts:
    model = known.model
    return ModelFacts(
        name=contender.subject.name,
        form="block-sparse" if contender.block_sparse else "stored weights",
        dtype=str(model.dtype).removeprefix("torch."),
        attention=str(getattr(model.config, "_attn_implementation", "unknown")),
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=contender.weight_bytes(),
        load_s=times_of(load_s[contender.subject.label]),
        rates=known.rates,
    )


def _setting_warnings(facts: Mapping[str, ModelFacts], load_average: float | None) -> list[str]:
    warnings = []
    cores = os.cpu_count() or 1
    if load_average is not None and load_average > _BUSY * cores:
        warnings.append(
            f"other programs ran: load average {load_average:.1f} on {cores} cores at the start"
        )
    for what in ("dtype", "attention"):
        differing = {label: getattr(known, what) for label, known in facts.items()}
        if len(set(differing.values())) > 1:
            shown = ", ".join(f"{label} {value}" for label, value in differing.items())
            warnings.append(f"the models differ in {what} ({shown}); that is compared as well")
    return warnings


def _load_average() -> float | None:
    """Programs that ran or waited over the last minute; None where the system doesn't tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
