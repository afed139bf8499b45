from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmprune.capped_softmax import capped_softmax
from llmprune.least_squares import LeastSquares, group_ompr
from llmprune.sequential_attention import (
    Group,
    Phase,
    Schedule,
    SequentialAttention,
    attention,
    sparsity_at,
)

quick = settings(max_examples=200, deadline=None, derandomize=True)
logit = st.floats(-20, 20, width=32)
logit_lists = st.lists(logit, min_size=1, max_size=12)


def vector(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def alive(*flags):
    return torch.tensor(flags, dtype=torch.bool)


def test_sparsity_begins_at_nothing_and_ends_at_the_target():
    """T12."""
    for final in (0.1, 0.5, 0.97):
        assert sparsity_at(0.0, final) == 0
        assert sparsity_at(1.0, final) == pytest.approx(final, rel=1e-12)


def test_sparsity_follows_the_published_curve():
    # 1 - (1 - e^-4t) / (1 - e^-4) of the way is left, fast first
    assert sparsity_at(0.5, 0.8) == pytest.approx(0.8 * 0.880797, rel=1e-6)
    curve = [sparsity_at(t / 10, 0.5) for t in range(11)]
    steps = [after - before for before, after in itertools.pairwise(curve)]
    assert all(earlier > later > 0 for earlier, later in itertools.pairwise(steps))


# attention: the paper's A


@pytest.mark.parametrize("num_units", [1, 7, 41, 49, 1536])
def test_attention_is_one_everywhere_at_equal_logits(num_units):
    """T1: exactly, so that a gated model is bit-equal to the one without gates."""
    keep_mask = torch.ones(num_units, dtype=torch.bool)
    for value in (0.0, 3.0):
        for costs in (None, torch.rand(num_units) + 0.1):
            gates = attention(torch.full((num_units,), value), keep_mask, 0.5, costs)
            assert torch.equal(gates, torch.ones(num_units))
            some = torch.arange(num_units) % 3 == 0
            gates = attention(torch.full((num_units,), value), some, 0.5, costs)
            assert torch.equal(gates, some.float())


def test_attention_with_costs_shares_out_the_cost_of_the_living():
    costs = vector([1, 2, 4, 1, 3])
    logits, keep_mask = vector([0.3, -0.2, 5.0, 0.1, 0.0]), alive(1, 1, 0, 1, 1)
    gates = attention(logits, keep_mask, 0.01, costs)
    assert float((costs * gates).sum()) == pytest.approx(7.0, rel=1e-12)
    torch.testing.assert_close((gates / gates[0])[keep_mask], (logits - logits[0]).exp()[keep_mask])
    unit = attention(logits, keep_mask, 0.01, torch.ones(5))
    torch.testing.assert_close(unit, attention(logits, keep_mask, 0.01))


def test_attention_has_mean_one_over_the_living():
    """T1."""
    logits = vector([0.3, -0.2, 5.0, 0.1, 0.0])
    keep_mask = alive(1, 1, 0, 1, 1)
    gates = attention(logits, keep_mask, 0.2)
    assert gates[2] == 0
    assert float(gates[keep_mask].mean()) == pytest.approx(1.0, rel=1e-12)


def test_attention_is_clipped_to_the_density_and_its_inverse():
    gates = attention(vector([9.0, 0.0, -9.0, 0.0]), torch.ones(4, dtype=torch.bool), 0.5)
    assert gates.tolist() == [2.0, 0.5, 0.5, 0.5]


def test_the_gradient_of_a_logit_is_its_own_signal_less_its_share_of_all():
    """dl/dL_i = s_i - A_i / n * sum_j s_j with s_i = A_i dl/dA_i."""
    torch.manual_seed(0)
    keep_mask = alive(1, 1, 0, 1, 1, 1)
    logits = (0.3 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(6, dtype=torch.float64)

    def loss(values):
        return (attention(values, keep_mask, 0.1) * weights).sin().sum()

    loss(logits).backward()
    gates = attention(logits.detach(), keep_mask, 0.1)
    signal = gates * weights * (gates * weights).cos()
    formula = (signal - gates / keep_mask.sum() * signal.sum()) * keep_mask
    torch.testing.assert_close(logits.grad, formula, atol=1e-12, rtol=0)
    for index in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[index] = 1e-6
        slope = (loss(logits.detach() + step) - loss(logits.detach() - step)) / 2e-6
        assert float(formula[index]) == pytest.approx(float(slope), abs=1e-8)


# capped_softmax


@quick
@given(logit_lists, st.floats(0.01, 1.0))
@example([0.0], 0.5)
@example([5.0, 5.0, 5.0], 2 / 3)
@example([20.0, -20.0, -20.0, 20.0], 0.5)
def test_capped_gates_sum_to_the_budget_and_lie_between_0_and_1(values, share):
    budget = share * len(values)
    gates = capped_softmax(vector(values), budget)
    assert float(gates.sum()) == pytest.approx(budget, rel=1e-9)
    assert float(gates.min()) > 0
    assert float(gates.max()) <= 1 + 1e-12


@quick
@given(logit_lists)
def test_at_full_budget_capped_gates_are_exactly_one(values):
    ones = torch.ones(len(values), dtype=torch.float64)
    assert torch.equal(capped_softmax(vector(values), len(values)), ones)
    assert torch.equal(capped_softmax(vector(values), float(len(values))), ones)


@quick
@given(logit_lists, st.floats(0.05, 0.95))
def test_a_larger_logit_never_has_a_smaller_gate(values, share):
    gates = capped_softmax(vector(values), share * len(values)).tolist()
    for (one, gate), (two, other) in itertools.combinations(zip(values, gates, strict=True), 2):
        if one < two:
            assert gate <= other
        if one == two:
            assert gate == pytest.approx(other, rel=1e-12)


@quick
@given(logit_lists, st.floats(0.05, 0.95), st.integers(0, 11), st.floats(0.01, 5))
def test_raising_a_logit_never_lowers_its_gate(values, share, index, rise):
    index %= len(values)
    budget = share * len(values)
    before = capped_softmax(vector(values), budget)
    values[index] += rise
    after = capped_softmax(vector(values), budget)
    assert float(after[index]) >= float(before[index]) - 1e-12


@quick
@given(logit_lists, st.floats(0.05, 0.95), st.floats(-50, 50))
def test_capped_gates_ignore_a_shift_of_all_logits(values, share, shift):
    budget = share * len(values)
    before, after = (capped_softmax(vector(values) + by, budget) for by in (0.0, shift))
    torch.testing.assert_close(before, after, atol=1e-9, rtol=1e-9)


@quick
@given(logit_lists, st.floats(0.05, 0.95), st.randoms(use_true_random=False))
def test_capped_gates_follow_a_permutation(values, share, random):
    order = list(range(len(values)))
    random.shuffle(order)
    budget = share * len(values)
    direct = capped_softmax(vector(values), budget)[order]
    permuted = capped_softmax(vector(values)[order], budget)
    torch.testing.assert_close(direct, permuted, atol=1e-12, rtol=1e-12)


def test_capped_gates_are_a_softmax_times_the_budget_while_none_saturates():
    logits = vector([0.1, -0.1, 0.0, 0.05])
    expected = 2 * torch.softmax(logits, 0)
    torch.testing.assert_close(capped_softmax(logits, 2.0), expected)


def test_saturated_units_are_at_one_and_the_others_share_the_rest():
    logits = vector([3.0, 0.2, 0.1, 2.0, 0.0])
    gates = capped_softmax(logits, 2.7)
    rest = 0.7 * torch.softmax(logits[[1, 2, 4]], 0)
    torch.testing.assert_close(gates[[1, 2, 4]], rest)
    assert gates[[0, 3]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("budget", [0.4, 1.0, 1.7, 2.5, 4.2, 5.0])
def test_the_gradient_of_capped_gates_is_right(budget):
    torch.manual_seed(3)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: capped_softmax(values, budget), logits)


def test_a_logit_without_say_has_gradient_zero_not_none():
    logits = torch.randn(4, requires_grad=True)
    capped_softmax(logits, 4).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(4))


def test_a_saturated_unit_has_gradient_zero():
    logits = vector([9.0, 0.1, 0.0]).requires_grad_()
    (capped_softmax(logits, 1.5) * vector([1.0, 2.0, 3.0])).sum().backward()
    assert logits.grad[0] == 0
    assert logits.grad[1] < 0 < logits.grad[2]


def test_far_logits_in_float32_give_finite_gates_that_meet_the_budget():
    logits = torch.tensor([900.0, -900.0, 0.0, 30.0], requires_grad=True)
    gates = capped_softmax(logits, 2.5)
    assert gates.tolist() == pytest.approx([1.0, 0.0, 0.5, 1.0], abs=1e-6)
    gates.sum().backward()
    assert torch.isfinite(logits.grad).all()


# schedules


@quick
@given(
    st.integers(0, 300),
    st.tuples(*[st.integers(0, 10)] * 3).filter(any),
    st.integers(1, 7),
)
def test_phases_share_out_every_step(num_steps, shares, cycles):
    dense, sparsify, sparse = (share / sum(shares) for share in shares)
    schedule = Schedule.of_cycles(
        num_steps, dense=dense, sparsify=sparsify, sparse=sparse, cycles=cycles
    )
    assert schedule.num_steps == num_steps
    assert all(phase.num_steps > 0 for phase in schedule.phases)
    moments = [schedule.at(step) for step in range(num_steps)]
    starts = [moment.phase for moment in moments if moment.begins_phase]
    assert starts == list(range(len(schedule.phases)))
    assert all(0 < moment.progress <= 1 for moment in moments)
    ends = [m for m, after in itertools.pairwise(moments) if m.phase != after.phase]
    assert all(moment.progress == 1 for moment in ends + moments[-1:])


def test_cycles_repeat_dense_sparsify_sparse():
    schedule = Schedule.of_cycles(20, dense=0.2, sparsify=0.5, sparse=0.3, cycles=2)
    expected = [("dense", 2), ("sparsify", 5), ("sparse", 3)] * 2
    assert [(phase.kind, phase.num_steps) for phase in schedule.phases] == expected
    assert schedule.at(7).kind == "sparse"
    assert schedule.at(6).progress == 1.0


@pytest.mark.parametrize("step", [-1, 20])
def test_a_step_outside_the_schedule_is_an_error(step):
    with pytest.raises(IndexError, match="steps 0 to 19"):
        Schedule.of_cycles(20, dense=0, sparsify=1, sparse=0).at(step)


@pytest.mark.parametrize(("num_units", "num_kept"), [(4, 0), (4, 5), (4, -1)])
def test_a_group_keeps_between_one_and_all(num_units, num_kept):
    with pytest.raises(ValueError, match=f"between 1 and 4 units, got {num_kept}"):
        Group(num_units, num_kept)


# the engine


def cycles(num_steps, number=1):
    return Schedule.of_cycles(num_steps, dense=0.2, sparsify=0.6, sparse=0.2, cycles=number)


def run(engine, steps=None, seed=0):
    """Walk through the schedule while the logits wander; masks after every step."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for step in range(engine.schedule.num_steps) if steps is None else steps:
        if engine.variant == "magnitude":
            # its logits are whatever was handed in
            engine.set_scores([logits.clone() for logits in engine.logits])
        engine.gates(step)
        masks.append([mask.clone() for mask in engine.keep_masks])
        for logits in engine.logits:
            logits.data += 0.3 * torch.randn(logits.shape, generator=generator)
    return masks


@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
def test_survivors_are_exactly_as_many_as_asked_for_whatever_the_sizes(variant):
    """T11, for the engine that removes."""
    groups = [Group(n, k) for n in range(1, 14) for k in range(1, n + 1)]
    engine = SequentialAttention(groups, cycles(11), variant=variant)
    run(engine)
    assert [int(mask.sum()) for mask in engine.survivors()] == [g.num_kept for g in groups]
    if variant == "plus_plus":
        assert [int(mask.sum()) for mask in engine.keep_masks] == [g.num_kept for g in groups]
    scales = engine.scales()
    for keep_mask, scale in zip(engine.survivors(), scales, strict=True):
        assert torch.equal(scale > 0, keep_mask)


@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
@pytest.mark.parametrize("shares", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0, 0, 0)])
def test_survivors_are_exactly_as_many_whatever_the_phases(variant, shares):
    dense, sparsify, sparse = shares
    num_steps = 6 if any(shares) else 0
    schedule = Schedule.of_cycles(num_steps, dense=dense, sparsify=sparsify, sparse=sparse)
    engine = SequentialAttention([Group(9, 4), Group(3, 3)], schedule, variant=variant)
    run(engine)
    assert [int(mask.sum()) for mask in engine.survivors()] == [4, 3]


def test_paper_masks_are_nested_while_sparsifying_and_within_the_budget():
    """T12."""
    groups = [Group(40, 13), Group(7, 2), Group(5, 5)]
    schedule = cycles(60, number=3)
    engine = SequentialAttention(groups, schedule, variant="plus_plus")
    masks = run(engine)
    for step in range(60):
        moment = schedule.at(step)
        for group, mask in zip(groups, masks[step], strict=True):
            if moment.kind == "dense":
                assert mask.all()
            if moment.kind == "sparsify":
                assert int(mask.sum()) == math.ceil(group.budget_at(moment.progress) - 1e-9)
            if moment.kind == "sparse":
                assert int(mask.sum()) == group.num_kept
        if moment.kind != "dense" and step:
            for mask, before in zip(masks[step], masks[step - 1], strict=True):
                assert not (mask & ~before).any()


def test_units_can_come_back_in_a_dense_phase():
    """T12."""
    engine = SequentialAttention([Group(30, 10)], cycles(40, number=2), variant="plus_plus")
    masks = run(engine)
    ends_first, ends_second = masks[19][0], masks[39][0]
    assert int(ends_first.sum()) == int(ends_second.sum()) == 10
    assert (ends_second & ~ends_first).any()
    # who came back and stayed did not leave for good
    assert torch.equal(engine.dropped_at[0] == -1, ends_second)


def test_the_lowest_logits_leave_first_and_the_step_is_noted():
    schedule = Schedule((Phase("sparsify", 4), Phase("sparse", 1)))
    engine = SequentialAttention([Group(4, 1)], schedule, variant="plus_plus")
    engine.logits[0].data = torch.tensor([0.3, 0.0, 0.2, 0.1])
    for step in range(5):
        engine.gates(step)
    left = engine.dropped_at[0].tolist()
    assert left[0] == -1
    assert left[1] <= left[3] <= left[2]
    assert left[1] == 0
    assert engine.survivors()[0].tolist() == [True, False, False, False]


def test_a_unit_that_left_gets_gate_zero_and_no_gradient():
    schedule = Schedule((Phase("sparsify", 1), Phase("sparse", 1)))
    engine = SequentialAttention([Group(4, 2)], schedule, variant="plus_plus")
    engine.logits[0].data = torch.tensor([0.3, 0.0, 0.2, 0.1])
    engine.gates(0)
    (gate,) = engine.gates(1)
    assert (gate == 0).tolist() == [False, True, False, True]
    (gate * torch.arange(4.0)).sum().backward()
    assert engine.logits[0].grad[[1, 3]].tolist() == [0.0, 0.0]
    assert engine.logits[0].grad[[0, 2]].abs().min() > 0


def test_asking_twice_for_a_step_changes_nothing():
    engine = SequentialAttention([Group(20, 5)], cycles(10), variant="plus_plus")
    for step in range(10):
        first = engine.gates(step)[0].detach().clone()
        state = engine.state()
        assert torch.equal(engine.gates(step)[0], first)
        assert all(torch.equal(engine.state()[name], value) for name, value in state.items())
        engine.logits[0].data += torch.randn(20)


def test_paper_gates_are_one_at_the_start():
    """T1."""
    engine = SequentialAttention([Group(6, 2)], cycles(10), variant="plus_plus")
    assert torch.equal(engine.gates(0)[0], torch.ones(6))


def test_capped_gates_are_one_in_the_dense_phase_whatever_the_prior():
    prior = torch.tensor([5.0, -3.0, 0.0])
    engine = SequentialAttention([Group(3, 1)], cycles(10), priors=[prior])
    assert torch.equal(engine.gates(0)[0], torch.ones(3))
    assert torch.equal(engine.logits[0].detach(), prior)


def test_capped_gates_follow_the_budget_and_end_hard():
    group = Group(20, 6)
    engine = SequentialAttention([group], cycles(50), priors=[torch.linspace(-1, 1, 20)])
    for step in range(50):
        moment = engine.schedule.at(step)
        gates = engine.gates(step)[0].detach()
        if moment.kind == "sparsify":
            budget = group.budget_at(moment.progress)
            assert float(gates.sum()) == pytest.approx(budget, rel=1e-5)
        if moment.kind == "sparse":
            assert gates.tolist() == [0.0] * 14 + [1.0] * 6
    assert torch.equal(engine.scales()[0], engine.survivors()[0].float())


def test_the_temperature_rises_from_first_to_last_geometrically():
    logits = torch.tensor([0.02, 0.01, 0.0, -0.01])
    schedule = Schedule((Phase("sparsify", 100),))
    engine = SequentialAttention([Group(4, 2)], schedule, priors=[logits], temperature=(2.0, 50.0))
    # the two lowest stay soft, and their ratio shows the temperature
    for step, temperature in ((49, 10.0), (99, 50.0)):
        gates = engine.gates(step)[0].detach()
        assert float((gates[2] / gates[3]).log()) == pytest.approx(0.01 * temperature, rel=1e-4)


def test_ties_go_to_low_indices():
    for variant in ("capped", "plus_plus"):
        engine = SequentialAttention([Group(6, 3)], cycles(10), variant=variant)
        for step in range(10):
            engine.gates(step)
        assert engine.survivors()[0].tolist() == [True] * 3 + [False] * 3
    gates = SequentialAttention([Group(6, 3)], cycles(10)).gates(9)[0]
    assert gates.tolist() == [1.0] * 3 + [0.0] * 3


def test_paper_scales_are_attention_over_the_survivors_and_clipped():
    engine = SequentialAttention([Group(8, 2)], cycles(10), variant="plus_plus")
    run(engine)
    engine.logits[0].data *= 100
    scale, keep_mask = engine.scales()[0], engine.survivors()[0]
    assert torch.equal(scale, attention(engine.logits[0].detach(), keep_mask, 0.25))
    assert float(scale[keep_mask].min()) >= 0.25
    assert float(scale.max()) <= 4.0


@pytest.mark.parametrize("variant", ["capped", "plus_plus", "magnitude"])
def test_a_resumed_engine_walks_the_same_way(variant):
    """T12: what is saved and loaded is all there is."""
    groups = [Group(25, 9), Group(6, 3), Group.of_costs([3, 1, 2, 5, 1, 4], 7)]
    for stop in (1, 7, 13, 24):
        whole = SequentialAttention(groups, cycles(30, number=2), variant=variant)
        run(whole, range(stop), seed=1)
        state = {name: value.clone() for name, value in whole.state().items()}
        run(whole, range(stop, 30), seed=2)
        again = SequentialAttention(groups, cycles(30, number=2), variant=variant)
        again.load_state(state)
        run(again, range(stop, 30), seed=2)
        ends = whole.state()
        assert all(torch.equal(value, ends[name]) for name, value in again.state().items())
        pairs = zip(whole.survivors(), again.survivors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_state_is_a_copy():
    engine = SequentialAttention([Group(9, 3)], cycles(30, number=3), variant="plus_plus")
    run(engine, range(9))
    state = engine.state()
    before = {name: value.clone() for name, value in state.items()}
    run(engine, range(9, 30))
    assert all(torch.equal(state[name], value) for name, value in before.items())


# costs

COSTS = (3.0, 1.0, 2.0, 5.0, 1.0, 4.0)
VARIANTS = ["capped", "plus_plus", "magnitude"]


def test_a_group_of_costs_knows_its_total_density_and_the_most_that_can_stay():
    group = Group.of_costs(COSTS, 7.0)
    assert (group.num_units, group.total, group.final) == (6, 16.0, 7.0)
    assert group.density == 7 / 16
    # 1 + 1 + 2 + 3
    assert group.num_kept == 4
    assert group.budget_at(0.0) == 16.0
    assert group.budget_at(1.0) == pytest.approx(7.0, rel=1e-12)
    whole = Group.of_costs([0.1] * 10, sum([0.1] * 10))
    assert whole.num_kept == 10
    assert whole.density == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [
        ([], 1.0, "costs must be positive"),
        ([1.0, 0.0], 1.0, "costs must be positive"),
        ([1.0, -2.0], 1.0, "costs must be positive"),
        ([2.0, 3.0], 1.9, r"budget must be between 2.0 and 5.0, got 1.9"),
        ([2.0, 3.0], 5.1, r"budget must be between 2.0 and 5.0, got 5.1"),
    ],
)
def test_costs_and_budgets_that_cannot_be_are_an_error(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        Group.of_costs(costs, budget)


@pytest.mark.parametrize("options", [{"costs": (1.0, 2.0)}, {"budget": 2.0}])
def test_costs_come_with_a_budget(options):
    with pytest.raises(ValueError, match="needs costs and a budget, or neither"):
        Group(2, 1, **options)


def cost_of(keep_mask, group):
    return sum(cost for cost, kept in zip(group.costs, keep_mask.tolist(), strict=True) if kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_survivors_cost_at_most_the_budget_and_waste_no_room(variant):
    """T12, with costs."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for size in range(1, 12):
        costs = (0.1 + 9 * torch.rand(size, generator=generator)).tolist()
        share = float(torch.rand(1, generator=generator))
        low, high = min(costs), sum(costs)
        groups.append(Group.of_costs(costs, low + share * (high - low)))
    engine = SequentialAttention(groups, cycles(30, number=2), variant=variant)
    run(engine)
    for group, keep_mask, mask in zip(groups, engine.survivors(), engine.keep_masks, strict=True):
        left = group.final - cost_of(keep_mask, group)
        assert left >= -1e-9 * group.total
        assert 1 <= int(keep_mask.sum()) <= group.num_kept
        # of those that were alive; units that left make no room for themselves
        waiting = [c for c, i in zip(group.costs, (mask & ~keep_mask).tolist(), strict=True) if i]
        assert all(cost > left for cost in waiting)


@pytest.mark.parametrize("variant", ["plus_plus", "magnitude"])
def test_masks_with_costs_are_nested_and_never_cost_more_than_the_moments_budget(variant):
    """T12: mask cost <= budget at every step, cost groups too."""
    group = Group.of_costs(COSTS * 4, 23.0)
    schedule = cycles(60, number=2)
    engine = SequentialAttention([group], schedule, variant=variant)
    masks = [each for (each,) in run(engine)]
    for step, mask in enumerate(masks):
        moment = schedule.at(step)
        if moment.kind == "dense":
            assert mask.all()
            continue
        progress = moment.progress if moment.kind == "sparsify" else 1.0
        assert cost_of(mask, group) <= group.budget_at(progress) * (1 + 1e-9)
        assert not (mask & ~masks[step - 1]).any()


def test_capped_gates_with_costs_follow_the_budget_and_end_hard_within_it():
    group = Group.of_costs(COSTS, 7.0)
    engine = SequentialAttention([group], cycles(50), priors=[torch.linspace(1, -1, 6)])
    for step in range(50):
        moment = engine.schedule.at(step)
        gates = engine.gates(step)[0].detach()
        if moment.kind == "dense":
            assert torch.equal(gates, torch.ones(6))
        if moment.kind == "sparsify":
            spent = float((gates * torch.tensor(COSTS)).sum())
            assert spent == pytest.approx(group.budget_at(moment.progress), rel=1e-5)
        if moment.kind == "sparse":
            # 3 + 1 + 2, 5 no longer fits, 1 does
            assert gates.tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert engine.survivors()[0].tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_unit_that_the_final_budget_cannot_pay_for_pushes_nobody_out(variant):
    group = Group.of_costs([1.0, 5.0, 1.0, 1.0], 3.0)
    schedule = Schedule((Phase("sparsify", 40), Phase("sparse", 1)))
    scores = torch.tensor([0.1, 0.9, 0.2, 0.3])
    engine = SequentialAttention([group], schedule, variant=variant, priors=[scores])
    for step in range(41):
        engine.gates(step)
    assert engine.survivors()[0].tolist() == [True, False, True, True]


# the control: scores that are handed in


def test_the_magnitude_control_follows_its_scores_and_learns_nothing():
    engine = SequentialAttention([Group(4, 2)], cycles(10, number=2), variant="magnitude")
    assert not any(logits.requires_grad for logits in engine.logits)
    first, second = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 4.0, 2.0, 3.0])
    seen = []
    for step in range(10):
        engine.set_scores([first if step < 5 else second])
        (gate,) = engine.gates(step)
        assert not gate.requires_grad
        assert gate.tolist() == engine.keep_masks[0].float().tolist()
        seen.append(gate.tolist())
    assert seen[0] == seen[5] == [1.0] * 4
    assert seen[4] == [1.0, 1.0, 0.0, 0.0]
    # who left in the first cycle came back, by the scores of the second
    assert seen[9] == [0.0, 1.0, 0.0, 1.0]
    assert engine.survivors()[0].tolist() == [False, True, False, True]
    assert engine.scales()[0].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert engine.dropped_at[0][[1, 3]].tolist() == [-1, -1]


