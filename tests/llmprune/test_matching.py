import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch

from llmprune.least_squares import LeastSquares, group_omp
from llmprune.matching import backward_matching, forward_matching, refit_weights

# tests are no packages, so a neighbour is loaded by path
_spec = importlib.util.spec_from_file_location(
    "regression", Path(__file__).with_name("regression.py")
)
regression = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(regression)

# units, width: one column, odd widths, more columns than the elimination gathers in one block
SIZES = [(1, 1), (2, 1), (13, 1), (7, 3), (5, 4), (4, 21), (3, 70), (130, 1)]
RIDGE = 1e-3


def projection(num_units, width, *, num_outputs=3, seed=0):
    """Correlated inputs X (rows, n) and weights W (n, num_outputs), float64."""
    size = num_units * width
    inputs, _ = regression.design(seed, size, num_rows=2 * size + 9, correlation=0.8)
    generator = torch.Generator().manual_seed(seed + 100)
    return inputs, torch.randn(size, num_outputs, generator=generator, dtype=torch.float64)


def with_noise(gram, ridge=RIDGE):
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def inputs_of(units, width):
    return [unit * width + i for unit in units for i in range(width)]


def error_of(gram, weights, units, width, ridge=RIDGE):
    """||X B - X W||^2 with B on the units alone, refitted by the normal equations."""
    gram = with_noise(gram, ridge)
    kept = inputs_of(sorted(units), width)
    missing = weights.clone()
    if kept:
        missing[kept] -= torch.linalg.solve(gram[kept][:, kept], (gram @ weights)[kept])
    return float((missing * (gram @ missing)).sum())


def close(value, expected, energy):
    return value == pytest.approx(expected, rel=1e-7, abs=1e-9 * energy)


# forward


@pytest.mark.parametrize(("num_units", "width"), SIZES)
def test_forward_matching_is_the_textbooks_group_omp(num_units, width):
    for seed in range(3):
        inputs, weights = projection(num_units, width, seed=seed)
        # rows of noise that carry the ridge, so that no Gram matrix is needed
        gram = inputs.T @ inputs
        noise = math.sqrt(RIDGE * float(gram.diagonal().mean()))
        rows = torch.cat([inputs, noise * torch.eye(len(gram), dtype=torch.float64)])
        groups = regression.equal_groups(num_units, width)
        num_kept = min(num_units, 8)
        path = forward_matching(gram, weights, width, num_kept, RIDGE)
        assert path.order.tolist() == textbook_omp(rows, rows @ weights, groups, num_kept)
        omp = group_omp(LeastSquares.of(rows, rows @ weights, groups), num_kept)
        assert path.order.tolist() == omp
        assert path.kept.tolist() == sorted(path.order.tolist())


def textbook_omp(rows, target, groups, num_kept):
    """Group OMP on residuals, with a least squares solve a step."""
    order, residual = [], target
    for _ in range(num_kept):
        pulls = [float((rows[:, group].T @ residual).norm()) for group in groups]
        order.append(max(set(range(len(groups))) - set(order), key=lambda i: pulls[i]))
        chosen = rows[:, [index for group in order for index in groups[group]]]
        residual = target - chosen @ torch.linalg.lstsq(chosen, target).solution
    return order


@pytest.mark.parametrize(("num_units", "width"), SIZES)
@pytest.mark.parametrize("rule", ["gradient", "decrease"])
def test_every_forward_error_is_that_of_a_refit(num_units, width, rule):
    inputs, weights = projection(num_units, width)
    gram = inputs.T @ inputs
    path = forward_matching(gram, weights, width, num_units, RIDGE, rule=rule)
    assert close(path.energy, error_of(gram, weights, [], width), path.energy)
    assert len(path.errors) == num_units
    for count in range(1, num_units + 1) if num_units < 99 else (1, 63, 64, 65, 129, 130):
        expected = error_of(gram, weights, path.order[:count].tolist(), width)
        assert close(float(path.errors[count - 1]), expected, path.energy)
    assert path.error == float(path.errors[-1])


def test_the_rule_decrease_takes_the_unit_after_which_the_error_is_smallest():
    other = 0
    for seed in range(5):
        inputs, weights = projection(6, 2, seed=seed)
        gram = inputs.T @ inputs
        path = forward_matching(gram, weights, 2, 4, RIDGE, rule="decrease")
        for count, unit in enumerate(path.order.tolist()):
            before = path.order[:count].tolist()
            errors = {
                i: error_of(gram, weights, [*before, i], 2) for i in set(range(6)) - set(before)
            }
            assert unit == min(errors, key=errors.__getitem__)
        other += path.order.tolist() != forward_matching(gram, weights, 2, 4).order.tolist()
    # so it is not the gradient's rule by another name
    assert other >= 1


