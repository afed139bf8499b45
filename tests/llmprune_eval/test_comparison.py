"""Tables of a comparison, from results by hand."""

from __future__ import annotations

from llmprune_eval.comparison import BlockTable, Comparison, Row, Seeded
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.stored_results import Result


def result_on(device):
    found = Perplexity(20.0, 33, 3, 12, 3.0, 0.1, (2.9, 3.0, 3.1))
    return Result(found, environment={"device": device, "date": "2026-01-02"})


def comparison_of(*devices):
    """The dense model and a method for every further device."""
    first, *others = map(result_on, devices)
    rows = tuple(
        Row(f"m{index}", f"method {index}", False, {"compensated": Seeded((result,))})
        for index, result in enumerate(others)
    )
    block = BlockTable("half", "wiki", False, "rows", "a quarter", first, None, rows)
    return Comparison((block,), "")


def test_figures_of_several_devices_are_told_apart():
    text = comparison_of("one", "one", "another").to_markdown()
    assert (
        "- several devices, seconds compare only within one; on one: dense, method 0; on another: "
        "method 1." in text
    )
    assert "several devices" not in comparison_of("one", "one").to_markdown()
