import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmprune_eval import perplexity_intervals
from llmprune_eval.documents import Documents
from llmprune_eval.perplexity import Perplexity, measure_perplexity
from llmprune_eval.perplexity_intervals import interval_note, nll_stderr, paired_ratio
from llmprune_eval.quality_report import TextFigures


def rows(counts):
    """Documents of so many tokens each."""
    return Documents("rows", torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))


def measure(model, ids, documents, window=20, **options):
    return measure_perplexity(
        model, ids, window=window, max_windows=None, documents=documents, **options
    )


def test_every_scored_token_counts_for_its_own_document(make_llama, token_ids):
    model, window = make_llama(), 16
    counts = [1, 30, 3, 17, 12, 20, 15, 5, 40, 11, 49]
    documents = rows(counts)
    got = measure(model, token_ids, documents, window=window, batch_size=2)
    sums, tokens = [0.0] * len(counts), [0] * len(counts)
    for start in range(0, len(token_ids), window):
        row = token_ids[start : start + window]
        with torch.no_grad():
            losses = F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
        for place, loss in enumerate(losses.tolist(), start + 1):
            sums[documents.of_token[place]] += loss
            tokens[documents.of_token[place]] += 1
    # the first document is the first token, which nothing predicts
    assert got.document_tokens == tuple(tokens[1:])
    assert got.document_nlls == pytest.approx(sums[1:], rel=1e-5)
    assert got.document_kind == "rows"
    assert sum(got.document_nlls) / got.num_tokens == pytest.approx(got.nll_mean)
    without = measure_perplexity(model, token_ids, window=window, max_windows=None, batch_size=2)
    assert replace(got, document_kind="", document_nlls=(), document_tokens=()) == without


def test_of_few_documents_blocks_of_windows_stand_in(make_llama):
    ids = torch.randint(99, (32 * 8,), generator=torch.Generator().manual_seed(0))
    got = measure(make_llama(), ids, rows([100, 100, 56]), window=8)
    assert got.document_kind == "blocks"
    assert got.document_tokens == (21,) * 10 + (14,)
    firsts = [math.fsum(got.window_nlls[i : i + 3]) * 7 for i in range(0, 32, 3)]
    assert got.document_nlls == pytest.approx(firsts)
    assert interval_note(got) == (
        "too few documents, so intervals from 11 blocks of 3 windows drawn anew"
    )


def test_of_few_windows_the_windows_themselves_remain(make_llama, token_ids):
    got = measure(make_llama(), token_ids, Documents("text", torch.zeros(203)), window=40)
    assert (got.document_kind, got.document_tokens) == ("", ())
    assert nll_stderr(got) == got.nll_stderr
    assert interval_note(got) == "intervals from windows, taken as independent"


def planted(sums, tokens):
    """A perplexity of which only the documents matter."""
    mean = math.fsum(sums) / sum(tokens)
    whole = (math.exp(mean), sum(tokens), 1, sum(tokens) + 1, mean, None, (mean,))
    return Perplexity(*whole, "rows", tuple(sums), tuple(tokens))


def drawn(rng, count, effect):
    """Documents of unequal length, each with a shift of its own between the two models."""
    tokens = rng.integers(50, 2000, count)
    base = rng.normal(3.0, 0.5, count)
    shifts = rng.normal(effect, 0.1, count)
    return planted(base * tokens, tokens), planted((base + shifts) * tokens, tokens)


def test_a_standard_error_is_that_of_a_ratio_of_sums():
    rng = np.random.default_rng(0)
    one, _ = drawn(rng, 60, 0.0)
    sums, tokens = np.asarray(one.document_nlls), np.asarray(one.document_tokens)
    # the textbook's, by linearising: residuals of the sums about mean times tokens
    residuals = sums - one.nll_mean * tokens
    expected = residuals.std(ddof=1) / tokens.mean() / math.sqrt(60)
    assert nll_stderr(one) == pytest.approx(expected, rel=0.05)


def test_a_document_hard_for_both_cancels():
    rng = np.random.default_rng(0)
    one, two = drawn(rng, 60, 0.05)
    ratio = paired_ratio(one, two)
    assert ratio.value == pytest.approx(two.value / one.value)
    assert ratio.low < ratio.value < ratio.high
    # alone, each is known to about 7 %
    assert math.log(ratio.high / ratio.low) < 0.5 * 4 * nll_stderr(one)


# ten documents of which the longest is forty times the shortest count for fewer
@pytest.mark.parametrize(("count", "least"), [(10, 0.88), (40, 0.92)])
def test_the_interval_covers_what_other_documents_would_show(count, least, monkeypatch):
    monkeypatch.setattr(perplexity_intervals, "RESAMPLES", 1000)
    rng = np.random.default_rng(count)
    covered = 0
    for _ in range(400):
        ratio = paired_ratio(*drawn(rng, count, 0.2))
        covered += ratio.low <= math.exp(0.2) <= ratio.high
    assert least <= covered / 400 <= 0.985


def test_windows_of_one_document_are_no_independent_sample():
    """Ten windows a document that shift together: their own interval is far too narrow."""
    rng = np.random.default_rng(0)
    covered = {"windows": 0, "documents": 0}
    for _ in range(100):
        shifts = rng.normal(0.2, 0.1, 12)
        nlls = (3.0 + shifts).repeat(10) + rng.normal(0, 0.01, 120)
        sums = nlls.reshape(12, 10).sum(1) * 9
        flat = Perplexity(1.0, 9 * 120, 120, 10, float(nlls.mean()), None, tuple(nlls))
        base = replace(flat, window_nlls=(3.0,) * 120)
        by_document = [
            replace(one, document_kind="rows", document_nlls=s, document_tokens=(90,) * 12)
            for one, s in ((base, (270.0,) * 12), (flat, tuple(sums)))
        ]
        for name, pair in (("windows", (base, flat)), ("documents", by_document)):
            ratio = paired_ratio(*pair)
            covered[name] += ratio.low <= math.exp(0.2) <= ratio.high
    assert covered["documents"] >= 90
    assert covered["windows"] <= 60


def test_a_model_against_itself_is_one(make_llama, token_ids):
    got = measure(make_llama(), token_ids, rows([17] * 11 + [16]))
    ratio = paired_ratio(got, got)
    assert (ratio.value, ratio.low, ratio.high, ratio.conclusive) == (1.0, 1.0, 1.0, False)


def test_results_hold_what_the_interval_is_made_of(make_llama, token_ids):
    one, two = (
        measure(make_llama(seed=seed), token_ids, rows([17] * 11 + [16])) for seed in (0, 1)
    )
    figures = TextFigures(
        name="text",
        in_domain=False,
        perplexities={"dense": one, "pruned": two},
        same_tokens=True,
        ratio=paired_ratio(one, two),
    )
    read = TextFigures.model_validate_json(figures.model_dump_json())
    again = paired_ratio(*read.perplexities.values())
    assert again == read.ratio == figures.ratio
    json.dumps(one.to_json(), allow_nan=False)