def test_the_magnitude_control_has_the_masks_of_plus_plus_for_equal_scores():
    groups = [Group(25, 9), Group.of_costs(COSTS, 7.0)]
    scores = [torch.randn(25), torch.randn(6)]
    masks = []
    for variant in ("plus_plus", "magnitude"):
        engine = SequentialAttention(groups, cycles(40), variant=variant, priors=scores)
        for step in range(40):
            engine.gates(step)
            masks.append([mask.clone() for mask in engine.keep_masks])
    for one, other in zip(masks[:40], masks[40:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_scores_are_a_copy():
    engine = SequentialAttention([Group(3, 1)], cycles(10), variant="magnitude")
    scores = torch.tensor([1.0, 2.0, 3.0])
    engine.set_scores([scores])
    scores.zero_()
    assert engine.logits[0].tolist() == [1.0, 2.0, 3.0]


def test_scores_are_for_the_magnitude_control_which_needs_them():
    for variant in ("capped", "plus_plus"):
        with pytest.raises(ValueError, match="only the magnitude variant takes scores"):
            SequentialAttention([Group(3, 1)], cycles(9), variant=variant).set_scores([])
    engine = SequentialAttention([Group(3, 1)], cycles(9), variant="magnitude")
    with pytest.raises(ValueError, match="call set_scores before gates"):
        engine.gates(0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        engine.set_scores([])
    # a state that was taken up has them
    engine.load_state(engine.state())
    assert engine.gates(0)[0].tolist() == [1.0] * 3


# the other control: no gradual phase


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_the_gradual_phase_the_budget_is_final_at_its_first_step(variant):
    groups = [Group(10, 4), Group.of_costs(COSTS, 7.0)]
    scores = [torch.randn(10), torch.randn(6)]
    spent = {}
    for curve in ("gradual", "at_once"):
        engine = SequentialAttention(
            groups, cycles(40), variant=variant, priors=scores, curve=curve
        )
        assert engine.gates(0)[0].tolist() == [1.0] * 10 or variant == "plus_plus"
        assert all(mask.all() for mask in engine.keep_masks)
        gates = engine.gates(8)
        alive_units, costly = (gates, gates) if variant == "capped" else (engine.keep_masks,) * 2
        spent[curve] = (
            float(alive_units[0].detach().sum()),
            float((costly[1].detach() * torch.tensor(COSTS)).sum()),
        )
    assert spent["at_once"][0] == pytest.approx(4, rel=1e-5)
    assert spent["at_once"][1] <= 7 * (1 + 1e-5)
    assert spent["gradual"][0] > 8
    assert spent["gradual"][1] > 10


# twins


def walk_with_twins(share, variant, seed):
    """Six units in a quadratic loss, 0 and 1 one unit split, the others worth 0.7 of it.

    Logits start from the logarithm of what a unit writes, as in a language model. Returns who
    survives of four, the logits, and the units' outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator))
    writes = torch.cat([share * axes[:1], (1 - share) * axes[:1], 0.7 * axes[1:5]])
    writes[2:] += 0.02 * torch.randn(4, 9, generator=generator)
    schedule = Schedule.of_cycles(60, dense=0.1, sparsify=0.8, sparse=0.1)
    prior = writes.square().sum(1).log()
    engine = SequentialAttention([Group(6, 4)], schedule, variant=variant, priors=[prior])
    optimizer = torch.optim.Adam(engine.logits.parameters(), lr=0.05)
    for step in range(60):
        if schedule.at(step).begins_phase:
            optimizer.state.clear()
        loss = (engine.gates(step)[0] @ writes - writes.sum(0)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return engine.survivors()[0], engine.logits[0].detach(), writes


@pytest.mark.parametrize("variant", ["capped", "plus_plus"])
@pytest.mark.parametrize("share", [0.52, 0.55])
def test_of_two_nearly_equal_units_exactly_one_goes(share, variant):
    """T13: either alone is the cheapest to lose, both the dearest; one-shot scores lose both."""
    for seed in range(5):
        keep_mask, _, writes = walk_with_twins(share, variant, seed)
        assert set(writes.norm(dim=1).argsort()[:2].tolist()) == {0, 1}
        assert keep_mask[:2].tolist() == [True, False]


def test_exactly_equal_units_never_part_and_a_swap_brings_one_back():
    """T13's limit: gradients of equal units are equal, so the gates lose both here."""
    for seed in range(5):
        keep_mask, logits, writes = walk_with_twins(0.5, "capped", seed)
        assert float(logits[0]) == pytest.approx(float(logits[1]), abs=1e-5)
        assert keep_mask[:2].tolist() == [False, False]
        problem = LeastSquares.of(writes.T, writes.sum(0), [[unit] for unit in range(6)])
        best, _ = group_ompr(problem, keep_mask.nonzero().flatten().tolist(), 3)
        assert len({0, 1} & set(best)) == 1
        assert len(best) == 4


@pytest.mark.parametrize("variant", ["capped", "plus_plus", "magnitude"])
@pytest.mark.parametrize("curve", ["gradual", "at_once"])
def test_rows_of_one_group_are_groups_of_their_own(variant, curve):
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(7, generator=generator) for _ in range(4)]
    schedule = Schedule.of_cycles(9, dense=0.2, sparsify=0.6, sparse=0.2)
    options = {"variant": variant, "curve": curve}
    apart = SequentialAttention([Group(7, 3)] * 4, schedule, priors=starts, **options)
    together = SequentialAttention(
        [Group(28, 12, num_rows=4)], schedule, priors=[torch.cat(starts)], **options
    )
    weights = torch.randn(28, generator=generator)
    for step in range(schedule.num_steps):
        wanted, (got,) = torch.cat(apart.gates(step)), together.gates(step)
        torch.testing.assert_close(got, wanted)
        if variant != "magnitude":
            slopes = torch.autograd.grad((wanted * weights).sum(), list(apart.logits))
            (slope,) = torch.autograd.grad((got * weights).sum(), [together.logits[0]])
            torch.testing.assert_close(slope, torch.cat(slopes))
    assert torch.equal(torch.cat(apart.survivors()), together.survivors()[0])
    assert together.survivors()[0].view(4, 7).sum(1).tolist() == [3] * 4
    torch.testing.assert_close(torch.cat(apart.scales()), together.scales()[0])
    assert torch.equal(torch.cat(apart.dropped_at), together.dropped_at[0])


@pytest.mark.parametrize("options", [{"num_kept": 5}, {"num_kept": 4, "costs": (1.0,) * 8}])
def test_rows_that_are_no_equal_groups_are_refused(options):
    budget = 4.0 if "costs" in options else None
    with pytest.raises(ValueError, match="rows"):
        Group(8, num_rows=2, budget=budget, **options)
