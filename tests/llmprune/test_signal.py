import pytest
import torch
from scipy.stats import spearmanr

from llmprune.signal import is_signal, rank_correlation, shuffled_null


def scores(*sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def spoiled(pools, *, noise, seed):
    """The same scores as another seed would see them."""
    drawn = scores(*[len(pool) for pool in pools], seed=seed)
    return [pool + noise * other for pool, other in zip(pools, drawn, strict=True)]


def test_in_one_pool_it_is_spearmans_correlation():
    for seed in range(20):
        first, second = scores(15, 15, seed=seed)
        expected = spearmanr(first, second).statistic
        assert rank_correlation([first], [second]) == pytest.approx(expected, abs=1e-12)


def test_ties_share_a_rank():
    first = torch.tensor([3, 1, 3, 3, 0, 1, 7, -2])
    second = torch.tensor([0.5, 0.5, 2.0, 1.0, 1.0, -1.0, 2.0, 2.0])
    expected = spearmanr(first, second).statistic
    assert rank_correlation([first], [second]) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation([first], [first]) == pytest.approx(1.0, abs=1e-12)


def test_only_ranks_inside_a_pool_count():
    first, second = scores(9, 6, seed=0), scores(9, 6, seed=1)
    plain = rank_correlation(first, second)
    moved = [first[0] * 5, first[1].exp() + 100]
    assert rank_correlation(moved, second) == pytest.approx(plain, abs=1e-12)
    # across pools they would: the second pool is far above the first in both
    high = [second[0], second[1] + 100]
    joined = rank_correlation([torch.cat(moved)], [torch.cat(high)])
    assert joined > plain + 0.3


def test_pools_count_by_their_units():
    up, down = torch.arange(30.0), -torch.arange(10.0)
    correlation = rank_correlation([up, down], [up, -down])
    assert correlation == pytest.approx((30 - 10) / 40, abs=1e-12)


def test_a_pool_of_equal_scores_or_of_one_unit_tells_nothing():
    up, flat = torch.arange(6.0), torch.full((6,), 2.0)
    assert rank_correlation([flat], [up]) == rank_correlation([flat], [flat]) == 0.0
    assert rank_correlation([torch.ones(1)], [torch.ones(1)]) == 0.0
    assert rank_correlation([up, flat], [up, up]) == pytest.approx(0.5, abs=1e-12)
    assert rank_correlation([], []) == 0.0


def test_scores_of_any_dtype_that_learn_are_taken():
    first = torch.nn.Parameter(torch.arange(5).to(torch.bfloat16))
    assert rank_correlation([first], [torch.arange(5)]) == pytest.approx(1.0, abs=1e-12)


def test_the_null_is_a_quantile_of_what_shuffling_the_pools_gives():
    first, second = scores(40, 24, seed=2), scores(40, 24, seed=3)
    # the correlations of n shuffled ranks have variance 1 / (n - 1)
    spread = (40**2 / 39 + 24**2 / 23) ** 0.5 / 64
    null = shuffled_null(first, second, num_shuffles=4000)
    assert null == pytest.approx(1.645 * spread, rel=0.1)
    half = shuffled_null(first, second, num_shuffles=4000, quantile=0.5)
    assert half == pytest.approx(0, abs=0.1 * spread)
    # it does not depend on whether the two agree
    same = shuffled_null(first, first, num_shuffles=4000)
    assert same == pytest.approx(1.645 * spread, rel=0.1)


def test_units_are_shuffled_inside_their_pools_only():
    """Two pools of one unit each: nothing to shuffle, nothing above chance."""
    first, second = [torch.tensor([1.0]), torch.tensor([9.0])], [torch.zeros(1), torch.ones(1)]
    assert shuffled_null(first, second, num_shuffles=20) == 0.0
    assert not is_signal(first, second, num_shuffles=20)


def test_the_seed_decides_the_shuffles():
    first, second = scores(8, 5, seed=4), scores(8, 5, seed=5)
    nulls = [shuffled_null(first, second, num_shuffles=50, seed=seed) for seed in (0, 0, 1)]
    assert nulls[0] == nulls[1] != nulls[2]


def test_noise_is_taken_for_signal_in_about_one_of_twenty_cases():
    """T13: the shuffled null keeps its promise."""
    taken = sum(
        is_signal(scores(12, 7, seed=2 * i), scores(12, 7, seed=2 * i + 1), num_shuffles=100)
        for i in range(200)
    )
    # 10 in expectation, standard deviation 3.1
    assert 3 <= taken <= 19


def test_two_seeds_that_agree_are_a_signal():
    """T13."""
    for seed in range(20):
        truth = scores(20, 15, seed=seed)
        first, second = (spoiled(truth, noise=0.5, seed=1000 + seed + i) for i in (0, 500))
        assert is_signal(first, second, num_shuffles=200)
        opposed = [-pool for pool in second]
        assert not is_signal(first, opposed, num_shuffles=200)


@pytest.mark.parametrize("function", [rank_correlation, shuffled_null, is_signal])
def test_pools_of_unlike_sizes_are_an_error(function):
    with pytest.raises(ValueError, match=r"must be alike, got sizes \[\[4, 3\], \[3, 4\]\]"):
        function(scores(4, 3, seed=0), scores(3, 4, seed=0))
    with pytest.raises(ValueError, match="must be alike"):
        function(scores(4, seed=0), scores(4, 3, seed=0))
