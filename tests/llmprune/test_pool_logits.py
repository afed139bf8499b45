from __future__ import annotations

import math

import pytest
import torch

from llmprune.pool_logits import group_of, importances_of, starting_logits
from llmprune.selection import Pool
from llmprune.sequential_attention import Phase, Schedule, SequentialAttention

PRIORS = {
    "a": torch.tensor([4.0, 1.0, 0.5, 8.0], dtype=torch.float64),
    "b": torch.tensor([30.0, 20.0], dtype=torch.float64),
    "c": torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64),
}
PRICED = Pool((("a", 0, 4), ("b", 0, 2)), 3, costs=(0.5, 0.5, 0.5, 0.5, 2.0, 2.0), budget=3.0)
POOLS = [PRICED, Pool((("c", 0, 3),), 2)]


def engine_of(variant="capped"):
    return SequentialAttention(
        [group_of(pool) for pool in POOLS],
        Schedule((Phase("sparsify", 4),)),
        variant=variant,
        priors=starting_logits(PRIORS, POOLS),
    )


def test_logits_start_from_importance_per_cost():
    priced, plain = starting_logits(PRIORS, POOLS)
    per_cost = torch.tensor([8.0, 2.0, 1.0, 16.0, 15.0, 10.0]).log()
    assert torch.allclose(priced, per_cost - per_cost.mean())
    assert torch.allclose(plain, PRIORS["c"].log().float() - PRIORS["c"].log().mean().float())


def test_importances_come_back_as_they_went_in():
    priced, plain = importances_of(engine_of(), POOLS, PRIORS)
    assert torch.allclose(priced, torch.cat([PRIORS["a"], PRIORS["b"]]).float())
    assert torch.allclose(plain, PRIORS["c"].float())


def test_importance_per_cost_ranks_as_the_logits_do():
    engine = engine_of()
    with torch.no_grad():
        engine.logits[0].copy_(torch.tensor([0.1, -2.0, 3.0, 0.0, 1.0, -1.0]))
    priced, _ = importances_of(engine, POOLS, None)
    per_cost = priced / torch.tensor(PRICED.costs)
    assert torch.equal(per_cost.argsort(), engine.logits[0].argsort())
    assert float(priced[4]) == pytest.approx(2.0 * math.e)


def test_who_left_earlier_is_worth_no_more_than_who_left_later():
    engine = engine_of("plus_plus")
    with torch.no_grad():
        engine.logits[1].copy_(torch.tensor([0.5, 2.0, 1.0]))
    engine.dropped_at[1] = torch.tensor([-1, 0, 2])
    _, plain = importances_of(engine, POOLS, None)
    assert plain[0] >= plain[2] >= plain[1]


def test_a_pool_with_costs_has_a_budget_in_cost():
    group = group_of(PRICED)
    assert (group.total, group.final) == (6.0, 3.0)
    assert group_of(POOLS[1]).num_kept == 2
