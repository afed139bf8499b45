"""Markup: HTML and SVG elements from Python; text is escaped unless it is Markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable

# Elements of HTML that hold nothing and are never closed.
_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta", "wbr"})


class Markup(str):
    """Text that is markup: it goes into an element as it is."""


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element; children that are not `Markup` are escaped.

    Args:
        name: `p`, `svg`, ...
        children: Its content.
        attributes: A trailing underscore is dropped (`class_`), an underscore becomes a dash
            (`aria_label`); None leaves the attribute out. Numbers are written short.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str], separator: str = "") -> Markup:
    """Children one after another, escaped where they are not `Markup`."""
    return Markup(separator.join(escape(child) for child in children))


def escape(text: str) -> Markup:
    """Text as markup that shows it; `Markup` stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def _short(value: str | float) -> str:
    """A number with a tenth of a pixel at most; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
