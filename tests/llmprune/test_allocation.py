from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.allocation import (
    MOST_LEVELS,
    Branch,
    LayerOptions,
    Problem,
    Stay,
    allocate,
    nearest_cost,
)

quick = settings(max_examples=80, deadline=None, derandomize=True)


def branch_of(rng, size, gone=None):
    """Losses fall and costs rise with the option; neither evenly."""
    losses = np.sort(rng.exponential(1.0, size))[::-1]
    costs = np.cumsum(rng.integers(1, 20, size)).astype(float)
    return Branch(losses, costs, gone)


def problem_of(seed, *, layers=3, tied=False, layers_go=False, branches_go=False, counts=None):
    rng = np.random.default_rng(seed)
    own = []
    sizes = rng.integers(1, 4), rng.integers(2, 5)
    for _ in range(layers):
        alone = [float(rng.exponential(3.0)) if branches_go else None for _ in range(2)]
        attention, mlp = (branch_of(rng, n, gone) for n, gone in zip(sizes, alone, strict=True))
        own.append(LayerOptions(attention, mlp, float(rng.exponential(5)) if layers_go else None))
    at_least_one = tuple(range(1, layers + 1))
    stay = Stay(at_least_one if layers_go else (layers,))
    sublayers = Stay(counts or at_least_one, most_alone=layers)
    return Problem(tuple(own), (stay, sublayers, sublayers), tied)


def every_choice(problem):
    """All choices that the rules allow, whatever they cost."""
    per_layer = []
    for layer in problem.layers:
        branches = [
            [*range(len(branch.costs)), *([None] if branch.gone is not None else [])]
            for branch in layer.branches
        ]
        per_layer.append(
            [*itertools.product(*branches), *([None] if layer.gone is not None else [])]
        )
    for choices in itertools.product(*per_layer):
        staying = [choice for choice in choices if choice is not None]
        counts = len(staying), *(sum(c[b] is not None for c in staying) for b in (0, 1))
        alone = 0, len(staying) - counts[1], len(staying) - counts[2]
        if any(
            n not in stay.counts or gone > stay.most_alone
            for n, gone, stay in zip(counts, alone, problem.stay, strict=True)
        ):
            continue
        same = all(len({c[b] for c in staying} - {None}) <= 1 for b in (0, 1))
        if same or not problem.tied:
            yield list(choices)


def least_loss(problem, lowest, highest):
    losses = [
        problem.loss(choices)
        for choices in every_choice(problem)
        if lowest - 1e-9 <= problem.cost(choices) <= highest + 1e-9
    ]
    return min(losses, default=None)


@quick
@given(
    seed=st.integers(0, 10_000),
    tied=st.booleans(),
    layers_go=st.booleans(),
    branches_go=st.booleans(),
    share=st.floats(0.1, 1.0),
)
def test_the_loss_is_the_least_that_brute_force_finds(seed, tied, layers_go, branches_go, share):
    problem = problem_of(seed, tied=tied, layers_go=layers_go, branches_go=branches_go)
    dense = sum(b.costs[-1] for layer in problem.layers for b in layer.branches)
    wanted, tolerance = share * dense, 0.05 * dense
    found = allocate(problem, wanted, tolerance)
    expected = least_loss(problem, wanted - tolerance, wanted)
    if expected is None:
        expected = least_loss(problem, wanted - tolerance, wanted + tolerance)
    if expected is None:
        assert found is None
        return
    assert found in list(every_choice(problem))
    assert problem.loss(found) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert abs(problem.cost(found) - wanted) <= tolerance * (1 + 1e-9)


@quick
@given(seed=st.integers(0, 10_000), tied=st.booleans(), share=st.floats(0.0, 1.2))
def test_the_nearest_cost_is_the_nearest_of_all(seed, tied, share):
    problem = problem_of(seed, tied=tied, layers_go=True)
    wanted = share * sum(b.costs[-1] for layer in problem.layers for b in layer.branches)
    costs = [problem.cost(choices) for choices in every_choice(problem)]
    found = nearest_cost(problem, wanted)
    assert abs(found - wanted) == pytest.approx(min(abs(cost - wanted) for cost in costs))


@quick
@given(seed=st.integers(0, 10_000), counts=st.sampled_from([(2,), (1, 3), (3,)]))
def test_sublayers_stay_in_the_numbers_that_are_allowed(seed, counts):
    problem = problem_of(seed, branches_go=True, counts=counts)
    found = allocate(problem, 60.0, 60.0)
    expected = least_loss(problem, 0.0, 60.0)
    if expected is None:
        return
    assert sum(choice[0] is not None for choice in found) in counts
    assert problem.loss(found) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def long_problem(*, tied, layers=4, size=1000):
    rng = np.random.default_rng(0)
    own = []
    for scale in range(1, layers + 1):
        importances = np.sort(rng.exponential(scale, size))
        losses = (importances.sum() - np.cumsum(importances[::-1])).clip(0)
        mlp = Branch(losses, 7.0 * np.arange(1, size + 1))
        own.append(LayerOptions(Branch(np.zeros(1), np.array([100.0])), mlp))
    stay = Stay((layers,))
    return Problem(tuple(own), (stay, stay, stay), tied)


@pytest.mark.parametrize("tied", [False, True])
def test_a_coarse_grid_is_filled_to_the_last_unit(tied):
    problem = long_problem(tied=tied)
    assert len(problem.layers[0].mlp.costs) > MOST_LEVELS
    wanted = 400 + 7.0 * 2222
    found = allocate(problem, wanted, 20.0)
    step = 28.0 if tied else 7.0
    assert wanted - step < problem.cost(found) <= wanted
    if tied:
        assert len({choice[1] for choice in found}) == 1
        return
    # the best that any choice can do: the largest importances of all layers, wherever they are
    gains = [np.diff(layer.mlp.losses) for layer in problem.layers]
    spared = np.sort(-np.concatenate(gains))[::-1][: 2222 - 4].sum()
    least = sum(layer.mlp.losses[0] for layer in problem.layers) - spared
    assert problem.loss(found) == pytest.approx(least, rel=1e-3)


def test_layers_of_more_importance_keep_more():
    found = allocate(long_problem(tied=False), 400 + 7.0 * 2000, 10.0)
    sizes = [choice[1] for choice in found]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0] + 100


def test_what_nothing_fits_is_none():
    problem = problem_of(0)
    dense = sum(b.costs[-1] for layer in problem.layers for b in layer.branches)
    assert allocate(problem, 2 * dense, 0.01 * dense) is None
    assert allocate(problem, -1.0, 0.5) is None
    assert math.isclose(nearest_cost(problem, 2 * dense), dense)
