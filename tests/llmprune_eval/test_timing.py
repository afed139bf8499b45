import random
import time

import pytest
import torch

from llmprune_eval.intervals import median_ratio
from llmprune_eval.timing import Pass, prefill, random_prompt, time_pass, time_rounds, warm_up


@pytest.mark.parametrize(
    ("times", "passes", "steady"),
    [
        ([9.0, 5.0, 5.2, 1.0], 3, True),
        ([5.0, 5.1], 2, True),
        ([9.0, 7.0, 5.0, 3.0, 1.0, 1.0], 5, False),
    ],
)
def test_warm_up_ends_when_steady_and_says_when_it_never_was(times, passes, steady):
    left = iter(times)
    found = warm_up(lambda: Pass(next(left), 0.0), 4)
    assert (found.passes, found.steady) == (passes, steady)


def test_a_pass_is_one_prefill_and_single_token_steps(make_llama):
    model = make_llama().eval()
    shapes, logits = [], []
    model.model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    model.register_forward_hook(lambda m, a, out: logits.append(out.logits))
    prompt = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        time_pass(model, prompt, 3)
        assert shapes == [(2, 11), (2, 1), (2, 1), (2, 1)]
        steps = torch.cat([row[:, -1:].argmax(-1) for row in logits[:3]], dim=1)
        whole = model(input_ids=torch.cat([prompt, steps], dim=1)).logits
    torch.testing.assert_close(logits[3][:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_pass_is_timed_by_its_prefill_and_its_median_step(make_llama, monkeypatch):
    # begin, first token, three steps of which one is disturbed
    clock = iter([10.0, 10.5, 10.6, 13.6, 13.8])
    ran = iter([3.0, 3.4, 3.5, 3.55, 3.7])
    monkeypatch.setattr("llmprune_eval.timing.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("llmprune_eval.timing.time.thread_time", lambda: next(ran))
    with torch.no_grad():
        timed = time_pass(make_llama().eval(), torch.zeros(1, 4, dtype=torch.int64), 3)
    assert timed.prefill_ms == pytest.approx(500.0)
    assert timed.decode_ms == pytest.approx(200.0)
    # the thread ran for 400 of the prefill's 500 ms; of the steps' 100, 3000, 200: 100, 50, 150
    assert timed.prefill_waited == pytest.approx(0.2)
    assert timed.decode_waited == pytest.approx(0.25)


def test_a_thread_that_sleeps_is_seen_to_wait(make_llama):
    model, wait_s = make_llama().eval(), 0.05
    model.register_forward_hook(lambda *_: time.sleep(wait_s))
    with torch.no_grad():
        timed = time_pass(model, torch.zeros(1, 4, dtype=torch.int64), 3)
    assert timed.decode_ms >= 1e3 * wait_s
    assert timed.decode_waited > 0.5
    assert timed.switches >= 0


def test_a_cache_of_fixed_size_is_emptied_before_each_prefill(make_llama):
    from transformers import StaticCache

    model = make_llama().eval()
    cache = StaticCache(model.config, max_cache_len=14)
    prompt = torch.randint(99, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = prefill(model, prompt).logits
        for _ in range(2):
            time_pass(model, prompt, 3, cache)
            assert int(cache.get_seq_length()) == 14
        torch.testing.assert_close(prefill(model, prompt, cache).logits, expected)


def test_prompt_fits_the_smallest_vocabulary_and_is_seeded(make_llama):
    models = [make_llama(), make_llama(vocab_size=7)]
    prompt = random_prompt(models, (3, 50), 5)
    assert prompt.max() < 7
    assert torch.equal(prompt, random_prompt(models, (3, 50), 5))
    assert not torch.equal(prompt, random_prompt(models, (3, 50), 6))


def test_every_second_round_reverses_the_one_before_and_coins_differ():
    timed = []

    def time_one(name):
        timed.append(name)
        return Pass(1.0, 1.0)

    passes = time_rounds(["a", "b", "c"], time_one, 40, seed=1)
    assert {name: len(found) for name, found in passes.items()} == {"a": 40, "b": 40, "c": 40}
    rounds = [tuple(timed[start : start + 3]) for start in range(0, 120, 3)]
    for first, second in zip(rounds[::2], rounds[1::2], strict=True):
        assert second == first[::-1]
    assert len(set(rounds[::2])) > 3


class NoisyClock:
    """Times of passes on a machine with a rhythm, drift, bursts, and a dearer second place."""

    def __init__(self, seed, speeds):
        self.random = random.Random(seed)
        self.speeds = speeds
        self.count = 0

    def __call__(self, name):
        self.count += 1
        rhythm = 1.3 if self.count % 4 in (1, 2) else 1.0
        place = 1.0 if self.count % 2 else 1.1
        burst = 1 + (self.random.expovariate(1) if self.random.random() < 0.3 else 0)
        drift = 1 + 0.02 * self.count
        took = rhythm * place * burst * drift * self.random.lognormvariate(0, 0.05)
        return Pass(self.speeds[name] * took, self.speeds[name] * took)


def ratio_of(seed, speeds, rounds=10):
    passes = time_rounds(list(speeds), NoisyClock(seed + 1000, speeds), rounds, seed=seed)
    pairs = zip(passes["a"], passes["b"], strict=True)
    return median_ratio([b.prefill_ms / a.prefill_ms for a, b in pairs])


def test_the_interval_of_equal_models_holds_one_on_a_disturbed_machine():
    found = [ratio_of(seed, {"a": 7.0, "b": 7.0}) for seed in range(400)]
    holds = sum(ratio.low <= 1.0 <= ratio.high for ratio in found)
    assert holds >= 0.95 * 400


def test_the_interval_finds_a_difference_on_a_disturbed_machine():
    found = [ratio_of(seed, {"a": 7.0, "b": 3.0}, rounds=20) for seed in range(100)]
    assert sum(ratio.high < 1.0 for ratio in found) >= 90
    assert sum(ratio.low <= 3 / 7 <= ratio.high for ratio in found) >= 95
