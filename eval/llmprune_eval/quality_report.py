"""QualityReport: perplexities and task figures of one or two models, as JSON and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmprune.errors import InputError
from llmprune_eval.intervals import Ratio
from llmprune_eval.paired import Difference
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.perplexity_intervals import interval_note, nll_stderr

if TYPE_CHECKING:
    from rich.table import Table


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelLine(_Part):
    """What was evaluated: its name (never a path), and a sha256 of weights, config, tokenizer."""

    name: str
    fingerprint: str
    parameters: Annotated[int, Field(ge=1)]
    dtype: str


class TextFigures(_Part):
    """Perplexity of every model on one text.

    `ratio` is pruned / dense, None for one model, or where `same_tokens` is False: perplexities of
    different tokenizers can't be compared.
    """

    name: str
    in_domain: bool
    perplexities: dict[str, Perplexity]
    same_tokens: bool
    ratio: Ratio | None


class Figure(_Part):
    """lm-eval's figure of one model on one task, and its standard error."""

    value: float
    stderr: float | None


class MetricFigures(_Part):
    """A metric of every model; `difference` is None for one model, or where it can't be paired."""

    figures: dict[str, Figure]
    difference: Difference | None


class TaskFigures(_Part):
    """One lm-eval task: all metrics, the one that tables show, and what was run.

    `data` is a sha256 of local rows, or the ids of data sets on the Hub.
    """

    name: str
    headline: str
    num_documents: int
    num_subtasks: int
    limit: int | None
    num_fewshot: int
    data: str = ""
    metrics: dict[str, MetricFigures]


class QualityReport(_Part):
    """Quality of the dense and the pruned model, or of one model alone.

    `models` is keyed by `dense` and `pruned`, or by `model`; so are the figures. `warnings` are
    read before any table.
    """

    environment: dict[str, str | int]
    models: dict[str, ModelLine]
    warnings: tuple[str, ...] = ()
    texts: tuple[TextFigures, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The report as indented JSON."""
        return self.model_dump_json(indent=2) + "\n"

    @staticmethod
    def from_json(text: str, *, name: str = "evaluation.json") -> QualityReport:
        """Read a report; `name` begins the error message.

        Raises:
            InputError: `text` is not the JSON of a report.
        """
        try:
            return QualityReport.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "evaluation"
            raise InputError(f"{name}: {key}: {first['msg']}; evaluate again") from error


class _Row(NamedTuple):
    label: str
    figures: tuple[str, ...]
    difference: str


def render_table(report: QualityReport) -> Table:
    """The figures as a rich table; `notes_of` says how they were measured."""
    from rich.table import Table

    table = Table()
    head, *columns = columns_of(report)
    table.add_column(head)
    for column in columns:
        table.add_column(column, justify="right")
    for row in table_rows(report):
        table.add_row(*row)
    return table


def to_markdown(report: QualityReport) -> str:
    """Warnings, the table and its notes as GitHub Markdown."""
    columns = columns_of(report)
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *table_rows(report)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    warnings = [f"**WARNING: {warning}**\n" for warning in report.warnings]
    return "\n".join([*warnings, *table, "", *(f"- {note}" for note in notes_of(report))]) + "\n"


def notes_of(report: QualityReport) -> list[str]:
    """How each row was measured, and on what."""
    notes = [f"{label}: {line.name}, {line.dtype}" for label, line in report.models.items()]
    for text in report.texts:
        first = next(iter(text.perplexities.values()))
        notes.append(
            f"perplexity {text.name}: {first.num_windows} windows of {first.window}, "
            f"{first.num_tokens} scored tokens; {interval_note(first)}"
        )
    notes += [_task_note(task) for task in report.tasks]
    if report.texts or report.tasks:
        notes.append("±: one standard error")
    if len(report.models) == 2 and (report.texts or report.tasks):
        notes.append(
            "(low to high): 95 % interval from both models on the same documents; p: McNemar's "
            "exact test; not conclusive: the models may be equal (of 20 tests of equal models "
            "one says otherwise)"
        )
    return [
        *notes,
        *report.notes,
        "; ".join(f"{key} {value}" for key, value in report.environment.items()),
    ]


def columns_of(report: QualityReport) -> tuple[str, ...]:
    """The heads of the table: a column a model, and one for two of them compared."""
    labels = tuple(report.models)
    return ("", *labels, "pruned against dense") if len(labels) == 2 else ("", *labels)


def table_rows(report: QualityReport) -> list[tuple[str, ...]]:
    """The rows of the table as text, each as wide as `columns_of`."""
    is_pair = len(report.models) == 2
    return [
        (row.label, *row.figures, *((row.difference,) if is_pair else ())) for row in _rows(report)
    ]


def _rows(report: QualityReport) -> list[_Row]:
    rows = [
        _Row(
            "parameters",
            tuple(f"{line.parameters / 1e6:.2f} M" for line in report.models.values()),
            _parameter_ratio(report),
        )
    ]
    for text in report.texts:
        mark = " (in-domain)" if text.in_domain else ""
        cells = tuple(_perplexity_cell(text.perplexities[label]) for label in report.models)
        rows.append(_Row(f"perplexity {text.name}{mark}", cells, _ratio_cell(text)))
    for task in report.tasks:
        shown = task.metrics[task.headline]
        cells = tuple(_figure_cell(shown.figures[label], task.headline) for label in report.models)
        difference = _difference_cell(shown.difference) if shown.difference else "not paired"
        rows.append(_Row(f"{task.name} {task.headline}", cells, difference))
    return rows


def _parameter_ratio(report: QualityReport) -> str:
    counts = [line.parameters for line in report.models.values()]
    return f"x {counts[1] / counts[0]:.3f}" if len(counts) == 2 else ""


def _perplexity_cell(perplexity: Perplexity) -> str:
    error = nll_stderr(perplexity)
    if error is None:
        return f"{perplexity.value:.2f}"
    # exp() of the NLL, so its standard error grows with the value
    return f"{perplexity.value:.2f} ± {perplexity.value * error:.2f}"


def _ratio_cell(text: TextFigures) -> str:
    if text.ratio is None:
        return "" if text.same_tokens else "other tokenizer"
    ratio = text.ratio
    if ratio.low is None or ratio.high is None:
        return f"x {ratio.value:.3f}, not conclusive"
    cell = f"x {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    return cell if ratio.conclusive else f"{cell}, not conclusive"


def _figure_cell(figure: Figure, metric: str) -> str:
    is_share = not metric.startswith("perplexity")
    scale, digits = (100, 1) if is_share else (1, 2)
    cell = f"{scale * figure.value:.{digits}f}"
    if figure.stderr is not None:
        cell += f" ± {scale * figure.stderr:.{digits}f}"
    return f"{cell} %" if is_share else cell


def _difference_cell(difference: Difference) -> str:
    if difference.kind == "ratio":
        cell = f"x {difference.value:.3f} ({difference.low:.3f} to {difference.high:.3f})"
    else:
        low, high = 100 * difference.low, 100 * difference.high
        cell = f"{100 * difference.value:+.1f} ({low:+.1f} to {high:+.1f})"
    if difference.p_value is not None:
        cell += f", p {difference.p_value:.2g}"
    return cell if difference.conclusive else f"{cell}, not conclusive"


def _task_note(task: TaskFigures) -> str:
    of = f" of {task.num_subtasks} subtasks" if task.num_subtasks > 1 else ""
    part = ", not all there are" if task.limit is not None else ""
    return f"{task.name}: {task.num_documents} documents{of}{part}, {task.num_fewshot}-shot"
