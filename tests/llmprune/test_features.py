import importlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from llmprune.errors import InputError
from llmprune.feature_crosses import cross_candidates
from llmprune.feature_table import (
    Table,
    explained_alone,
    is_wide,
    logistic_gain,
    prior_logits,
    screen,
)
from llmprune.feature_training import GatedNetworks, SharedScaleAdam, elect, networks_for
from llmprune.features import SequentialAttentionSelector
from llmprune.forward_selection import ForwardAttention

ROOT = Path(__file__).parents[2]


def regression_table(seed=0, num_rows=300, num_columns=12):
    """Columns 0, 3 and 7 matter, in this order."""
    inputs = np.random.default_rng(seed).normal(size=(num_rows, num_columns))
    return inputs, 3 * inputs[:, 0] - 2 * inputs[:, 3] + inputs[:, 7]


def table_of(inputs, targets):
    """Standardised, every column a candidate; whole numbers are classes."""
    columns = torch.from_numpy((inputs - inputs.mean(0)) / inputs.std(0)).float()
    goals = torch.from_numpy(targets)
    goals = goals.float() if goals.is_floating_point() else goals
    return Table.of(columns, goals, torch.arange(inputs.shape[1]).split(1))


def curved_table(seed=0, num_rows=300):
    """Two classes, told apart by the sizes of columns 2 and 5, whose signs say nothing."""
    inputs = np.random.default_rng(seed).normal(size=(num_rows, 10))
    labels = np.where(inputs[:, 2] ** 2 + inputs[:, 5] ** 2 > 1.4, "far", "near")
    return inputs, labels


def test_scikit_learn_finds_nothing_to_object_to():
    check_estimator(SequentialAttentionSelector(steps_per_phase=2))


def test_scikit_learn_finds_nothing_to_object_to_around_an_estimator():
    check_estimator(SequentialAttentionSelector(Ridge(), steps_per_phase=1))


# what is selected


