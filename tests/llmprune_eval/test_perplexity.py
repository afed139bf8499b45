import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from llmprune.errors import InputError
from llmprune_eval import perplexity
from llmprune_eval.documents import encode
from llmprune_eval.perplexity import Perplexity, measure_perplexity
from llmprune_eval.perplexity_intervals import paired_ratio


def whole_logits_perplexity(model, token_ids, window, max_windows=None):
    """The definition, one window at a time over whole logits: value, scored tokens, windows."""
    starts = range(0, len(token_ids), window)
    rows = [token_ids[start : start + window] for start in starts]
    rows = [row for row in rows if len(row) >= 2][:max_windows]
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            logits = model(row[None]).logits[0, :-1].double()
            total += F.cross_entropy(logits, row[1:], reduction="sum").item()
            count += len(row) - 1
    return math.exp(total / count), count, len(rows)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("window", "max_windows", "batch_size"),
    [
        (2, None, 3),
        (17, None, 1),
        (17, None, 4),
        (17, 5, 2),
        (29, None, 2),
        (50, 99, 8),
        (64, 1, 1),
    ],
)
def test_perplexity_equals_whole_logits(
    request, token_ids, family, tied, window, max_windows, batch_size
):
    model = request.getfixturevalue(f"make_{family}")(tie_word_embeddings=tied)
    value, count, windows = whole_logits_perplexity(model, token_ids, window, max_windows)
    got = measure_perplexity(
        model, token_ids, window=window, max_windows=max_windows, batch_size=batch_size
    )
    assert got.value == pytest.approx(value, rel=1e-5)
    assert (got.num_tokens, got.num_windows, len(got.window_nlls)) == (count, windows, windows)
    assert sum(got.window_weights()) == pytest.approx(1.0)


def test_head_runs_on_few_positions_at_once(make_llama):
    ids = torch.randint(99, (600,), generator=torch.Generator().manual_seed(0))
    model = make_llama()
    seen = []
    model.lm_head.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].shape[1]))
    got = measure_perplexity(model, ids, window=300, max_windows=None, batch_size=2)
    assert max(seen) <= perplexity._HEAD_POSITIONS // 2
    assert got.value == pytest.approx(whole_logits_perplexity(model, ids, 300)[0], rel=1e-5)


def capped_gemma2():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=99, final_logit_softcapping=0.5, **sizes, **heads)
    return Gemma2ForCausalLM(config)


def scaled_granite():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return GraniteForCausalLM(GraniteConfig(vocab_size=99, logits_scaling=8.0, **sizes, **heads))


@pytest.mark.parametrize("make", [capped_gemma2, scaled_granite])
def test_logits_changed_after_the_head_are_seen(make, token_ids):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    got = measure_perplexity(model, token_ids, window=31, max_windows=None, batch_size=2)
    assert got.value == pytest.approx(whole_logits_perplexity(model, token_ids, 31)[0], rel=1e-5)


def test_modes_and_weights_are_left_as_they_were(make_llama, token_ids):
    model = make_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first = measure_perplexity(model, token_ids, window=16, max_windows=None)
    assert [module.training for module in model.modules()] == modes
    assert first == measure_perplexity(model, token_ids, window=16, max_windows=None)
    assert all(weight.grad is None for weight in model.parameters())


def test_progress_counts_windows(make_llama, token_ids):
    seen = []
    measure_perplexity(
        make_llama(),
        token_ids,
        window=50,
        max_windows=None,
        batch_size=3,
        on_window=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 5), (4, 5), (5, 5)]


def test_stderr_is_that_of_the_mean_over_equal_windows(make_llama, token_ids):
    got = measure_perplexity(make_llama(), token_ids, window=20, max_windows=10)
    nlls = torch.tensor(got.window_nlls, dtype=torch.float64)
    assert got.nll_stderr == pytest.approx(nlls.std().item() / math.sqrt(10))
    assert measure_perplexity(make_llama(), token_ids, window=20, max_windows=1).nll_stderr is None
    json.dumps(got.to_json(), allow_nan=False)


def test_paired_ratio_of_a_model_to_itself_is_one(make_llama, token_ids):
    got = measure_perplexity(make_llama(), token_ids, window=20, max_windows=None)
    ratio = paired_ratio(got, got)
    assert (ratio.value, ratio.low, ratio.high, ratio.conclusive) == (1.0, 1.0, 1.0, False)


def test_paired_ratio_is_the_ratio_of_the_values(make_llama, token_ids):
    first, second = (
        measure_perplexity(make_llama(seed=seed), token_ids, window=20, max_windows=None)
        for seed in (0, 1)
    )
    ratio = paired_ratio(first, second)
    assert ratio.value == pytest.approx(second.value / first.value)
    assert ratio.low < ratio.value < ratio.high


def planted(nlls):
    mean = sum(nlls) / len(nlls)
    return Perplexity(math.exp(mean), 9 * len(nlls), len(nlls), 10, mean, None, tuple(nlls))


def test_paired_ratio_sees_a_difference_that_windows_drown():
    generator = torch.Generator().manual_seed(0)
    hard = (3 + torch.randn(40, generator=generator)).tolist()
    noise = (0.01 * torch.randn(40, generator=generator)).tolist()
    worse = [nll + 0.05 + shift for nll, shift in zip(hard, noise, strict=True)]
    ratio = paired_ratio(planted(hard), planted(worse))
    assert ratio.conclusive
    assert ratio.low < math.exp(0.05) < ratio.high
    assert ratio.high - ratio.low < 0.02


def test_paired_interval_covers_the_truth_about_95_percent_of_the_time():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(400):
        noise = (0.3 * torch.randn(8, generator=generator)).tolist()
        ratio = paired_ratio(planted([3.0] * 8), planted([3.0 + shift for shift in noise]))
        covered += not ratio.conclusive
    assert 0.92 <= covered / 400 <= 0.98


def test_paired_ratio_refuses_other_windows(make_llama, token_ids):
    got = measure_perplexity(make_llama(), token_ids, window=20, max_windows=None)
    with pytest.raises(InputError, match="same windows"):
        paired_ratio(got, replace(got, window=21))


@pytest.mark.parametrize(
    ("length", "window", "max_windows", "message"),
    [
        (1, 8, None, "at least 2 tokens, got 1"),
        (0, 8, None, "at least 2 tokens, got 0"),
        (20, 1, None, "window must be at least 2, got 1"),
        (20, 8, 0, "max_windows must be at least 1, got 0"),
        (100, 65, None, "max_position_embeddings 64, got 65"),
    ],
)
def test_impossible_requests_are_named(make_gpt2, length, window, max_windows, message):
    ids = torch.zeros(length, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        measure_perplexity(make_gpt2(), ids, window=window, max_windows=max_windows)


def test_ids_of_another_tokenizer_are_refused(make_llama):
    with pytest.raises(InputError, match="below the model's vocabulary of 99, got 99"):
        measure_perplexity(make_llama(), torch.tensor([1, 99]), window=8, max_windows=None)


def test_broken_model_is_named(make_llama, token_ids):
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="must be finite, got nan in window 0"):
        measure_perplexity(model, token_ids, window=8, max_windows=None)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "a", "b", "\n\n", "?"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", model_max_length=3)


def test_encode_joins_rows_without_special_tokens_or_warning(tokenizer, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = encode(["a b ", " b a"], tokenizer)
    assert ids.tolist() == [1, 2, 3, 2, 1]
    assert ids.dtype == torch.int64
    assert not caplog.records
