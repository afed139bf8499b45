"""With costs; without them the gates are tested beside the engine."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.capped_softmax import capped_softmax, fill

quick = settings(max_examples=60, deadline=None, derandomize=True)
units = st.lists(
    st.tuples(st.floats(-20, 20, width=32), st.floats(0.125, 50, width=32)),
    min_size=1,
    max_size=10,
)


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def split(pairs):
    return vector([logit for logit, _ in pairs]), vector([cost for _, cost in pairs])


# gates


@quick
@given(units, st.floats(0.01, 0.999))
def test_gates_times_costs_sum_to_the_budget(pairs, share):
    logits, costs = split(pairs)
    budget = share * float(costs.sum())
    gates = capped_softmax(logits, budget, costs)
    assert float((gates * costs).sum()) == pytest.approx(budget, rel=1e-9)
    assert (gates >= 0).all()
    assert float(gates.max()) <= 1 + 1e-12


@quick
@given(units, st.floats(0.01, 0.999))
def test_gates_are_one_or_share_one_factor_whatever_the_costs(pairs, share):
    """The definition: min(1, exp(L - tau)) with a single tau."""
    logits, costs = split(pairs)
    gates = capped_softmax(logits, share * float(costs.sum()), costs)
    below = gates < 1 - 1e-9
    taus = logits[below] - gates[below].log()
    if len(taus):
        assert float(taus.max() - taus.min()) < 1e-6
        assert (logits[~below] >= float(taus.min()) - 1e-6).all()


@quick
@given(units, st.floats(0.01, 0.999))
def test_costs_of_one_change_nothing(pairs, share):
    logits, _ = split(pairs)
    budget = share * len(logits)
    priced = capped_softmax(logits, budget, torch.ones(len(logits)))
    assert torch.equal(priced, capped_softmax(logits, budget))


def test_a_unit_of_cost_two_is_two_equal_units_of_cost_one():
    logits = vector([0.4, 0.1, -0.3])
    for budget in (0.7, 1.5, 2.6, 3.4):
        priced = capped_softmax(logits, budget, vector([1, 2, 1]))
        split_up = capped_softmax(logits[[0, 1, 1, 2]], budget)
        torch.testing.assert_close(priced[[0, 1, 1, 2]], split_up)


@pytest.mark.parametrize("budget", [7.0, 7.5, float("inf")])
def test_a_budget_that_pays_for_all_opens_every_gate_exactly(budget):
    logits = torch.tensor([3.0, -2.0, 0.5], requires_grad=True)
    gates = capped_softmax(logits, budget, torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(gates, torch.ones(3))
    gates.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(3))


@pytest.mark.parametrize("cost", [0.1, 0.7, 7.7])
def test_a_budget_that_whole_units_use_up_opens_them_and_no_other(cost):
    """Where rounding alone decides whether the last of them saturates."""
    for size in range(2, 9):
        logits = 60 * vector(range(size, 0, -1))
        for count in range(1, size):
            gates = capped_softmax(logits, cost * count, vector([cost] * size))
            expected = torch.cat([torch.ones(count), torch.zeros(size - count)]).double()
            torch.testing.assert_close(gates, expected, atol=1e-6, rtol=0)


def test_equal_logits_get_equal_gates_whatever_the_costs():
    gates = capped_softmax(torch.zeros(4), 5.0, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(gates, torch.full((4,), 0.5))


@pytest.mark.parametrize("budget", [0.3, 1.0, 4.0, 9.5, 14.0])
def test_the_gradient_is_right(budget):
    torch.manual_seed(3)
    costs = vector([1, 2, 5, 1, 3, 4])
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: capped_softmax(values, budget, costs), logits)


def test_far_logits_and_costs_of_model_size_keep_to_the_budget_in_float32():
    logits = torch.tensor([300.0, -300.0, 0.0, 30.0], requires_grad=True)
    costs = torch.tensor([7e8, 3e8, 2e9, 1e9])
    gates = capped_softmax(logits, 2.7e9, costs)
    assert gates.tolist() == pytest.approx([1.0, 0.0, 0.5, 1.0], abs=1e-6)
    gates.sum().backward()
    assert torch.isfinite(logits.grad).all()


# filling


def best_by_hand(values, budget, costs):
    """Largest first, of equal ones the first; passing over what no longer fits."""
    chosen, left = [], budget
    for unit in sorted(range(len(values)), key=lambda i: (-values[i], i)):
        if costs[unit] <= left:
            left -= costs[unit]
            chosen.append(unit)
    return sorted(chosen)


@quick
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=9),
    st.integers(0, 60),
)
def test_a_budget_is_filled_by_value_and_passes_over_what_no_longer_fits(pairs, budget):
    values, costs = split(pairs)
    chosen = fill(values, budget, costs)
    assert chosen.nonzero().flatten().tolist() == best_by_hand(values, budget, costs)
    spent = float(costs[chosen].sum())
    assert spent <= budget
    assert (costs[~chosen] > budget - spent).all()


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 12))
def test_without_costs_a_budget_is_a_count(values, budget):
    chosen = fill(vector(values), budget)
    assert torch.equal(chosen, fill(vector(values), budget, torch.ones(len(values))))
    assert int(chosen.sum()) == min(budget, len(values))


def test_minus_infinity_is_never_chosen():
    values = vector([1.0, -torch.inf, 0.0])
    for costs in (None, torch.ones(3)):
        assert fill(values, 3, costs).tolist() == [True, False, True]


def test_rounding_errors_of_sums_cost_no_unit():
    for count in range(1, 60):
        costs = torch.full((count,), 0.1, dtype=torch.float64)
        assert fill(torch.zeros(count), float(sum(costs.tolist())), costs).all()
        assert fill(torch.zeros(count), 0.1 * count, costs).all()


def test_with_equal_costs_a_larger_budget_only_adds():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    masks = [fill(values, budget, torch.full((12,), 3.0)) for budget in range(3, 37)]
    for smaller, larger in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()
