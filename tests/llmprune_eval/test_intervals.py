import itertools
import math

import pytest

from llmprune_eval.intervals import make_ratio, median_ratio, student_t


def test_interval_that_holds_one_is_not_conclusive():
    assert not make_ratio(0.9, 0.8, 1.1).conclusive
    assert not make_ratio(1.0, 1.0, 1.0).conclusive
    assert make_ratio(0.9, 0.8, 0.99).conclusive
    assert make_ratio(1.1, 1.01, 1.2).conclusive


def test_one_pair_has_no_interval():
    ratio = median_ratio([0.5])
    assert (ratio.value, ratio.low, ratio.high, ratio.conclusive) == (0.5, None, None, False)


@pytest.mark.parametrize("count", [6, 7, 8, 9, 12, 17, 30, 101])
def test_order_statistics_cover_the_median_with_at_least_95_percent(count):
    ratio = median_ratio([float(i) for i in range(1, count + 1)])
    rank = int(ratio.low) - 1
    assert ratio.high == count - rank

    def missed(r):
        return 2 * sum(math.comb(count, k) for k in range(r + 1)) / 2**count

    assert missed(rank) <= 0.05 < missed(rank + 1)


def test_interval_of_few_rounds_holds_the_median():
    for values in itertools.product([0.5, 0.9, 1.0, 4.0], repeat=4):
        ratio = median_ratio(values)
        assert ratio.low - 1e-9 <= ratio.value <= ratio.high + 1e-9


def test_student_t_falls_to_the_normal_quantile():
    quantiles = [student_t(degrees) for degrees in range(1, 300)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert student_t(11) == pytest.approx(2.201, abs=3e-3)
    assert student_t(30) == pytest.approx(2.042, abs=1e-3)
    assert quantiles[-1] == pytest.approx(1.968, abs=1e-3)
