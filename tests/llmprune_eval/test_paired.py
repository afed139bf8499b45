import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from llmprune.errors import InputError
from llmprune_eval.paired import LEVEL, compare_documents, mcnemar


def answers(count, right, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random(count) < right).astype(float).tolist()


@pytest.mark.parametrize(
    ("dense", "pruned"), [(0, 0), (1, 0), (3, 9), (9, 3), (7, 7), (40, 61), (1500, 1400)]
)
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_documents(dense, pruned):
    wanted = binomtest(dense, dense + pruned).pvalue if dense + pruned else 1.0
    assert mcnemar(dense, pruned) == pytest.approx(wanted, rel=1e-9)


def test_a_model_does_not_differ_from_itself():
    same = answers(300, 0.6)
    found = compare_documents(same, same)
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert not found.conclusive


def test_a_planted_difference_is_found_with_its_counts():
    dense = answers(400, 0.6)
    pruned = [0.0 if i % 8 == 0 else score for i, score in enumerate(dense)]
    lost = sum(dense[::8])
    found = compare_documents(dense, pruned)
    assert found.value == pytest.approx(-lost / 400)
    assert (found.only_dense, found.only_pruned) == (lost, 0)
    assert found.low < found.value < found.high < 0
    assert found.p_value == pytest.approx(2 * 0.5**lost)
    assert found.conclusive


def test_pairing_finds_what_two_lone_figures_would_not():
    dense = answers(400, 0.5)
    # one document in fifty answers wrong: 2 points, where one standard error is 2.5
    pruned = [0.0 if i % 25 == 0 else score for i, score in enumerate(dense)]
    found = compare_documents(dense, pruned)
    assert abs(found.value) < math.sqrt(0.25 / 400)
    assert found.conclusive


@pytest.mark.parametrize("kind", ["answers", "numbers"])
def test_the_interval_is_scipys_paired_bootstrap(kind):
    rng = np.random.default_rng(3)
    dense = np.array(answers(250, 0.6)) if kind == "answers" else rng.normal(size=250)
    pruned = (
        np.array(answers(250, 0.5, seed=1)) if kind == "answers" else dense + rng.normal(size=250)
    )
    found = compare_documents(dense.tolist(), pruned.tolist())
    wanted = bootstrap(
        (dense, pruned),
        lambda d, p, axis: (p - d).mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=5,
    )
    # Both are draws, each with an error of 0.027 standard errors; a mean of answers moves in steps.
    tolerance = 0.16 * wanted.standard_error + (kind == "answers") / 250
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=tolerance)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=tolerance)


def test_equal_models_are_told_apart_at_most_as_often_as_the_level_says():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        # two models that are right on the same share, each on documents of its own
        dense, pruned = (rng.random((2, 60)) < 0.6).astype(float).tolist()
        wrong += compare_documents(dense, pruned).conclusive
    # McNemar's exact test keeps below its level; 200 tries with 0.05 give 10, and 3 errors more
    assert wrong <= 200 * LEVEL + 3 * math.sqrt(200 * LEVEL * (1 - LEVEL))


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        dense = (rng.random(200) < 0.6).astype(float)
        # a tenth of the right answers is lost: 6 points
        pruned = dense * (rng.random(200) < 0.9)
        found = compare_documents(dense.tolist(), pruned.tolist())
        held += found.low <= -0.06 <= found.high
    assert held >= 200 * 0.9


def test_a_perplexity_is_compared_as_a_ratio_where_less_is_better():
    dense = np.random.default_rng(0).normal(-3, 1, 200).tolist()
    pruned = [score - 0.5 for score in dense]
    found = compare_documents(dense, pruned, aggregation="perplexity")
    assert found.kind == "ratio"
    assert found.value == pytest.approx(math.exp(0.5))
    assert found.low == pytest.approx(found.high) == pytest.approx(math.exp(0.5))
    assert found.p_value is None
    assert found.conclusive
    assert not compare_documents(dense, dense, aggregation="perplexity").conclusive


def test_subtasks_are_resampled_within_and_may_count_the_same():
    # of 2 and 8 documents; all differences are in the small one
    dense, pruned = [1.0] * 10, [0.0, 0.0] + [1.0] * 8
    by_document = compare_documents(dense, pruned, subtask_sizes=[2, 8])
    by_subtask = compare_documents(dense, pruned, subtask_sizes=[2, 8], equal_subtasks=True)
    assert by_document.value == pytest.approx(-0.2)
    assert by_subtask.value == pytest.approx(-0.5)
    # no draw within a subtask changes its mean; drawing from all ten would
    assert by_document.low == pytest.approx(by_document.high)
    assert compare_documents(dense, pruned).low < -0.3


def test_different_documents_are_refused():
    with pytest.raises(InputError, match="same documents from both models"):
        compare_documents([1.0, 0.0], [1.0])
    with pytest.raises(InputError, match="at least one"):
        compare_documents([], [])
