"""BenchReport: what `llmprune bench` found, as JSON, a terminal table and notes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from llmprune_eval.intervals import Ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.roofline import Rates

if TYPE_CHECKING:
    from rich.table import Table

BENCH_FORMAT = "llmprune-bench/1"
# An interval that holds 1.0 and runs further than this apart decides nothing: with a narrower one
# a difference above about 5 % would have been seen.
WIDEST = 1.10
# Nor does a time of which the processor was away for more than this share: what is left is decided
# by other programs, and they do not share themselves out evenly over two models.
MOST_WAITED = 0.10
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
    if ratio.low is None or ratio.high is None or waited > MOST_WAITED:
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
                        f"{_interval(found.ratio)}; {_why(found, first, label)}"
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
                    f"itself took {_interval(found.ratio)}, which must hold 1"
                )
        for label, model in point.models.items():
            if not model.steady:
                yield (
                    f"{point.name}: {label} was not steady after {model.warmup_passes} passes of "
                    "warming up; other programs run, or the device changes its clock"
                )


def _why(found: Comparison, first: str, label: str) -> str:
    """Why a comparison is too noisy, and what would help."""
    if max(found.waited) <= MOST_WAITED:
        return "take more --rounds or a quieter machine"
    shares = f"{found.waited[0]:.0%} of {first}'s time and {found.waited[1]:.0%} of {label}'s"
    return (
        f"other programs had the processor for {shares}, which no --rounds mend; take a quieter "
        "machine"
    )


def _long_times(point: Point) -> Iterator[str]:
    """Models that stand alone, and the times of which are those of other programs as well."""
    for label, model in point.models.items():
        for phase, title in PHASES.items():
            waited: tuple[float, ...] = getattr(model, phase).waited
            if waited and statistics.median(waited) > MOST_WAITED:
                yield (
                    f"{point.name}, {title}: other programs had the processor for "
                    f"{statistics.median(waited):.0%} of {label}'s time, which is too long by "
                    "that; take a quieter machine"
                )


def render_table(report: BenchReport) -> Table:
    """The report as a rich table: a column a model, and one a comparison with the first."""
    from rich.table import Table

    first, *others = report.models
    table = Table("")
    for label in (first, *others):
        table.add_column(label, justify="right")
    for label in others:
        table.add_column(f"{label} / {first}", justify="right")
    for row in _model_rows(report):
        table.add_row(row.label, *row.values, *row.ratios)
    for point in report.points:
        table.add_section()
        table.add_row(point.name)
        for row in _point_rows(point):
            table.add_row(row.label, *row.values, *row.ratios)
    return table


def notes_of(report: BenchReport) -> list[str]:
    """How it was measured, and on what."""
    names = [
        f"{label}: {facts.name}, {facts.form}, {facts.dtype}, attention {facts.attention}"
        for label, facts in report.models.items()
    ]
    rates = next(iter(report.models.values())).rates
    notes = [
        *names,
        f"batch x context tokens, then {report.new_tokens} steps; medians of {report.rounds} "
        "rounds (quartiles); ratios of times are paired by round, with a 95 % interval; peak "
        "memory is the model's share",
        f"roofline: {rates.flops_per_s / 1e9:.0f} GFLOP/s and {rates.bytes_per_s / 1e9:.1f} GB/s "
        "measured at the start (of the first model); the share of the median that it explains",
    ]
    if report.backend == "compile":
        notes.append(
            "compile: torch.compile with a KV cache of fixed size; peak memory is of eager"
        )
    for point in report.points:
        for label, model in point.models.items():
            notes += [f"{point.name}, {label}: {note}" for note in model.backends]
    environment = "; ".join(f"{key} {value}" for key, value in report.environment.items())
    return [*notes, environment]


class _Row(NamedTuple):
    label: str
    values: list[str]
    ratios: list[str]


def _model_rows(report: BenchReport) -> list[_Row]:
    facts = list(report.models.values())
    return [
        _counts(
            "parameters",
            [f"{f.parameters / 1e6:.2f} M" for f in facts],
            [f.parameters for f in facts],
        ),
        _counts(
            "weights on disk",
            [_mib(f.weight_bytes) for f in facts],
            [f.weight_bytes for f in facts],
        ),
        _counts(
            "load time",
            [f"{f.load_s.median:.2f} s" for f in facts],
            [f.load_s.median for f in facts],
        ),
    ]


def _point_rows(point: Point) -> list[_Row]:
    models = list(point.models.values())
    compared = list(point.comparisons.values())
    rows = []
    for phase, title in PHASES.items():
        phases: list[Phase] = [getattr(model, phase) for model in models]
        found: list[Comparison] = [getattr(comparison, phase) for comparison in compared]
        rows += [
            _Row(f"  {title}", [_times(p.ms) for p in phases], [_cell(c) for c in found]),
            _Row("    roofline", [_share(p) for p in phases], [f"{c.roofline:.3f}" for c in found]),
        ]
        if point.control is not None:
            control: Comparison = getattr(point.control, phase)
            rows.append(_Row("    against itself", [_cell(control)], []))
    speeds = [f"{model.decode_tokens_per_s:.1f}" for model in models]
    rows.append(_Row("  tokens a second", speeds, []))
    memory = [model.peak_memory for model in models]
    shares = [None if peak is None else peak.model_bytes for peak in memory]
    if None not in shares:
        known = [share for share in shares if share is not None]
        rows.append(_counts("  peak memory", [_mib(share) for share in known], known))
    return rows


def _counts(label: str, shown: list[str], values: Sequence[float]) -> _Row:
    first, *others = values
    return _Row(label, shown, [f"{other / first:.3f}" if first else "" for other in others])


def _times(times: Times) -> str:
    return f"{times.median:.1f} ms ({times.quartiles[0]:.1f} to {times.quartiles[1]:.1f})"


def _share(phase: Phase) -> str:
    return f"{phase.roofline_ms:.1f} ms, {phase.roofline_ms / phase.ms.median:.0%}"


def _cell(comparison: Comparison) -> str:
    ratio = comparison.ratio
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} {comparison.verdict}"
    return f"{_interval(ratio)} {comparison.verdict}"


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"x {ratio.value:.3f}"
    return f"x {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
