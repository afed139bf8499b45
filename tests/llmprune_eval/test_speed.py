import json
import math

import pytest
import torch

from llmprune.errors import InputError
from llmprune_eval import speed
from llmprune_eval.speed import measure_speed

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


def test_rounds_time_every_model_once_in_alternating_order(make_llama, monkeypatch):
    models = {"dense": make_llama(), "a": make_llama(), "b": make_llama()}
    names = {id(model): name for name, model in models.items()}
    timed, progress = [], []
    monkeypatch.setattr(speed, "_warm_up", lambda *arguments: 2)

    def time_pass(model, prompt, new_tokens):
        timed.append(names[id(model)])
        return speed._Pass(1.0, 2.0)

    monkeypatch.setattr(speed, "_time_pass", time_pass)
    report = measure_speed(models, rounds=3, on_round=lambda *p: progress.append(p), **SIZES)
    assert timed == ["dense", "a", "b", "b", "a", "dense", "dense", "a", "b"]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert report.ratios["b"].decode.value == 1.0
    assert not report.ratios["b"].decode.conclusive


@pytest.mark.parametrize(
    ("times", "rounds"),
    [([9.0, 5.0, 5.2, 1.0], 3), ([5.0, 5.1], 2), ([9.0, 7.0, 5.0, 3.0, 1.0, 1.0], 5)],
)
def test_warm_up_ends_when_steady(monkeypatch, times, rounds):
    left = iter(times)
    monkeypatch.setattr(speed, "_time_pass", lambda *a: speed._Pass(next(left), 0.0))
    assert speed._warm_up(None, None, 4) == rounds


def test_a_pass_is_one_prefill_and_single_token_steps(make_llama):
    model = make_llama().eval()
    shapes, logits = [], []
    model.model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    model.register_forward_hook(lambda m, a, out: logits.append(out.logits))
    prompt = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        speed._time_pass(model, prompt, 3)
        assert shapes == [(2, 11), (2, 1), (2, 1), (2, 1)]
        steps = torch.cat([row[:, -1:].argmax(-1) for row in logits[:3]], dim=1)
        whole = model(input_ids=torch.cat([prompt, steps], dim=1)).logits
    torch.testing.assert_close(logits[3][:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_prompt_fits_the_smallest_vocabulary_and_is_seeded(make_llama):
    models = [make_llama(), make_llama(vocab_size=7)]
    prompt = speed._random_prompt(models, (3, 50), 5)
    assert prompt.max() < 7
    assert torch.equal(prompt, speed._random_prompt(models, (3, 50), 5))
    assert not torch.equal(prompt, speed._random_prompt(models, (3, 50), 6))


@pytest.mark.parametrize("name", ["batch_size", "context", "new_tokens", "rounds"])
def test_counts_below_one_are_refused(make_llama, name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        measure_speed({"dense": make_llama()}, **(SIZES | {"rounds": 3} | {name: 0}))


def test_too_many_positions_or_no_model_are_refused(make_gpt2):
    with pytest.raises(InputError, match="max_position_embeddings 64, got 65"):
        measure_speed({"dense": make_gpt2()}, batch_size=1, context=62, new_tokens=3, rounds=1)
    with pytest.raises(InputError, match="at least one model"):
        measure_speed({}, rounds=3, **SIZES)