def test_the_rule_decrease_does_not_mind_the_scale_of_a_unit_and_the_gradient_does():
    inputs, weights = projection(9, 1)
    scale = torch.logspace(-2, 2, 9, dtype=torch.float64)
    gram = inputs.T @ inputs
    orders = {}
    for rule in ("gradient", "decrease"):
        plain = forward_matching(gram, weights, 1, 4, 1e-12, rule=rule)
        scaled = forward_matching(
            gram * scale[:, None] * scale, weights / scale[:, None], 1, 4, 1e-12, rule=rule
        )
        orders[rule] = (plain.order.tolist(), scaled.order.tolist())
    assert orders["decrease"][0] == orders["decrease"][1]
    assert orders["gradient"][0] != orders["gradient"][1]


# backward


@pytest.mark.parametrize(("num_units", "width"), SIZES)
def test_every_backward_change_is_the_difference_of_two_refits(num_units, width):
    inputs, weights = projection(num_units, width)
    gram = inputs.T @ inputs
    path = backward_matching(gram, weights, width, 1, RIDGE)
    assert len(path.order) == len(path.errors) == num_units - 1
    assert sorted(path.order.tolist() + path.kept.tolist()) == list(range(num_units))
    for count in range(num_units) if num_units < 99 else (1, 63, 64, 65, 129):
        left = sorted(set(range(num_units)) - set(path.order[:count].tolist()))
        error = float(path.errors[count - 1]) if count else 0.0
        assert close(error, error_of(gram, weights, left, width), path.energy)
    if num_units < 99:
        for count, unit in enumerate(path.order.tolist()):
            left = set(range(num_units)) - set(path.order[:count].tolist())
            errors = {i: error_of(gram, weights, left - {i}, width) for i in left}
            assert errors[unit] <= min(errors.values()) * (1 + 1e-9)


def test_the_survivors_score_is_what_their_own_removal_would_cost():
    inputs, weights = projection(7, 3)
    gram = inputs.T @ inputs
    path = backward_matching(gram, weights, 3, 4, RIDGE)
    kept = path.kept.tolist()
    for unit in kept:
        expected = error_of(gram, weights, set(kept) - {unit}, 3) - path.error
        assert close(float(path.scores[unit]), expected, path.energy)


def test_units_removed_together_are_ranked_once():
    inputs, weights = projection(13, 1)
    gram = inputs.T @ inputs
    single, joint = (
        backward_matching(gram, weights, 1, 5, RIDGE, num_per_step=count) for count in (1, 3)
    )
    full = set(range(13))
    losses = {i: error_of(gram, weights, full - {i}, 1) for i in full}
    assert set(joint.order[:3].tolist()) == set(sorted(full, key=losses.__getitem__)[:3])
    assert len(joint.order) == 8
    assert close(joint.error, error_of(gram, weights, joint.kept.tolist(), 1), joint.energy)
    # here the careful way finds another set, and a better one
    assert single.kept.tolist() != joint.kept.tolist()
    assert single.error < joint.error


def test_keeping_all_units_costs_nothing():
    inputs, weights = projection(5, 4)
    path = backward_matching(inputs.T @ inputs, weights, 4, 5, RIDGE, num_swaps=3)
    assert path.order.tolist() == []
    assert path.errors.tolist() == []
    assert path.error == 0
    assert path.kept.tolist() == list(range(5))
    assert (path.scores > 0).all()


# scores, swaps, refits


@pytest.mark.parametrize(("num_units", "width"), SIZES)
def test_scores_follow_the_order_strictly_and_the_survivors_are_on_top(num_units, width):
    for seed in range(3):
        inputs, weights = projection(num_units, width, seed=seed)
        gram, num_kept = inputs.T @ inputs, (num_units + 1) // 2
        for path in (
            forward_matching(gram, weights, width, num_kept),
            backward_matching(gram, weights, width, num_kept),
            backward_matching(gram, weights, width, num_kept, num_per_step=3),
        ):
            top = path.scores.float().topk(num_kept).indices.sort().values
            assert top.tolist() == path.kept.tolist()
        forward, backward = (
            function(gram, weights, width, num_kept)
            for function in (forward_matching, backward_matching)
        )
        # float32, which is what plans are made from, tells them apart
        picked = forward.scores[forward.order].float().tolist()
        assert all(a > b for a, b in itertools.pairwise(picked))
        removed = backward.scores[backward.order].float().tolist()
        assert all(a < b for a, b in itertools.pairwise(removed))


def test_swaps_exchange_one_unit_and_never_raise_the_error():
    lowered = 0
    for seed in range(12):
        inputs, weights = projection(12, 2, seed=seed, num_outputs=2)
        gram = inputs.T @ inputs
        for function in (forward_matching, backward_matching):
            paths = [function(gram, weights, 2, 5, num_swaps=count) for count in range(4)]
            for before, after in itertools.pairwise(paths):
                assert after.error <= before.error
                assert len(after.kept) == 5
                changed = set(before.kept.tolist()) ^ set(after.kept.tolist())
                assert len(changed) in (0, 2)
                assert (after.error < before.error) == bool(changed)
                assert after.order.tolist() == before.order.tolist()
            last = paths[-1]
            assert close(last.error, error_of(gram, weights, last.kept.tolist(), 2), last.energy)
            # scores move with the swap
            assert last.scores.topk(5).indices.sort().values.tolist() == last.kept.tolist()
            lowered += last.error < paths[0].error
    assert lowered >= 2


