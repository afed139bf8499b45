import itertools
import json
import math

import pytest

from llmprune.errors import InputError
from llmprune.recipe import Budget
from llmprune_eval import speed
from llmprune_eval.speed import measure_speed, phase_ms
from llmprune_eval.timing import Pass, WarmUp

SIZES = {"batch_size": 2, "context": 11, "new_tokens": 3}


def test_report_of_a_model_against_itself_is_whole(make_llama):
    model = make_llama().train()
    report = measure_speed({"dense": model, "pruned": model}, rounds=3, **SIZES)
    assert list(report.models) == ["dense", "pruned"]
    assert list(report.ratios) == ["pruned"]
    assert (report.rounds, report.device, report.dtype) == (3, "cpu", "float32")
    for timed in report.models.values():
        assert 2 <= timed.warmup_rounds <= 5
        assert timed.decode_tokens_per_s == pytest.approx(2e3 / timed.decode.median_ms)
        for latency in (timed.prefill, timed.decode):
            assert 0 < latency.min_ms <= latency.median_ms <= latency.max_ms < math.inf
    for ratio in (report.ratios["pruned"].prefill, report.ratios["pruned"].decode):
        assert 0 < ratio.low <= ratio.value <= ratio.high < math.inf
    assert model.training
    json.dumps(report.to_json(), allow_nan=False)


def test_model_with_many_more_layers_is_slower(make_llama, make_gpt2):
    models = {"dense": make_llama(num_hidden_layers=40), "pruned": make_llama()}
    report = measure_speed(models, rounds=6, **SIZES)
    for ratio in (report.ratios["pruned"].prefill, report.ratios["pruned"].decode):
        assert ratio.value < 0.5
        assert ratio.conclusive


def test_every_model_is_timed_once_a_round(make_llama, monkeypatch):
    models = {"dense": make_llama(), "a": make_llama(), "b": make_llama()}
    names = {id(model): name for name, model in models.items()}
    timed, progress = [], []
    monkeypatch.setattr(speed, "warm_up", lambda *arguments: WarmUp(2, steady=True))

    def time_pass(model, prompt, new_tokens):
        timed.append(names[id(model)])
        return Pass(1.0, 2.0)

    monkeypatch.setattr(speed, "time_pass", time_pass)
    report = measure_speed(models, rounds=3, on_round=lambda *p: progress.append(p), **SIZES)
    for start in (0, 3, 6):
        assert sorted(timed[start : start + 3]) == ["a", "b", "dense"]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert report.ratios["b"].decode.value == 1.0
    assert not report.ratios["b"].decode.conclusive


def on_a_shared_processor(monkeypatch, models, waited):
    """Let passes of every model wait for that share of prefill and decode, as rounds go."""
    names = {id(model): name for name, model in models.items()}
    shares = {name: itertools.cycle(found) for name, found in waited.items()}
    monkeypatch.setattr(speed, "warm_up", lambda *arguments: WarmUp(2, steady=True))

    def time_pass(model, prompt, new_tokens):
        return Pass(4.0, 2.0, *next(shares[names[id(model)]]))

    monkeypatch.setattr(speed, "time_pass", time_pass)


def test_the_share_without_the_processor_is_the_median_of_the_rounds(make_llama, monkeypatch):
    models = {"dense": make_llama(), "pruned": make_llama()}
    rounds = [(0.0, 0.5), (0.2, 0.6), (0.9, 0.7)]
    on_a_shared_processor(monkeypatch, models, {"dense": rounds, "pruned": [(0.0, 0.0)]})
    report = measure_speed(models, rounds=3, **SIZES)
    dense, pruned = report.models.values()
    assert (dense.prefill.waited, dense.decode.waited) == (0.2, 0.6)
    assert (pruned.prefill.waited, pruned.decode.waited) == (0.0, 0.0)


@pytest.mark.parametrize(("phase", "is_told"), [("prefill", False), ("decode", True)])
def test_a_latency_table_timed_on_a_busy_machine_is_warned_of(
    make_llama, monkeypatch, caplog, phase, is_told
):
    models = {"dense": make_llama(), "none": make_llama()}
    found = {"dense": [(0.05, 0.05)], "none": [(0.1, 0.25)]}
    on_a_shared_processor(monkeypatch, models, found)
    budget = Budget(latency=0.8, phase=phase, context=8)
    assert phase_ms(models, budget) == dict.fromkeys(models, 4.0 if phase == "prefill" else 2.0)
    told = [record.getMessage() for record in caplog.records]
    assert any("had the processor for 25% of none's time" in line for line in told) is is_told
    assert any("do not trust the milliseconds" in line for line in told) is is_told


@pytest.mark.parametrize("name", ["batch_size", "context", "new_tokens", "rounds"])
def test_counts_below_one_are_refused(make_llama, name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        measure_speed({"dense": make_llama()}, **(SIZES | {"rounds": 3} | {name: 0}))


def test_too_many_positions_or_no_model_are_refused(make_gpt2):
    with pytest.raises(InputError, match="max_position_embeddings 64, got 65"):
        measure_speed({"dense": make_gpt2()}, batch_size=1, context=62, new_tokens=3, rounds=1)
    with pytest.raises(InputError, match="at least one model"):
        measure_speed({}, rounds=3, **SIZES)
