"""BenchReport: what `llmprune bench` found, as JSON, with its verdicts and warnings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmprune_eval.intervals import Ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.roofline import Rates
from llmprune_eval.shared_time import QUIETER, is_shared, whose_time

BENCH_FORMAT = "llmprune-bench/1"
# An interval that holds 1.0 and runs further than this apart decides nothing: with a narrower one
# a difference above about 5 % would have been seen.
WIDEST = 1.10
Verdict = Literal["faster", "slower", "same", "too noisy"]
PhaseName = Literal["first_token", "decode"]
PHASES: dict[PhaseName, str] = {"first_token": "first token", "decode": "decode step"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Times(_Part):
    """Measurements of one thing, in their order; milliseconds, of loading seconds."""

    median: float
    quartiles: tuple[float, float]
    each: tuple[float, ...]


class ModelFacts(_Part):
    """What is measured of a model once.

    `form` is what ran: the stored weights, or block-sparse layers. `load_s` is from the files to a
    model that is ready on its device, files in the system's cache but for the first time.
    """

    name: str
    form: Literal["stored weights", "block-sparse"]
    dtype: str
    attention: str
    parameters: int
    weight_bytes: int
    load_s: Times
    rates: Rates


class Phase(_Part):
    """A phase of one model: measured, and the least time by the roofline.

    `waited` is the share of each round's time that the processor was not there.
    """

    ms: Times
    waited: tuple[float, ...] = ()
    roofline_ms: float


class PointModel(_Part):
    """One model at one point.

    `steady` is False where warming up did not settle; `switches` counts for each round how often
    the processor was taken from this process.
    """

    first_token: Phase
    decode: Phase
    decode_tokens_per_s: float
    peak_memory: PeakMemory | None
    warmup_passes: int
    steady: bool
    backends: tuple[str, ...]
    switches: tuple[int, ...] = ()


class Comparison(_Part):
    """A time over the first model's: measured, by the roofline, and what that decides.

    `waited` is the first model's and the other's median share of time without the processor.
    """

    ratio: Ratio
    roofline: float
    waited: tuple[float, float] = (0.0, 0.0)
    verdict: Verdict


class PointComparison(_Part):
    """One model against the first at one point."""

    first_token: Comparison
    decode: Comparison


class Point(_Part):
    """All models at one (batch_size, context).

    `comparisons` has every model but the first; `control` is the first against itself, timed in the
    same rounds, where that was asked for.
    """

    batch_size: int
    context: int
    models: dict[str, PointModel]
    comparisons: dict[str, PointComparison]
    control: PointComparison | None = None

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"batch {self.batch_size}, context {self.context}"


class BenchReport(_Part):
    """Everything that one run of bench measured; the first model is what others compare with.

    `load_average` is the machine's before the run, over a minute; None where there is none.
    """

    format: str = BENCH_FORMAT
    environment: dict[str, str | int]
    backend: str
    new_tokens: int
    rounds: int
    seed: int
    load_average: float | None
    models: dict[str, ModelFacts]
    points: tuple[Point, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The report as indented JSON."""
        return self.model_dump_json(indent=1) + "\n"


def times_of(values: Sequence[float]) -> Times:
    """Median, quartiles and all of some values, at least one."""
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Times(median=statistics.median(values), quartiles=(low, high), each=tuple(values))


def judge(ratio: Ratio, waited: float = 0.0) -> Verdict:
    """What a ratio of times decides, where the processor was away for that share of a time."""
    if ratio.low is None or ratio.high is None or is_shared(waited):
        return "too noisy"
    if ratio.conclusive:
        return "faster" if ratio.high < 1.0 else "slower"
    return "same" if ratio.high <= WIDEST * ratio.low else "too noisy"


def noise_warnings(points: Sequence[Point]) -> Iterator[str]:
    """Where the run cannot be concluded from, and why."""
    for point in points:
        first = next(iter(point.models))
        for label, comparison in point.comparisons.items():
            for phase, title in PHASES.items():
                found: Comparison = getattr(comparison, phase)
                if found.verdict == "too noisy":
                    yield (
                        f"{point.name}, {title}: too noisy to conclude, {label} took "
                        f"{ratio_text(found.ratio)}; {_why(found, first, label)}"
                    )
        if not point.comparisons:
            yield from _long_times(point)
        for phase, title in PHASES.items():
            if point.control is None:
                continue
            found = getattr(point.control, phase)
            if found.verdict in ("faster", "slower"):
                yield (
                    f"{point.name}, {title}: do not trust the comparison: the first model against "
                    f"itself took {ratio_text(found.ratio)}, which must hold 1"
                )
        for label, model in point.models.items():
            if not model.steady:
                yield (
                    f"{point.name}: {label} was not steady after {model.warmup_passes} passes of "
                    "warming up; other programs run, or the device changes its clock"
                )


def _why(found: Comparison, first: str, label: str) -> str:
    """Why a comparison is too noisy, and what would help."""
    waited = dict(zip((first, label), found.waited, strict=True))
    if not is_shared(max(found.waited)):
        return "take more --rounds or a quieter machine"
    return f"{whose_time(waited)}, which no --rounds mend; {QUIETER}"


def _long_times(point: Point) -> Iterator[str]:
    """Models that stand alone, and the times of which are those of other programs as well."""
    for label, model in point.models.items():
        for phase, title in PHASES.items():
            waited: tuple[float, ...] = getattr(model, phase).waited
            share = statistics.median(waited) if waited else 0.0
            if is_shared(share):
                yield (
                    f"{point.name}, {title}: {whose_time({label: share})}, which is too long by "
                    f"that; {QUIETER}"
                )


def ratio_text(ratio: Ratio) -> str:
    """A ratio of times with its interval."""
    if ratio.low is None or ratio.high is None:
        return f"x {ratio.value:.3f}"
    return f"x {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