def test_swaps_end_where_no_joining_unit_is_worth_more_than_the_one_that_leaves():
    inputs, weights = projection(10, 1, seed=3)
    gram = inputs.T @ inputs
    path = forward_matching(gram, weights, 1, 4, num_swaps=100)
    kept = set(path.kept.tolist())
    errors = {i: error_of(gram, weights, kept | {i}, 1) for i in set(range(10)) - kept}
    wider = kept | {min(errors, key=errors.__getitem__)}
    after = {i: error_of(gram, weights, wider - {i}, 1) for i in wider}
    assert min(after.values()) >= path.error * (1 - 1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_refitted_weights_are_the_least_squares_solution(ridge):
    inputs, weights = projection(11, 1)
    gram = inputs.T @ inputs
    kept = torch.tensor([0, 3, 4, 9])
    noise = math.sqrt(ridge * float(gram.diagonal().mean()))
    rows = torch.cat([inputs, noise * torch.eye(11, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows[:, kept], rows @ weights).solution
    torch.testing.assert_close(refit_weights(gram, weights, kept, ridge), expected)
    everything = refit_weights(gram, weights, torch.arange(11), ridge)
    torch.testing.assert_close(everything, weights)


def test_the_inputs_of_the_functions_are_left_as_they_were():
    inputs, weights = projection(5, 3)
    gram = inputs.T @ inputs
    before = gram.clone(), weights.clone()
    forward_matching(gram, weights, 3, 2, num_swaps=2)
    backward_matching(gram, weights, 3, 2, num_swaps=2)
    refit_weights(gram, weights, torch.tensor([1, 2]))
    assert torch.equal(gram, before[0])
    assert torch.equal(weights, before[1])


def test_float32_is_taken_and_counted_in_float64():
    inputs, weights = projection(6, 2)
    gram = (inputs.T @ inputs).float()
    path = backward_matching(gram, weights.float(), 2, 3)
    exact = backward_matching(gram.double(), weights.float().double(), 2, 3)
    assert path.errors.dtype == path.scores.dtype == torch.float64
    assert torch.equal(path.errors, exact.errors)


@pytest.mark.parametrize("ridge", [1e-3, 1e-6])
def test_of_two_equal_units_exactly_one_stays_and_a_dead_one_goes_first(ridge):
    """T13: twins stand in for each other, so one is free to lose and the other is not."""
    for seed in range(5):
        inputs, weights = projection(8, 1, seed=seed)
        weights[0] *= 4
        inputs = torch.cat([inputs, inputs[:, :1], torch.zeros(len(inputs), 1)], 1)
        weights = torch.cat([weights, weights[:1], weights[1:2]])
        gram = inputs.T @ inputs
        once = gram.diagonal() * weights.square().sum(1)
        assert {0, 8} <= set(once.topk(5).indices.tolist())
        backward = backward_matching(gram, weights, 1, 5, ridge)
        forward = forward_matching(gram, weights, 1, 5, ridge)
        for path in (backward, forward):
            assert len({0, 8} & set(path.kept.tolist())) == 1
            assert 9 not in path.kept.tolist()
        assert int(backward.order[0]) == 9
        assert int(backward.scores.argmin()) == int(forward.scores.argmin()) == 9


# what cannot be


@pytest.mark.parametrize(
    ("gram", "weights", "width", "num_kept", "message"),
    [
        (torch.eye(6), torch.ones(5, 2), 1, 2, r"must share n, .* got \(6, 6\) and \(5, 2\)"),
        (torch.ones(6, 5), torch.ones(6, 2), 1, 2, r"must share n, .* got \(6, 5\)"),
        (torch.eye(6), torch.ones(6, 2), 4, 1, "a multiple of width 4"),
        (torch.eye(6), torch.ones(6, 2), 2, 0, "num_kept must be between 1 and 3 units, got 0"),
        (torch.eye(6), torch.ones(6, 2), 2, 4, "num_kept must be between 1 and 3 units, got 4"),
    ],
)
@pytest.mark.parametrize("function", [forward_matching, backward_matching])
def test_shapes_that_do_not_fit_together_are_an_error(
    function, gram, weights, width, num_kept, message
):
    with pytest.raises(ValueError, match=message):
        function(gram, weights, width, num_kept)


def test_a_singular_gram_without_a_ridge_is_an_error():
    gram = torch.ones(3, 3)
    with pytest.raises(ValueError, match="positive definite with the ridge; raise the ridge"):
        backward_matching(gram, torch.ones(3, 1), 1, 1, 0.0)
    with pytest.raises(ValueError, match="positive definite with the ridge; raise the ridge"):
        refit_weights(gram, torch.ones(3, 1), torch.tensor([0, 1]), 0.0)
    with pytest.raises(ValueError, match="positive definite with the ridge; raise the ridge"):
        forward_matching(gram, torch.ones(3, 1), 1, 2, 0.0)