@pytest.mark.parametrize("gate", ["softmax", "linear"])
@pytest.mark.parametrize("seed", [0, 1])
def test_columns_that_matter_are_selected_in_regression(gate, seed):
    inputs, targets = regression_table(seed)
    selector = SequentialAttentionSelector(None, 3, gate=gate, random_state=seed)
    selector.fit(inputs, targets)
    assert selector.order_.tolist() == [0, 3, 7]
    assert selector.get_support(indices=True).tolist() == [0, 3, 7]
    assert selector.ranking_.tolist() == [1, 4, 4, 2, 4, 4, 4, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("seed", [0, 1])
def test_columns_with_no_linear_effect_are_selected_in_classification(seed):
    inputs, labels = curved_table(seed)
    selector = SequentialAttentionSelector(None, 2, random_state=seed).fit(inputs, labels)
    assert set(selector.order_) == {2, 5}
    assert selector.classes_.tolist() == ["far", "near"]


def test_several_networks_find_the_columns_of_a_small_table():
    inputs, targets = regression_table(num_rows=40, num_columns=60)
    selector = SequentialAttentionSelector(None, 3, random_state=0).fit(inputs, targets)
    assert {0, 3} < set(selector.order_)


def test_few_rows_get_several_networks():
    assert [networks_for(rows) for rows in (10, 64, 256, 257, 10_000)] == [8, 8, 2, 1, 1]


def test_a_table_of_more_than_eight_candidates_per_row_is_wide():
    assert [is_wide(400, 50), is_wide(401, 50)] == [False, True]


def test_steps_of_a_shared_scale_keep_the_gradients_proportions():
    for scale in (1e-6, 1e6):
        values = torch.zeros(3, requires_grad=True)
        optimizer = SharedScaleAdam(values, 0.2)
        for _ in range(5):
            values.grad = scale * torch.tensor([1.0, -0.1, 0.0])
            optimizer.step()
        torch.testing.assert_close(values.detach(), torch.tensor([-1.0, 0.1, 0.0]))
    values.grad = torch.zeros(3)
    SharedScaleAdam(values, 0.2).step()
    assert values.isfinite().all()


# the prior of wide tables


def test_a_column_explains_its_squared_correlation_of_real_targets():
    inputs, targets = regression_table(num_rows=40)
    expected = np.corrcoef(inputs.T, targets)[-1, :-1] ** 2
    np.testing.assert_allclose(explained_alone(table_of(inputs, targets)), expected, rtol=1e-4)


def test_a_column_gains_the_likelihood_of_a_logistic_regression_on_it():
    inputs, targets = regression_table(num_rows=40)
    labels = (targets > 0.5).astype(int)
    # separates the classes
    inputs[:, 5] = targets
    table = table_of(inputs, labels)
    gains = logistic_gain(table.inputs, table.targets.float())
    for column, gain in zip(table.inputs.T, gains, strict=True):
        column = column.double().numpy()[:, None]
        model = LogisticRegression(C=1.0, tol=1e-10).fit(column, labels)
        right = model.predict_log_proba(column)[np.arange(40), labels].mean()
        share = labels.mean()
        none = share * np.log(share) + (1 - share) * np.log(1 - share)
        penalty = model.coef_[0, 0] ** 2 / 2 / 40
        assert float(gain) == pytest.approx(max(0, right - penalty - none), abs=2e-4)
    shares = explained_alone(table)
    torch.testing.assert_close(shares, 1 - (-2 * gains).exp())
    assert shares.argmax() == 5


def test_a_class_with_its_values_far_out_and_apart_is_no_noise():
    """Column 0 separates the classes; column 1, of the larger linear effect, is wrong twice."""
    labels = np.repeat([0, 1], 20)
    inputs = np.zeros((40, 2))
    inputs[20:, 0] = np.linspace(3, 12, 20)
    inputs[18:, 1] = 1.0
    table = table_of(inputs, labels)
    linear = (table.inputs.T @ (table.targets - 0.5)).abs()
    assert linear[0] < linear[1]
    shares = explained_alone(table)
    assert shares[0] > shares[1]


def test_logits_start_from_what_is_explained_per_cost():
    inputs, targets = regression_table(num_rows=40)
    table = table_of(inputs[:, :11], targets)
    alone = explained_alone(table)
    costs = torch.ones(11)
    costs[0] = 4.0
    expected = (alone.clamp_min(1e-4) / costs).log()
    torch.testing.assert_close(prior_logits(table, costs), expected - expected.max())
    # of a group, the sum of its columns
    pairs = Table.of(table.inputs, table.targets, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    expected = (alone[:4].view(2, 2).sum(1)).log()
    torch.testing.assert_close(prior_logits(pairs, torch.ones(2)), expected - expected.max())


# the vote of wide tables


def voting_networks(num_rows):
    """Three voters; gates and prior alike at the start."""
    inputs, targets = regression_table(num_rows=num_rows, num_columns=8)
    engines = [ForwardAttention(8, 2, prior=torch.zeros(8)) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    table = table_of(inputs, targets)
    return GatedNetworks(table, engines, hidden_size=12, generator=generator), engines


def test_every_voter_has_gates_of_its_own():
    networks, engines = voting_networks(num_rows=20)
    networks.begin_phase(1)
    # a network that reads nothing says nothing of its gates
    networks.reader.data.unflatten(1, (3, 4))[:, 1] = 0.0
    before = [engine.logits.detach().clone() for engine in engines]
    networks.step(0.0)
    moved = [
        float((engine.logits.detach() - start).abs().max())
        for engine, start in zip(engines, before, strict=True)
    ]
    assert moved[1] == 0
    # the largest gradient's by the whole range of a phase of one step
    assert moved[0] == pytest.approx(1.0, rel=1e-4)
    assert moved[2] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("num_rows", [20, 400])
def test_every_voter_learns_from_a_bootstrap_sample(num_rows):
    networks, _ = voting_networks(num_rows)
    missing = [set(range(num_rows)) - set(column.tolist()) for column in networks.samples.T]
    # a third of the rows, for each voter others
    assert all(0.2 < len(rows) / num_rows < 0.55 for rows in missing)
    assert missing[0] != missing[1]
    for _ in range(20):
        rows, counts = networks.draw()
        # so that the loss is a mean over what was drawn
        torch.testing.assert_close(counts.mean(0), torch.ones(3))
        for network, absent in enumerate(missing):
            assert not absent & set(rows[counts[:, network] > 0].tolist())


def test_votes_decide_then_earlier_picks_then_the_prior():
    prior = torch.tensor([-4.0, -5.0, -1.0, 0.0, -2.0, -3.0])
    scores = elect([[1, 5, 0], [5, 0, 1], [0, 4, 1]], prior)
    # 0 and 1 have three votes each, 0 the earlier ones; 5 has two and 4 one; none for 3 and 2
    assert scores.sort(descending=True).indices.tolist() == [0, 1, 5, 4, 3, 2]


def test_the_vote_keeps_number_and_budget():
    inputs, targets = regression_table(num_rows=20, num_columns=200)
    costs = np.ones(200)
    costs[0] = 5.0
    for count, budget, num_selected in ((3, 4.5, 3), (9, 4.5, 4), (3, 1.5, 1)):
        selector = SequentialAttentionSelector(
            None, count, costs=costs, budget=budget, random_state=0
        )
        selector.fit(inputs, targets)
        assert selector.support_.sum() == num_selected
        assert 0 not in selector.order_


def test_a_wide_table_of_one_class_or_of_constants_is_no_error():
    inputs, _ = regression_table(num_rows=20, num_columns=200)
    for table, labels in ((inputs, np.zeros(20, int)), (0 * inputs, np.arange(20) % 2)):
        selector = SequentialAttentionSelector(None, 3, steps_per_phase=5, random_state=0)
        assert selector.fit(table, labels).support_.sum() == 3


def test_of_very_many_columns_those_with_no_linear_effect_do_not_compete():
    inputs, targets = regression_table(num_rows=30, num_columns=400)
    columns, goals = torch.from_numpy(inputs).float(), torch.from_numpy(targets).float()
    table = Table.of(columns, goals, torch.arange(400).split(1))
    correlations = np.abs(inputs.T @ (targets - targets.mean()))
    left = screen(table, torch.ones(400), math.inf, 3).tolist()
    assert left == sorted(np.argsort(-correlations)[:60])
    assert len(screen(table, torch.ones(400), math.inf, 150)) == 300
    # what the budget cannot pay for takes nobody's place, and cheap ones gain
    costs = torch.ones(400)
    costs[0], costs[3] = 9.0, 1e6
    assert 3 not in screen(table, costs, 8.0, 3).tolist()
    assert 0 not in screen(table, costs, 8.0, 3).tolist()
    selector = SequentialAttentionSelector(None, 2, random_state=0).fit(inputs, targets)
    assert selector.order_.tolist() == [0, 3]
    # numbers are those of the whole table
    selector.fit(inputs[:, ::-1], targets)
    assert selector.order_[0] == 399


@pytest.mark.parametrize("gate", ["softmax", "linear"])
@pytest.mark.parametrize("num_rows", [60, 300])
def test_of_two_equal_columns_exactly_one_is_selected(gate, num_rows):
    inputs, targets = regression_table(num_rows=num_rows)
    inputs = np.column_stack([inputs, inputs[:, 0], inputs[:, 3]])
    selector = SequentialAttentionSelector(None, 3, gate=gate, random_state=0)
    support = selector.fit(inputs, targets).support_
    assert support[[0, 12]].sum() == 1
    assert support[[3, 13]].sum() == 1
    assert support[7]


def test_units_of_measurement_do_not_matter():
    inputs, targets = regression_table()
    scales = np.logspace(-9, 9, 12)
    plain, scaled = (
        SequentialAttentionSelector(None, 3, random_state=0).fit(table, targets).order_.tolist()
        for table in (inputs, inputs * scales + scales)
    )
    assert plain == scaled


def test_constant_columns_come_last():
    inputs, targets = regression_table()
    inputs[:, 1], inputs[:, 2] = 5.0, 0.1 + 0.2
    selector = SequentialAttentionSelector(None, 3, random_state=0).fit(inputs, targets)
    assert not selector.support_[[1, 2]].any()


def test_more_than_a_hundred_picks_are_all_made():
    inputs, targets = regression_table(num_columns=250)
    selector = SequentialAttentionSelector(None, 230, steps_per_phase=1, random_state=0)
    assert selector.fit(inputs, targets).support_.sum() == 230
    assert len(set(selector.order_)) == 230


# groups and costs


def grouped_table(seed=0):
    """A field of three values, one-hot in columns 2 to 4, decides; nine columns in all."""
    generator = np.random.default_rng(seed)
    field = generator.integers(3, size=300)
    inputs = generator.normal(size=(300, 9))
    inputs[:, 2:5] = np.eye(3)[field]
    return inputs, field


def test_a_group_is_selected_whole():
    inputs, labels = grouped_table()
    by_label = ["a", "a", "field", "field", "field", "b", "b", "a", "c"]
    by_list = [[0, 1, 7], [2, 3, 4], [5, 6], [8]]
    for groups in (by_label, by_list):
        selector = SequentialAttentionSelector(None, 1, groups=groups, random_state=0)
        selector.fit(inputs, labels)
        assert selector.get_support(indices=True).tolist() == [2, 3, 4]
        assert selector.order_.tolist() == [1]
        assert [columns.tolist() for columns in selector.groups_] == by_list


def test_a_budget_is_kept_and_spent_on_what_helps():
    inputs, targets = regression_table()
    costs = np.ones(12)
    costs[0] = 5.0
    selector = SequentialAttentionSelector(costs=costs, budget=2.5, random_state=0)
    assert set(selector.fit(inputs, targets).order_) == {3, 7}
    selector.set_params(budget=7.0)
    assert set(selector.fit(inputs, targets).order_) == {0, 3, 7}


def test_a_number_and_a_budget_both_bound():
    inputs, targets = regression_table()
    selector = SequentialAttentionSelector(None, 2, costs=np.ones(12), budget=9.0, random_state=0)
    assert selector.fit(inputs, targets).support_.sum() == 2


@pytest.mark.parametrize("gate", ["softmax", "linear"])
def test_of_two_equal_columns_the_cheap_one_is_selected(gate):
    inputs, targets = regression_table()
    inputs[:, 5] = inputs[:, 0]
    for dear, cheap in ((0, 5), (5, 0)):
        costs = np.ones(12)
        costs[dear] = 4.0
        selector = SequentialAttentionSelector(None, 3, costs=costs, gate=gate, random_state=0)
        support = selector.fit(inputs, targets).support_
        assert support[cheap]
        assert not support[dear]


# scikit-learn


def test_it_works_in_a_pipeline_and_names_what_it_keeps():
    inputs, targets = regression_table()
    frame = pd.DataFrame(inputs, columns=[f"f{number}" for number in range(12)])
    pipeline = make_pipeline(SequentialAttentionSelector(None, 3, random_state=0), Ridge())
    assert clone(pipeline).fit(frame, targets).score(frame, targets) > 0.999
    selector = clone(pipeline[0]).set_output(transform="pandas")
    kept = selector.fit_transform(frame, targets)
    assert kept.columns.tolist() == ["f0", "f3", "f7"]
    assert selector.get_feature_names_out().tolist() == ["f0", "f3", "f7"]
    # as they came, not standardised
    pd.testing.assert_frame_equal(kept, frame[["f0", "f3", "f7"]])


def test_the_estimator_answers_on_the_selected_columns():
    inputs, labels = grouped_table()
    groups = [0, 0, 1, 1, 1, 2, 2, 2, 2]
    selector = SequentialAttentionSelector(LogisticRegression(), 1, groups=groups, random_state=0)
    selector.fit(inputs, labels)
    assert selector.estimator_.coef_.shape == (3, 3)
    assert selector.score(inputs, labels) == 1.0
    assert (selector.predict(inputs) == labels).all()
    assert selector.predict_proba(inputs).shape == selector.decision_function(inputs).shape
    assert not hasattr(selector.estimator, "coef_")
    assert is_classifier(selector)
    assert cross_val_score(selector, inputs, labels, cv=2).tolist() == [1.0, 1.0]


def test_without_an_estimator_there_is_nothing_to_predict_with():
    selector = SequentialAttentionSelector().fit(*regression_table(num_rows=20))
    for method in ("predict", "predict_proba", "decision_function", "score"):
        assert not hasattr(selector, method)
    assert not hasattr(selector, "estimator_")
    assert not hasattr(SequentialAttentionSelector(Ridge()), "predict_proba")


def test_the_estimators_type_decides_what_whole_numbers_mean():
    inputs, targets = regression_table(num_rows=100)
    counts = np.round(targets * 10)
    regressor = SequentialAttentionSelector(Ridge(), 3, random_state=0).fit(inputs, counts)
    assert is_regressor(regressor)
    assert not hasattr(regressor, "classes_")
    assert set(regressor.order_) == {0, 3, 7}
    alone = SequentialAttentionSelector(None, 3, steps_per_phase=1).fit(inputs, counts)
    assert len(alone.classes_) == len(set(counts))


def test_a_seed_decides_everything_and_the_global_one_nothing():
    inputs, targets = regression_table(num_rows=50)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(orders))
        np.random.seed(len(orders))
        before = torch.get_rng_state()
        selector = SequentialAttentionSelector(None, 9, steps_per_phase=5, random_state=seed)
        orders.append(selector.fit(inputs, targets).order_.tolist())
        assert torch.equal(before, torch.get_rng_state())
    assert orders[0] == orders[1] != orders[2]


# what a user can get wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_features_to_select": 0}, "between 1 and the 12 columns or groups, got 0"),
        ({"n_features_to_select": 13}, "got 13"),
        ({"n_features_to_select": 0.5}, "got 0.5"),
        ({"n_features_to_select": True}, "got True"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"steps_per_phase": 1.5}, "steps_per_phase must be .*, got 1.5"),
        ({"gate": "hard"}, "gate must be 'softmax' or 'linear', got 'hard'"),
        ({"budget": 3.0}, "budget needs costs, got budget=3.0"),
        ({"costs": [1.0] * 12, "budget": 0.5}, "cheapest column or group, 1, got 0.5"),
        ({"costs": [1.0] * 12, "budget": float("nan")}, "got nan"),
        ({"costs": [1.0] * 11}, "costs must be 12 positive numbers"),
        ({"costs": [0.0] * 12}, "costs must be 12 positive numbers"),
        ({"costs": {"a": 1.0}}, "label per column in groups .*, got no labels"),
        ({"groups": list("aaaabbbbcccc"), "costs": {"a": 1, "b": 2}}, r"got none for \['c'\]"),
        ({"groups": list("aab")}, "label for each of the 12 columns, got 3"),
        ({"groups": [list(range(12)), [11]]}, "each of the 12 columns once"),
        ({"groups": [list(range(11))]}, "each of the 12 columns once"),
        ({"groups": [list(range(12)), []]}, "none be empty"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_got(arguments, message):
    selector = SequentialAttentionSelector(**arguments)
    with pytest.raises(InputError, match=message):
        selector.fit(*regression_table(num_rows=20))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "llmprune.features")
    with pytest.raises(ImportError, match=r"scikit-learn 1\.6 or newer.*llmprune\[features\]"):
        importlib.import_module("llmprune.features")


# crosses


def exclusive_or(num_rows=400, seed=0):
    """The label is whether two fields agree, of which neither says anything alone."""
    generator = np.random.default_rng(seed)
    fields = {name: generator.choice(["x", "y"], num_rows) for name in "abcd"}
    return fields, (fields["b"] == fields["d"]).astype(int)


def test_a_cross_is_selected_where_only_the_pair_tells():
    fields, labels = exclusive_or()
    candidates = cross_candidates(fields, num_buckets=8)
    selector = SequentialAttentionSelector(
        groups=candidates.groups, costs=candidates.costs, budget=2.0, random_state=0
    ).fit(candidates.inputs, labels)
    chosen = {
        label for label, kept in zip(candidates.groups, selector.support_, strict=True) if kept
    }
    assert chosen == {"b x d"}


def test_crosses_hash_rows_alike_wherever_they_come():
    fields, _ = exclusive_or()
    whole = cross_candidates(fields, num_buckets=8)
    part = cross_candidates({name: values[7:9] for name, values in fields.items()}, num_buckets=8)
    np.testing.assert_array_equal(part.inputs, whole.inputs[7:9])
    assert part.groups == whole.groups
    assert (whole.inputs.reshape(400, 10, 8).sum(2) == 1).all()
    # the known value pins the hash across processes and versions
    assert cross_candidates({"a": ["x"]}, num_buckets=8).inputs.argmax() == 3


def test_a_cross_costs_what_its_fields_do_and_pairs_can_be_chosen():
    fields, _ = exclusive_or(num_rows=5)
    costs = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
    candidates = cross_candidates(fields, pairs=[("b", "d")], num_buckets=4, costs=costs)
    assert candidates.costs == costs | {"b x d": 10.0}
    assert candidates.inputs.shape == (5, 20)
    assert len(candidates.groups) == 20


def test_values_of_a_cross_are_kept_apart():
    fields = {"a": ["ab", "a"], "b": ["c", "bc"]}
    cross = cross_candidates(fields, pairs=[("a", "b")], num_buckets=1000).inputs[:, 2000:]
    assert cross[0].argmax() != cross[1].argmax()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": {"a": [1], "b": [1, 2]}}, "one value per row each, got lengths"),
        ({"fields": {}}, "got lengths {}"),
        ({"fields": {"a": [1]}, "num_buckets": 0}, "num_buckets must be at least 1, got 0"),
        ({"fields": {"a": [1]}, "pairs": [("a", "z")]}, r"got pairs with \['z'\]"),
        ({"fields": {"a": [1]}, "costs": {"b": 1.0}}, r"no cost for \['a'\]"),
    ],
)
def test_wrong_fields_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        cross_candidates(arguments.pop("fields"), **arguments)


def test_the_block_in_the_docs_runs():
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})
