"""Small correlated regressions that selection is tested on."""

import torch

from llmprune.least_squares import LeastSquares, group_omp


def singles(count):
    return [[index] for index in range(count)]


def equal_groups(count, size):
    return [list(range(size * i, size * (i + 1))) for i in range(count)]


def mixed_groups(sizes=(1, 2, 4, 8) * 3):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def design(seed, num_inputs, *, num_rows=100, num_active=None, correlation=0.5):
    """Inputs (rows, n) with correlation^|i-j| between columns, and noisy targets (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(num_inputs)
    covariance = correlation ** (place[:, None] - place[None]).abs().double()
    noise = torch.randn(num_rows, num_inputs + 1, generator=generator, dtype=torch.float64)
    inputs = noise[:, 1:] @ torch.linalg.cholesky(covariance).T
    truth = torch.randn(num_inputs, generator=generator, dtype=torch.float64)
    if num_active is not None:
        truth[torch.randperm(num_inputs, generator=generator)[num_active:]] = 0
    return inputs, inputs @ truth + noise[:, 0]


def problem(seed, groups, **settings):
    inputs, targets = design(seed, sum(len(group) for group in groups), **settings)
    return LeastSquares.of(inputs, targets, groups)


def runner_up_gaps(least_squares, order, costs=None):
    """At every step of `order`: by what share the second largest gradient is behind the first."""
    gaps = []
    for count in range(len(order)):
        pull = least_squares.pull(order[:count], costs).sort(descending=True).values
        gaps.append(1 - float(pull[1] / pull[0]))
    return gaps


def clear_problems(count, groups, num_kept, epsilon, costs=None):
    """Problems, and their OMP order, where no step is nearly a tie."""
    found, seed = [], 0
    while len(found) < count:
        least_squares = problem(seed, groups)
        order = group_omp(least_squares, num_kept, costs)
        if min(runner_up_gaps(least_squares, order, costs)) >= 2.5 * epsilon:
            found.append((least_squares, order))
        seed += 1
    return found
