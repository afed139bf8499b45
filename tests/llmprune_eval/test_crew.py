from __future__ import annotations

import json
import math
import time

import pytest

from llmprune.recipe import Recipe
from llmprune_eval.compare import Extent, compare
from llmprune_eval.comparison import Comparison
from llmprune_eval.crew import Block, Crew, compute, known_table, pending, startable
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.stored_results import Result
from tests.llmprune_eval.test_compare import model_folder, recipe  # noqa: F401

METHODS = ["sequential_attention", "random", "magnitude", "flap"]


def a_recipe(**changes):
    data = {
        "model": {"source": "owner/tiny"},
        "calibration": {"dataset": "rows.txt"},
        "prune": {"mlp_channels": {}},
        "budget": {"sparsity": 0.25},
        "reconstruction": {"num_rows": 4},
        "recovery": {"steps": 2},
        "evaluation": {"perplexity": [{"dataset": "text.txt", "window": 16, "max_windows": 6}]},
    }
    return Recipe.parse(data | changes)


def a_result(value):
    return Result(Perplexity(value, 15, 1, 16, math.log(value), None, (math.log(value),)))


def block_of(extent, methods=METHODS, **changes):
    return Block("block", a_recipe(**changes), methods, extent)


def asked(figures):
    return [(one.recipe.method, one.stage, one.recipe.seed, one.windows) for one in figures]


def answer(figures, known, values):
    for one in figures:
        known[one.request] = a_result(values.get(one.recipe.method, 1.0))


def test_a_step_of_a_block_waits_for_the_figures_that_it_chooses_by():
    block = block_of(Extent(refit="best:1", recover="best:1", seeds=2, final_windows=0))
    known = {}
    first = pending(block, known)
    stages = ["dense", *["compensated"] * 4]
    assert [one.stage for one in first] == stages
    values = {"sequential_attention": 5.0, "random": 9.0, "magnitude": 8.0, "flap": 7.0}
    answer(first[:-1], known, values)
    assert asked(pending(block, known)) == [("flap", "compensated", 0, 6)]
    answer(first[-1:], known, values)
    second = pending(block, known)
    assert {one.recipe.method for one in second} == {"sequential_attention", "flap"}
    assert {one.stage for one in second} == {"refit"}
    answer(second, known, values)
    third = pending(block, known)
    assert {one.stage for one in third} == {"recovered"}
    answer(third, known, values)
    last = pending(block, known)
    seeds = {(m, s, 1, 6) for m in ("sequential_attention", "flap") for s in known_stages(block)}
    whole = {("sequential_attention", "recovered", 0, None), ("flap", "recovered", 0, None)}
    assert set(asked(last[:-3])) == seeds
    assert whole < set(asked(last))
    answer(last, known, values)
    assert pending(block, known) == []


def known_stages(block):
    return ("compensated", "refit", "recovered")


def test_figures_of_one_plan_are_handed_out_together_and_to_one_process_alone():
    block = block_of(Extent(refit="all", recover="all", seeds=2), ["sequential_attention", "flap"])
    known = {}
    while any(one.recipe.seed == 0 for one in pending(block, known)):
        answer(pending(block, known), known, {})
    offered = startable([block], known, [])
    assert [[one.stage for one in figures] for figures in offered] == [
        ["compensated", "refit", "recovered"]
    ] * 2
    assert offered[0][0].recipe.method == "sequential_attention"
    left = startable([block], known, [offered[0][1]])
    assert [figures[0].recipe.method for figures in left] == ["flap"]


def test_a_later_block_is_begun_while_the_first_waits():
    extent = Extent(refit="none")
    first, second = block_of(extent), block_of(extent, budget={"sparsity": 0.5})
    offered = startable([first, second], {}, [])
    assert {one.recipe.budget.sparsity for figures in offered for one in figures} == {0.25}
    busy = [one for figures in offered for one in figures]
    offered = startable([first, second], {}, busy)
    # the dense figure is the same in both
    assert all(figures[0].recipe.budget.sparsity == 0.5 for figures in offered)
    assert all(one.stage != "dense" for figures in offered for one in figures)


@pytest.mark.slow
def test_processes_side_by_side_find_what_one_finds(recipe, tmp_path):  # noqa: F811
    methods = ["sequential_attention", "random", "flap", "omp", "gradual"]
    extent = Extent(refit="best:2", recover="best:1", seeds=2, final_windows=0)
    alone = compare({"both": recipe}, tmp_path / "alone", methods, extent=extent)
    out = tmp_path / "out"
    (out / "results").mkdir(parents=True)
    block = Block("both", recipe, methods, extent)
    crew, known, told = Crew(2, out, block.recipes()), {}, []
    limits = {"until": time.monotonic() + 300, "at_most": time.monotonic() + 300}
    try:
        compute([block], crew, known, **limits, on_figure=lambda one, result: told.append(one))
    finally:
        crew.end()
    assert len({one.request for one in told}) == len(told) == len(known)
    assert figures(Comparison((known_table(block, known),))) == figures(alone)


def figures(comparison):
    """The figures without what differs from run to run."""
    return json.loads(
        comparison.to_json(),
        object_hook=lambda one: {k: v for k, v in one.items() if k != "seconds"},
    )


@pytest.mark.slow
def test_a_figure_that_fails_is_told_and_the_others_go_on(recipe, tmp_path):  # noqa: F811
    (tmp_path / "results").mkdir()
    missing = recipe.evaluation.perplexity[0].model_copy(update={"dataset": "no/such.txt"})
    parts = recipe.evaluation.model_copy(update={"perplexity": (missing,)})
    bad = Block("bad", recipe.model_copy(update={"evaluation": parts}), ["random"], Extent())
    good = Block("good", recipe, ["random"], Extent())
    crew, known = Crew(1, tmp_path, good.recipes()), {}
    limits = {"until": time.monotonic() + 300, "at_most": time.monotonic() + 300}
    try:
        compute([bad, good], crew, known, **limits, on_figure=lambda one, result: None)
    finally:
        crew.end()
    said = {result.refused for result in known.values() if result.refused}
    assert said
    assert all("no/such.txt" in one for one in said)
    assert known_table(good, known).rows[0].mean("refit") is not None


def test_after_the_deadline_nothing_is_begun():
    class Nobody:
        is_there = True
        at_work = ()

        def give(self, choices):
            raise AssertionError("work was handed out")

    block = block_of(Extent())
    now = time.monotonic()
    compute([block], Nobody(), {}, until=now - 1, at_most=now + 5, on_figure=lambda a, b: None)
