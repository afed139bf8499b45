"""A page of one file: sections, tables and figures around the template's markup and style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from string import Template

from llmprune_eval.markup import Markup, element, escape, join

_TEMPLATE = "report_template.html"
# Pixels of a picture on a wide page and on a phone: two drawings, so that text keeps its size.
WIDE, NARROW = 800, 340

Cells = Sequence[str]


def page(title: str, body: Markup) -> str:
    """The whole file."""
    template = resources.files("llmprune_eval").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=body)


def section(heading: str, *parts: str) -> Markup:
    """A section with its heading; an anchor of the same words leads to it."""
    anchor = "-".join(heading.lower().split())
    return element("section", element("h2", heading, id=anchor), *parts, aria_labelledby=anchor)


def paragraph(*words: str, class_: str | None = None) -> Markup:
    """A paragraph."""
    return element("p", *words, class_=class_)


def absent(sentence: str) -> Markup:
    """What stands in the place of a part that a run does not have."""
    return paragraph(sentence, class_="absent")


def table(caption: str, head: Cells, rows: Sequence[Cells]) -> Markup:
    """A table, its first column heading the rows; all other columns are figures.

    Args:
        caption: What it holds.
        head: Of the columns; empty where there are only facts to name.
        rows: As many cells each.
    """
    inside = [element("caption", caption)]
    if head:
        heads = (element("th", cell, scope="col") for cell in head)
        inside.append(element("thead", element("tr", *heads)))
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    inside.append(element("tbody", *lines))
    # a table wider than a phone is scrolled by itself, with the keyboard, too
    return element(
        "div",
        element("table", *inside),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def folded(summary: str, *parts: str) -> Markup:
    """Parts that are shown when one asks for them."""
    return element("details", element("summary", summary), *parts)


def figure(draw: Callable[[int], Markup], caption: str, *below: str) -> Markup:
    """A picture, drawn for a wide page and for a phone, with its caption and its figures."""
    both = (
        element("div", draw(WIDE), class_="wide"),
        element("div", draw(NARROW), class_="narrow"),
    )
    return element("figure", *both, element("figcaption", caption), *below)


def small_figure(draw: Callable[[int], Markup], heading: str) -> Markup:
    """A picture that is narrow everywhere, under a heading; for `side_by_side`."""
    return element("div", element("h3", heading), draw(NARROW), class_="cell")


def side_by_side(cells: Sequence[Markup]) -> Markup:
    """Cells in columns, as many as fit."""
    return element("div", *cells, class_="cells")


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """What the marks mean: pairs of a class of the style sheet and words."""
    items = []
    for class_, words in entries:
        swatch = element(
            "svg",
            element("rect", x=1.5, y=1.5, width=13, height=13, rx=2, class_=class_),
            width=16,
            height=16,
            aria_hidden="true",
        )
        items.append(element("li", swatch, words))
    return element("ul", join(items), class_="legend")


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"
