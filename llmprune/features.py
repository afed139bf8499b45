"""Sequential Attention on the columns of a table, with scikit-learn's interface.

The engine is that of `llmprune.forward_selection`, the training `llmprune.feature_training`; here
are the arguments, the checks and the attributes. Needs the extra `features`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from llmprune.errors import InputError
from llmprune.feature_table import Table, is_wide, prior_logits, screen
from llmprune.feature_training import MAX_NETWORKS, elect, train_selection
from llmprune.forward_selection import ForwardAttention, Gate

try:
    from sklearn.base import BaseEstimator, clone, is_classifier, is_regressor
    from sklearn.feature_selection import SelectorMixin
    from sklearn.utils import Tags, check_random_state, get_tags
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "llmprune.features needs scikit-learn 1.6 or newer; install it with "
        "`pip install 'llmprune[features]'`"
    ) from error

Groups = Sequence[Hashable] | Sequence[Sequence[int]]
Costs = Sequence[float] | Mapping[Hashable, float]

# More picks than this share phases, so that the time of a fit stays bounded.
MAX_PHASES = 100


def _delegated(selector: SequentialAttentionSelector) -> Any:
    """The estimator that answers for the selector: the fitted one where there is one."""
    return getattr(selector, "estimator_", selector.estimator)


def _has(method: str) -> Any:
    def check(selector: SequentialAttentionSelector) -> bool:
        # raises AttributeError of its own where there is no estimator
        getattr(_delegated(selector), method)
        return True

    return check


class SequentialAttentionSelector(SelectorMixin, BaseEstimator):
    """Selects columns, or whole groups of them, by Sequential Attention (arXiv 2209.14881).

    A small network is trained once, behind one gate per candidate. After a warm-up there is one
    phase per pick: the gates of those not yet selected share a softmax, and at the phase's end the
    candidate with the largest logit is selected for good. Since the network has the selected ones
    to learn from, a candidate that only repeats them gets no attention.

    Columns are standardised inside; what `transform` gives are the columns as they came. Up to 256
    rows, several networks share the gates, each on rows drawn for itself (8 of them up to 64 rows,
    2 at 256), since on so few rows the picks of one depend on its random start. With more than 8
    candidates per row, only the 2 per row with the largest linear effect compete; with softmax
    gates, 8 networks then have gates and a bootstrap sample of the rows each, logits start every
    phase from a prior (what each candidate explains alone), and the networks vote at the end. From
    100 picks on, several are made per phase.

    Args:
        estimator: Fitted on the selected columns at the end, a clone of it; `predict`, `score` and
            the like are its. It also decides between classification and regression.
        n_features_to_select: Candidates to select. Default: half of them, or with a budget as
            many as it pays for.
        groups: Columns that are selected together: a label per column, or a list of lists of
            column indices that holds each column once. Default: every column for itself.
        costs: Positive cost of each group (in order of the lists, or of the labels' first
            appearance), or a mapping from label to cost. Default: 1.
        budget: Cost that the selected groups may have together; needs `costs`.
        gate: `softmax` as in the paper, or `linear`: gates that pay a group-LASSO penalty of half
            the threshold at which none would be selected.
        hidden_size: ReLU units of the hidden layer; the paper's 67. Several networks share them
            out.
        steps_per_phase: Optimizer steps before each pick; a fifth of them where there is a prior.
        random_state: Seed; fits with the same one select the same columns.

    Attributes:
        support_: Bool, shape (n_features_in_,), True = selected.
        ranking_: Int, shape (n_features_in_,): the position at which a column's group was picked,
            from 1; one more than the last pick for those not selected.
        order_: Numbers of the selected groups, first pick first.
        groups_: Per group its column indices.
        n_features_in_: Columns seen.
        feature_names_in_: Their names, where they have any.
        estimator_: The fitted estimator, where one was given.
        classes_: The classes, in classification.
    """

    def __init__(
        self,
        estimator: Any = None,
        n_features_to_select: int | None = None,
        *,
        groups: Groups | None = None,
        costs: Costs | None = None,
        budget: float | None = None,
        gate: Gate = "softmax",
        hidden_size: int = 67,
        steps_per_phase: int = 50,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_features_to_select = n_features_to_select
        self.groups = groups
        self.costs = costs
        self.budget = budget
        self.gate = gate
        self.hidden_size = hidden_size
        self.steps_per_phase = steps_per_phase
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> SequentialAttentionSelector:
        """Select columns of X for predicting y.

        Args:
            X: Shape (rows, columns), finite numbers; one-hot what is categorical.
            y: Shape (rows,): real numbers with a fraction mean regression, everything else
                classes, unless the estimator's type says otherwise.

        Raises:
            InputError: An argument out of its range, with what was got.
            ValueError: X or y is not finite, or their rows differ in number.
        """
        inputs, targets = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        self.groups_, labels = _index_lists(self.groups, inputs.shape[1])
        costs = _check_costs(self.costs, len(self.groups_), labels)
        count = self._check_numbers(len(self.groups_), costs)
        # numpy's own generator, so that torch's global one is left alone
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        generator = torch.Generator().manual_seed(seed)
        groups = [torch.from_numpy(columns) for columns in self.groups_]
        columns, goals = torch.from_numpy(_standardised(inputs)), self._targets(targets)
        budget = math.inf if self.budget is None else self.budget
        competing = screen(Table.of(columns, goals, groups), costs, budget, count)
        table = Table.of(columns, goals, [groups[number] for number in competing.tolist()])
        votes = self.gate == "softmax" and is_wide(len(groups), len(inputs))
        prior = prior_logits(table, costs[competing]) if votes else None

        def engine(num_per_phase: int, prior: torch.Tensor | None) -> ForwardAttention:
            return ForwardAttention(
                len(competing),
                min(count, len(competing)),
                num_per_phase=num_per_phase,
                gate=self.gate,
                costs=costs[competing],
                budget=self.budget,
                prior=prior,
                generator=generator,
            )

        engines = [
            engine(math.ceil(count / MAX_PHASES), prior)
            for _ in range(MAX_NETWORKS if votes else 1)
        ]
        train_selection(
            table,
            engines,
            hidden_size=self.hidden_size,
            num_steps=self.steps_per_phase,
            generator=generator,
        )
        chosen = engines[0]
        if prior is not None:
            chosen = engine(count, elect([voter.order for voter in engines], prior))
            chosen.select()
        self.order_ = competing[chosen.order].numpy()
        self.ranking_ = np.full(inputs.shape[1], len(self.order_) + 1)
        for place, number in enumerate(self.order_, start=1):
            self.ranking_[self.groups_[number]] = place
        self.support_ = self.ranking_ <= len(self.order_)
        if self.estimator is not None:
            self.estimator_ = clone(self.estimator).fit(self.transform(X), targets)
        return self

    def _targets(self, y: NDArray) -> torch.Tensor:
        """Class numbers or standardised real targets; sets `classes_` in classification."""
        self.__dict__.pop("classes_", None)
        given = self.estimator is not None
        regression = given and is_regressor(self.estimator)
        if not regression and not (given and is_classifier(self.estimator)):
            regression = type_of_target(y, input_name="y") == "continuous"
        if regression:
            return torch.from_numpy(_standardised(y.astype(np.float64)[:, None])[:, 0])
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        return torch.from_numpy(numbers.astype(np.int64))

    def _check_numbers(self, num_groups: int, costs: torch.Tensor) -> int:
        """How many groups are selected at most, after checking every number."""
        count = self.n_features_to_select
        if count is None:
            count = num_groups if self.budget is not None else max(1, num_groups // 2)
        if not _is_whole(count) or not 1 <= count <= num_groups:
            raise InputError(
                f"n_features_to_select must be a whole number between 1 and the {num_groups} "
                f"columns or groups, got {count!r}"
            )
        for name in ("hidden_size", "steps_per_phase"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.gate not in ("softmax", "linear"):
            raise InputError(f"gate must be 'softmax' or 'linear', got {self.gate!r}")
        if self.budget is not None and self.costs is None:
            raise InputError(
                f"budget needs costs, got budget={self.budget!r} alone; give costs, or "
                "n_features_to_select for a number"
            )
        if self.budget is not None and not self.budget >= float(costs.min()):
            raise InputError(
                f"budget must pay for the cheapest column or group, {float(costs.min()):g}, "
                f"got {self.budget!r}"
            )
        return int(count)

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        return self.support_

    @available_if(_has("predict"))
    def predict(self, X: ArrayLike) -> NDArray:
        """The fitted estimator's, on the selected columns of X."""
        return self._answer("predict", X)

    @available_if(_has("predict_proba"))
    def predict_proba(self, X: ArrayLike) -> NDArray:
        """The fitted estimator's, on the selected columns of X."""
        return self._answer("predict_proba", X)

    @available_if(_has("decision_function"))
    def decision_function(self, X: ArrayLike) -> NDArray:
        """The fitted estimator's, on the selected columns of X."""
        return self._answer("decision_function", X)

    @available_if(_has("score"))
    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """The fitted estimator's, on the selected columns of X."""
        check_is_fitted(self)
        return self.estimator_.score(self.transform(X), y)

    def _answer(self, method: str, X: ArrayLike) -> NDArray:
        check_is_fitted(self)
        return getattr(self.estimator_, method)(self.transform(X))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        if self.estimator is not None:
            inner = get_tags(self.estimator)
            tags.estimator_type = inner.estimator_type
            tags.classifier_tags = inner.classifier_tags
            tags.regressor_tags = inner.regressor_tags
        return tags


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_))


