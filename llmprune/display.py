"""What the command line shows: progress with time left, and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from llmprune.cost import Cost
    from llmprune.estimate import Estimate
    from llmprune.export import Exported
    from llmprune.latency import Promise
    from llmprune.publication import Upload
    from llmprune.replanning import Replanned
    from llmprune.run_steps import OnProgress
    from llmprune.units import UnitMap
    from llmprune.weight_blocks import BlockedProjection, BlockMap


@contextmanager
def progress_bars(console: Console) -> Iterator[OnProgress]:
    """Bars with time left, one a task; a line per tenth where the output is no terminal."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description:34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = progress.add_task(task, total=total)
            progress.update(tasks[task], completed=done, total=total)

        yield show


class _Lines:
    """Progress as lines of text, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started: dict[str, float] = {}
        self.shown: dict[str, int] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        now = self.console.get_time()
        begun = self.started.setdefault(task, now)
        tenth = 10 * done // max(1, total)
        if self.shown.get(task) == tenth:
            return
        self.shown[task] = tenth
        spent = now - begun
        left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        line = f"{task}: {done}/{total} after {spent:.0f} s{left}"
        self.console.print(line, highlight=False, soft_wrap=True)


def unit_rows(unit_map: UnitMap) -> list[dict[str, Any]]:
    """One row per kind: what can be removed, how many, what each takes along."""
    from llmprune.cost import measure_cost
    from llmprune.recipe import UNIT_KINDS
    from llmprune.units import unit_parameters

    cost = measure_cost(unit_map)
    rows = []
    for kind in UNIT_KINDS:
        groups = unit_map.of_kind(kind)
        each = unit_parameters(unit_map, groups[0])
        total = sum(unit_parameters(unit_map, group) * group.num_units for group in groups)
        inside = sum(
            unit_parameters(unit_map, group, of="decoder") * group.num_units for group in groups
        )
        rows.append(
            {
                "kind": kind,
                "groups": len(groups),
                "units_per_group": [group.num_units for group in groups],
                "parameters_per_unit": each,
                "parameters": total,
                "share_of_decoder": inside / cost.decoder_parameters,
                "share_of_model": total / cost.parameters,
            }
        )
    return rows


def inspect_table(unit_map: UnitMap, name: str) -> Table:
    """`unit_rows` as a table."""
    from llmprune.cost import measure_cost

    cost = measure_cost(unit_map)
    table = Table(
        title=f"{name}: {cost.parameters:,} parameters, "
        f"{cost.decoder_parameters:,} of them in {unit_map.num_layers} decoder layers",
        caption="each: parameters that go with one unit. Kinds overlap: a layer holds heads and "
        "channels. A head's share counts its query "
        "and output weights; its key and value go with the KV group.",
        caption_justify="left",
    )
    table.add_column("kind", no_wrap=True)
    for column in ("units", "each", "in all", "of decoder", "of model"):
        table.add_column(column, justify="right")
    for row in unit_rows(unit_map):
        table.add_row(
            row["kind"],
            _count(row["units_per_group"]),
            _short(row["parameters_per_unit"]),
            _short(row["parameters"]),
            f"{row['share_of_decoder']:.1%}",
            f"{row['share_of_model']:.1%}",
        )
    return table


def layer_table(unit_map: UnitMap) -> Table:
    """Units of every kind, layer by layer."""
    table = Table(title="units per layer")
    kinds = ("heads", "kv_groups", "mlp_channels")
    for column in ("layer", *kinds, "parameters"):
        table.add_column(column, justify="right")
    from llmprune.units import unit_parameters

    layers = unit_map.groups["layers"]
    for index in range(unit_map.num_layers):
        counts = [str(unit_map.groups[f"layers.{index}.{kind}"].num_units) for kind in kinds]
        one = type(layers)("layers", None, 1, whole=(layers.whole[index],))
        table.add_row(str(index), *counts, f"{unit_parameters(unit_map, one):,}")
    return table


def estimate_table(estimate: Estimate) -> Table:
    """What a run will leave and need."""
    table = Table(title="dry run: nothing is trained or written")
    for column in ("", "dense", "planned", "planned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, count in estimate.targets.counts.items():
        dense = _dense_count(estimate.unit_map, kind)
        unit = " per KV group" if kind == "heads" and dense != count and _grouped(estimate) else ""
        mean = " (mean)" if kind in estimate.targets.across else ""
        table.add_row(f"{kind}{unit}{mean}", f"{dense:,}", f"{count:,}", f"{count / dense:.3f}")
    _add_costs(table, estimate.dense, estimate.pruned, estimate.promise)
    table.add_section()
    table.add_row("memory, about", "", f"{estimate.peak_bytes / 2**30:.1f} GiB", "")
    table.add_row("time, about", "", f"{estimate.seconds / 60:.0f} min", "")
    return table


def plan_table(found: Replanned) -> Table:
    """The shape and the costs of a plan beside the dense model's."""
    table = Table(title="planned: nothing is trained or cut")
    for column in ("", "dense", "planned", "planned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    shapes = found.unit_map.dense, found.widths
    table.add_row("layers", *(str(len(shape.kept_layers)) for shape in shapes))
    table.add_row("hidden size", *(f"{shape.hidden_size:,}" for shape in shapes))
    columns = {
        "heads a layer": ("num_attention_heads", "attention"),
        "KV groups a layer": ("num_key_value_heads", "attention"),
        "MLP channels a layer": ("intermediate_size", "mlp"),
    }
    for label, (name, branch) in columns.items():
        counts = [
            [getattr(layer, name) for layer in shape.kept_layers if getattr(layer, branch)]
            for shape in shapes
        ]
        table.add_row(label, *(_span(column) for column in counts))
    table.add_section()
    _add_costs(table, found.dense, found.pruned, found.promise)
    return table


def block_table(block_map: BlockMap, title: str) -> Table:
    """Which projections are pruned in which blocks, and how many of them stay."""
    table = Table(title=title)
    for column in ("projection", "of them", "weight", "block", "blocks", "kept", "density"):
        table.add_column(column, justify="left" if column == "projection" else "right")
    alike: dict[Any, list[BlockedProjection]] = {}
    for name, one in block_map.projections.items():
        key = (name.rpartition(".")[2], one.out_features, one.in_features, one.block)
        alike.setdefault(key, []).append(one)
    for (kind, out_features, in_features, block), projections in alike.items():
        blocks = sum(one.num_blocks for one in projections)
        kept = sum(one.num_kept for one in projections)
        sizes = f"{out_features} x {in_features}", f"{block[0]} x {block[1]}"
        counts = f"{blocks:,}", f"{kept:,}", f"{kept / blocks:.3f}"
        table.add_row(kind, str(len(projections)), *sizes, *counts)
    table.add_section()
    table.add_row("all", str(len(block_map.projections)), *[""] * 4, f"{block_map.density:.3f}")
    return table


def _add_costs(table: Table, dense: Cost, pruned: Cost, promise: Promise | None) -> None:
    for name in ("parameters", "decoder_parameters", "flops", "kv_bytes"):
        before, after = getattr(dense, name), getattr(pruned, name)
        label = {"flops": "FLOPs a token", "kv_bytes": "KV bytes a token"}.get(name, name)
        table.add_row(label.replace("_", " "), f"{before:,}", f"{after:,}", f"{after / before:.4f}")
    if promise is not None:
        budget = promise.budget
        label = f"{budget.phase} of {budget.batch_size} x {budget.context} tokens"
        cells = f"{promise.dense_ms:.1f} ms", f"{promise.pruned_ms:.1f} ms"
        table.add_row(label, *cells, f"{promise.pruned_ms / promise.dense_ms:.4f}")


def _span(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def upload_table(uploads: Sequence[Upload], left_out: Sequence[str], repo: str) -> Table:
    """What goes where, how large; what stays."""
    caption = f"stays here: {', '.join(left_out)}" if left_out else None
    table = Table(title=f"to {repo}", caption=caption, caption_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for upload in uploads:
        table.add_row(upload.path, f"{upload.size:,}", upload.note)
    table.add_section()
    table.add_row(f"{len(uploads)} files", f"{sum(upload.size for upload in uploads):,}", "")
    return table


def export_line(result: Exported) -> str:
    """What was written, what its zeros cost, and how equal it is."""
    line = f"wrote {result.path}: {result.architecture}, {result.parameters:,} parameters"
    added = result.parameters - result.source_parameters
    if added > 0:
        share = added / result.source_parameters
        line += f" ({added:,} of them zeros that this form needs, {share:.1%} on top)"
    line += f", {result.size_bytes / 1e6:.1f} MB"
    if result.max_abs_difference is not None:
        line += f"; max abs logit difference from the source {result.max_abs_difference:.1e}"
    return line


def to_json(data: Any) -> str:
    """Indented JSON."""
    return json.dumps(data, indent=2)


def _grouped(estimate: Estimate) -> bool:
    layer = estimate.unit_map.layer(0)
    return layer.num_attention_heads != layer.num_key_value_heads


def _dense_count(unit_map: UnitMap, kind: Any) -> int:
    layer = unit_map.layer(0)
    if kind == "heads" and layer.num_attention_heads != layer.num_key_value_heads:
        return layer.num_attention_heads // layer.num_key_value_heads
    return int(unit_map.of_kind(kind)[0].num_units)


def _short(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1e6 else f"{count:,}"


def _count(per_group: list[int]) -> str:
    if len(per_group) == 1:
        return str(per_group[0])
    low, high = min(per_group), max(per_group)
    return f"{len(per_group)} x {low}" if low == high else f"{len(per_group)} x {low}..{high}"
