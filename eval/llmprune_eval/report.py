"""EvalReport: the pruned model against the dense one, as JSON, a terminal table and Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmprune.errors import InputError
from llmprune_eval.intervals import Ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.perplexity_intervals import interval_note, paired_ratio
from llmprune_eval.shared_time import QUIETER, is_shared, whose_time
from llmprune_eval.speed import Latency, SpeedReport

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("", "dense", "pruned", "pruned / dense")
_PHASES: dict[str, str] = {"prefill": "prefill", "decode": "decode, a token"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSize(_Part):
    """How large one model is: parameters in all and in its decoder layers, bytes of its folder."""

    parameters: Annotated[int, Field(ge=1)]
    decoder_parameters: Annotated[int, Field(ge=0)]
    disk_bytes: int | None = None
    peak_memory: PeakMemory | None = None


class TextResult(_Part):
    """Both models' perplexity on one text; `in_domain`: calibration used the same corpus."""

    name: str
    in_domain: bool
    dense: Perplexity
    pruned: Perplexity


class LatencyResult(_Part):
    """A latency budget: milliseconds by the table that the plan was chosen by, and measured again.

    `predicted` and `measured` map "dense" and "pruned" to milliseconds of the `phase`; `ratio` is
    that of the new measurement, paired by round; `waited` maps to the share of its time that the
    processor was not there.
    """

    phase: Literal["prefill", "decode"]
    batch_size: int
    context: int
    predicted: dict[str, float]
    measured: dict[str, float]
    ratio: Ratio
    waited: dict[str, float] = {}


class EvalReport(_Part):
    """Size, quality, speed and memory of the pruned model against the dense model.

    `speed` names its models "dense" and "pruned". `environment` is that of `environment()`;
    `samples` holds a greedy generation of each model; `backends` says what ran its block-sparse
    layers, and why; `origin` is where the dense model really came from, where that is no path.
    """

    environment: dict[str, str | int]
    dense: ModelSize
    pruned: ModelSize
    perplexities: tuple[TextResult, ...] = ()
    speed: SpeedReport | None = None
    latency: LatencyResult | None = None
    samples: dict[str, str] = {}
    backends: tuple[str, ...] = ()
    origin: str = ""

    @model_validator(mode="after")
    def _speed_has_both(self) -> EvalReport:
        if self.speed and not ("dense" in self.speed.models and "pruned" in self.speed.ratios):
            names = ", ".join(self.speed.models)
            raise ValueError(f"speed must have the models dense, pruned in this order, got {names}")
        return self

    def to_json(self) -> str:
        """The report as indented JSON; `from_json` reads it back."""
        return self.model_dump_json(indent=2) + "\n"

    @staticmethod
    def from_json(text: str, *, name: str = "report.json") -> EvalReport:
        """Read a report; `name` begins the error message.

        Raises:
            InputError: `text` is not the JSON of a report.
        """
        try:
            return EvalReport.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "report"
            raise InputError(
                f"{name}: {key}: {first['msg']}; write the report anew with this version"
            ) from error