def _standardised(values: NDArray) -> NDArray[np.float32]:
    """Columns of mean 0 and variance 1, constant ones 0."""
    # by the largest value first: squares of very large ones would overflow
    values = values / np.maximum(np.abs(values).max(0), np.finfo(np.float64).tiny)
    values = values - values.mean(0)
    scale = values.std(0)
    # what rounding leaves of a constant column is no signal
    return (values / np.where(scale > 1e-12, scale, np.inf)).astype(np.float32)


def _index_lists(
    groups: Groups | None, num_columns: int
) -> tuple[list[NDArray[np.int64]], list[Hashable] | None]:
    """Per group its columns, and the labels where groups were given by label."""
    if groups is None:
        return [np.array([column]) for column in range(num_columns)], None
    entries = list(groups)
    if all(isinstance(entry, (list, tuple, range, np.ndarray)) for entry in entries):
        lists = [np.array(entry, dtype=np.int64) for entry in entries]
        held = np.sort(np.concatenate(lists)) if lists else np.array([])
        if not np.array_equal(held, np.arange(num_columns)) or any(not len(e) for e in lists):
            raise InputError(
                f"groups must hold each of the {num_columns} columns once and none be empty, "
                f"got {[entry.tolist() for entry in lists]}"
            )
        return lists, None
    if len(entries) != num_columns:
        raise InputError(
            f"groups must give a label for each of the {num_columns} columns, got {len(entries)}; "
            "lists of column indices are the other form"
        )
    members: dict[Hashable, list[int]] = {}
    for column, label in enumerate(entries):
        members.setdefault(label, []).append(column)
    return [np.array(columns) for columns in members.values()], list(members)


def _check_costs(
    costs: Costs | None, num_groups: int, labels: list[Hashable] | None
) -> torch.Tensor:
    """One cost per group, shape (num_groups,)."""
    if costs is None:
        return torch.ones(num_groups)
    if isinstance(costs, Mapping):
        missing = [label for label in labels or [] if label not in costs]
        if labels is None or missing:
            raise InputError(
                "costs by label need a label per column in groups and a cost for each label, "
                f"got {'no labels' if labels is None else f'none for {missing}'}"
            )
        costs = [costs[label] for label in labels]
    values = np.asarray(costs, dtype=np.float64)
    if values.shape != (num_groups,) or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(
            f"costs must be {num_groups} positive numbers, one per column or group, "
            f"got {values.tolist()}"
        )
    return torch.from_numpy(values)
