import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune.checkpoint import save_pruned
from llmprune.latency import Promise
from llmprune.recipe import Budget, Recipe
from llmprune_eval import speed
from llmprune_eval.evaluation import check_promise, evaluate, generate
from llmprune_eval.timing import Pass, WarmUp

WORDS = ["<pad>", "<unk>", "the", "cat", "sat", "on", "mat", "a", "dog", "ran"]


def small_llama(*, intermediate_size=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=intermediate_size,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture
def recipe(tmp_path):
    for name in ("wiki.train.txt", "wiki.test.txt", "other.txt"):
        (tmp_path / name).write_text("the cat sat on the mat " * 20, encoding="utf-8")
    task = {"window": 16, "split": "test"}
    data = {
        "model": {"source": "unused"},
        "calibration": {"dataset": str(tmp_path / "wiki.train.txt")},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
        "evaluation": {
            "perplexity": [
                {**task, "dataset": str(tmp_path / "wiki.test.txt")},
                {**task, "dataset": str(tmp_path / "other.txt")},
                {**task, "dataset": str(tmp_path / "other.txt")},
                {**task, "dataset": str(tmp_path / "other.txt"), "max_windows": 2},
            ],
            "speed": None,
            "prompt": "the cat",
        },
    }
    return Recipe.parse(data)


def test_report_marks_the_corpus_of_calibration_and_measures_each_text_once(
    recipe, tokenizer, tmp_path
):
    dense, pruned = small_llama(), small_llama(intermediate_size=8)
    save_pruned(pruned, tokenizer, tmp_path / "model")
    seen = []
    report = evaluate(
        dense,
        pruned,
        tokenizer,
        recipe=recipe,
        folder=tmp_path / "model",
        on_progress=lambda task, done, total: seen.append(task),
    )
    assert [(text.name, text.in_domain) for text in report.perplexities] == [
        ("wiki.test.txt", True),
        ("other.txt", False),
        ("other.txt", False),
    ]
    # the same text in fewer windows is another measurement
    counts = [text.pruned.num_windows for text in report.perplexities[1:]]
    assert counts[0] > counts[1] == 2
    assert report.dense.parameters - report.pruned.parameters == 2 * 3 * 16 * 8
    assert report.pruned.disk_bytes == sum(
        file.stat().st_size for file in (tmp_path / "model").iterdir()
    )
    assert set(report.samples) == {"dense", "pruned"}
    assert seen[-1] == "other.txt, pruned"


def test_generation_is_greedy_and_begins_with_the_prompt(tokenizer):
    model = small_llama()
    text = generate(model, tokenizer, "the cat")
    assert text.startswith("the cat ")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    for _ in range(24):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_promise_measured_again_keeps_whose_time_it_was(monkeypatch):
    shares = {16: 0.4, 8: 0.0}
    monkeypatch.setattr(speed, "warm_up", lambda *arguments: WarmUp(2, steady=True))
    monkeypatch.setattr(
        speed,
        "time_pass",
        lambda model, *rest: Pass(4.0, 2.0, shares[model.config.intermediate_size]),
    )
    budget = Budget(latency=0.8, context=8)
    promise = Promise(budget, dense_ms=4.0, pruned_ms=2.0)
    dense, pruned = small_llama(), small_llama(intermediate_size=8)
    found = check_promise(promise, dense, pruned, lambda *progress: None)
    assert found.waited == {"dense": 0.4, "pruned": 0.0}
    assert found.measured == {"dense": 4.0, "pruned": 4.0}