def environment(device: torch.device | str, dtype: torch.dtype | str) -> dict[str, str | int]:
    """What the numbers were measured on and with; no host name, user name or path."""
    return {
        "device": _device_name(torch.device(device)),
        "cpu_count": os.cpu_count() or 1,
        "cpu_threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "llmprune": _version("llmprune"),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def render_table(report: EvalReport) -> Table:
    """The report as a rich table; the caption says what it was measured on and how."""
    from rich.table import Table

    # No colour of its own: a caption is what one reads to trust the numbers.
    table = Table(caption="\n".join(figure_notes(report)), caption_justify="left", caption_style="")
    table.add_column(COLUMNS[0])
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    for row in figure_rows(report):
        table.add_row(*row)
    return table


def to_markdown(report: EvalReport) -> str:
    """Warnings, and the same table and notes, as GitHub Markdown."""
    lines = [COLUMNS, ("---", "---:", "---:", "---:"), *figure_rows(report)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    warnings = [f"**WARNING: {warning}**\n" for warning in busy_warnings(report)]
    notes = [f"- {note}" for note in figure_notes(report)]
    return "\n".join([*warnings, *table, "", *notes]) + "\n"


def busy_warnings(report: EvalReport) -> tuple[str, ...]:
    """Times that are those of other programs as well, and decide nothing."""
    waits: dict[str, Mapping[str, float]] = {}
    if report.speed:
        for phase, title in _PHASES.items():
            timed = {n: getattr(report.speed.models[n], phase) for n in ("dense", "pruned")}
            waits[title] = {name: latency.waited for name, latency in timed.items()}
    if report.latency:
        waits[f"{report.latency.phase} budget, measured"] = report.latency.waited
    return tuple(
        f"{title}: too noisy to conclude; {whose_time(waited)}; {QUIETER} and time the run again "
        "with llmprune bench"
        for title, waited in waits.items()
        if is_shared(max(waited.values(), default=0.0))
    )


class FigureRow(NamedTuple):
    """One figure of the table, as text."""

    label: str
    dense: str
    pruned: str
    ratio: str


def figure_rows(report: EvalReport) -> list[FigureRow]:
    """Every figure, dense beside pruned; what was not measured is left out."""
    dense, pruned = report.dense, report.pruned
    rows = [
        _count_row("parameters", dense.parameters, pruned.parameters, _millions),
        _count_row(
            "decoder parameters", dense.decoder_parameters, pruned.decoder_parameters, _millions
        ),
    ]
    if dense.disk_bytes and pruned.disk_bytes:
        rows.append(_count_row("bytes on disk", dense.disk_bytes, pruned.disk_bytes, _mib))
    rows += [_perplexity_row(text) for text in report.perplexities]
    rows += _speed_rows(report.speed) if report.speed else []
    rows += _promise_rows(report.latency) if report.latency else []
    if dense.peak_memory and pruned.peak_memory:
        rows += _memory_rows(dense.peak_memory, pruned.peak_memory)
    return rows


def _perplexity_row(text: TextResult) -> FigureRow:
    mark = " (in-domain)" if text.in_domain else ""
    values = (f"{text.dense.value:.2f}", f"{text.pruned.value:.2f}")
    ratio = _ratio_cell(paired_ratio(text.dense, text.pruned))
    return FigureRow(f"perplexity {text.name}{mark}", *values, ratio)


def _speed_rows(speed: SpeedReport) -> list[FigureRow]:
    rows = []
    for phase, title in _PHASES.items():
        dense, pruned = (getattr(speed.models[name], phase) for name in ("dense", "pruned"))
        rows.append(_latency_row(title, dense, pruned, getattr(speed.ratios["pruned"], phase)))
    return rows


def _promise_rows(latency: LatencyResult) -> list[FigureRow]:
    promised, again = latency.predicted, latency.measured
    return [
        FigureRow(
            f"{latency.phase} budget, predicted",
            f"{promised['dense']:.1f} ms",
            f"{promised['pruned']:.1f} ms",
            f"{promised['pruned'] / promised['dense']:.3f}",
        ),
        FigureRow(
            f"{latency.phase} budget, measured",
            f"{again['dense']:.1f} ms",
            f"{again['pruned']:.1f} ms",
            _ratio_cell(latency.ratio, latency.waited.values()),
        ),
    ]


def _latency_row(label: str, dense: Latency, pruned: Latency, ratio: Ratio) -> FigureRow:
    cell = _ratio_cell(ratio, (dense.waited, pruned.waited))
    return FigureRow(label, f"{dense.median_ms:.1f} ms", f"{pruned.median_ms:.1f} ms", cell)


def _memory_rows(dense: PeakMemory, pruned: PeakMemory) -> list[FigureRow]:
    return [
        _count_row("peak memory", dense.peak_bytes, pruned.peak_bytes, _mib),
        _count_row("peak memory, model's share", dense.model_bytes, pruned.model_bytes, _mib),
    ]


def _count_row(label: str, dense: int, pruned: int, show: Callable[[int], str]) -> FigureRow:
    return FigureRow(label, show(dense), show(pruned), f"{pruned / dense:.3f}" if dense else "")


def _ratio_cell(ratio: Ratio, waited: Iterable[float] = ()) -> str:
    """A ratio with what it decides; `waited`: shares of its times without the processor."""
    cell = f"{ratio.value:.3f}"
    if ratio.low is not None and ratio.high is not None:
        cell += f" ({ratio.low:.3f} to {ratio.high:.3f})"
    if is_shared(max(waited, default=0.0)):
        return f"{cell}, too noisy"
    return cell if ratio.conclusive else f"{cell}, not conclusive"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def figure_notes(report: EvalReport) -> list[str]:
    """How each row was measured, and on what."""
    notes = [
        f"perplexity {text.name}: {text.dense.num_windows} windows of {text.dense.window}, "
        f"{text.dense.num_tokens} scored tokens; {interval_note(text.dense)}"
        for text in report.perplexities
    ]
    if report.speed:
        speed = report.speed
        notes.append(
            f"speed: {speed.batch_size} x {speed.context} tokens, {speed.new_tokens} decode steps, "
            f"median of {speed.rounds} rounds, {speed.device} {speed.dtype}"
        )
    notes += report.backends
    if report.latency:
        budget = report.latency
        notes.append(
            f"{budget.phase} budget: {budget.batch_size} x {budget.context} tokens; predicted by "
            "the table that the plan was chosen by, then measured again"
        )
    if any(text.in_domain for text in report.perplexities):
        notes.append("in-domain: calibration used the same corpus")
    if report.perplexities or report.speed or report.latency:
        notes.append("(low to high): 95 % interval; not conclusive: it holds 1")
    if busy_warnings(report):
        notes.append("too noisy: other programs had the processor for part of the time")
    return [*notes, "; ".join(f"{key} {value}" for key, value in report.environment.items())]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
