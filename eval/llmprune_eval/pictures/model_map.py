"""The map of a pruned model: what every layer keeps, from the first to the last."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune_eval.markup import Markup, element, join
from llmprune_eval.pictures.axes import (
    Scale,
    left_axis,
    line,
    numbered_columns,
    picture,
    rect,
    rects,
    text,
)
from llmprune_eval.pictures.kept_units import KeptModel, KeptUnits

_MLP_HEIGHT = 130.0
# Cells of a strip that are still told apart.
_MOST_CELLS = 160


def model_map(model: KeptModel, width: int) -> Markup:
    """Layers from left to right: heads in their KV groups above, the MLP's width below."""
    columns = _Columns(len(model.layers), width)
    heads, top = _heads(model, columns, 22.0)
    channels, top = _channels(model, columns, top + 34.0)
    parts = [text(0, 12, "attention: query heads in their KV groups", class_="strip"), heads]
    parts += [channels, numbered_columns(columns.count, columns.left, columns.right, top, "layer")]
    top += 34
    if not all(model.hidden_channels):
        strip, top = _strip(model.hidden_channels, columns, top + 26)
        parts.append(strip)
    gone = sum(not layer.is_there for layer in model.layers)
    label = (
        f"Map of {len(model.layers)} layers, {gone} of them removed: the heads and the MLP "
        "channels that each keeps; the table below has the numbers"
    )
    return picture(width, top + 4, label, *parts)


class _Columns:
    """Where every layer is drawn."""

    def __init__(self, count: int, width: int) -> None:
        self.count = count
        self.left, self.right = 46.0, float(width) - 2
        self.pitch = (self.right - self.left) / count
        self.width = max(1.0, self.pitch * (0.78 if self.pitch > 6 else 0.9))

    def x(self, index: int) -> float:
        """The left edge of a layer's column."""
        return self.left + index * self.pitch + (self.pitch - self.width) / 2


def _heads(model: KeptModel, columns: _Columns, top: float) -> tuple[Markup, float]:
    most = max(len(layer.heads) for layer in model.layers)
    cell = min(15.0, max(2.5, 168.0 / most), max(5.0, columns.width))
    tallest = max(_head_tops(layer, cell)[-1] + cell for layer in model.layers)
    parts = []
    for index, layer in enumerate(model.layers):
        x = columns.x(index)
        if not layer.attention:
            parts.append(_gone(x, top, columns.width, tallest, f"layer {index}: no attention"))
            continue
        boxes: dict[bool, list[tuple[float, float, float, float]]] = {True: [], False: []}
        for y, kept in zip(_head_tops(layer, cell), layer.heads, strict=True):
            boxes[kept].append((x, top + y, columns.width, cell - 1.2))
        words = (
            f"layer {index}: {sum(layer.heads)} of {len(layer.heads)} heads, "
            f"{sum(layer.kv_groups)} of {len(layer.kv_groups)} KV groups"
        )
        parts.append(
            element(
                "g",
                element("title", words),
                rects(boxes[False], "removed"),
                rects(boxes[True], "kept"),
            )
        )
    return join(parts), top + tallest


def _head_tops(layer: KeptUnits, cell: float) -> list[float]:
    """Where each head of a layer begins, in pixels; KV groups stand apart."""
    gap = min(4.0, 0.5 * cell) if layer.heads_per_group > 1 else 0.0
    return [head * cell + head // layer.heads_per_group * gap for head in range(len(layer.heads))]


def _channels(model: KeptModel, columns: _Columns, top: float) -> tuple[Markup, float]:
    most = max(len(layer.mlp_channels) for layer in model.layers)
    bottom = top + _MLP_HEIGHT
    scale = Scale(0.0, float(most), bottom, top)
    parts = [text(0, top - 10, f"MLP: channels kept, of {most:,} at most", class_="strip")]
    parts.append(left_axis(scale, columns.left, columns.right, most=4))
    for index, layer in enumerate(model.layers):
        x, all_, kept = columns.x(index), len(layer.mlp_channels), sum(layer.mlp_channels)
        if not layer.mlp:
            parts.append(_gone(x, top, columns.width, _MLP_HEIGHT, f"layer {index}: no MLP"))
            continue
        words = element("title", f"layer {index}: {kept:,} of {all_:,} channels")
        outline = rect(x, scale(all_), columns.width, bottom - scale(all_), "removed", rx="1.5")
        bar = rect(x, scale(kept), columns.width, bottom - scale(kept), "kept", rx="1.5")
        parts.append(element("g", words, outline, bar))
    return join(parts), bottom


def _gone(x: float, y: float, width: float, height: float, words: str) -> Markup:
    """A sublayer that is not there: an empty frame, struck through."""
    strokes = [rect(x, y, width, height, "gone", rx="1.5")]
    if width > 4:
        strokes.append(line(x, y + height, x + width, y, "gone"))
    return element("g", element("title", words), *strokes)


def _strip(mask: Sequence[bool], columns: _Columns, top: float) -> tuple[Markup, float]:
    """The hidden channels side by side; a cell is as strong as the share of it that is kept."""
    cells = min(len(mask), _MOST_CELLS)
    pitch = (columns.right - columns.left) / cells
    words = f"hidden channels: {sum(mask):,} of {len(mask):,} kept"
    parts = [text(0, top, words, class_="strip")]
    parts.append(rect(columns.left, top + 8, columns.right - columns.left, 20, "removed"))
    for index in range(cells):
        part = mask[index * len(mask) // cells : (index + 1) * len(mask) // cells]
        share = sum(part) / len(part)
        if share:
            x = columns.left + index * pitch
            opacity = f"{share:.2f}"
            parts.append(rect(x, top + 8, pitch, 20, "kept", fill_opacity=opacity))
    return join(parts), top + 30
