import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmprune.accelerator import start_accelerator
from llmprune.calibration import CalibrationSet
from llmprune.errors import InputError
from llmprune.recipe import Recipe
from llmprune.run_folder import RunFolder
from llmprune.run_steps import Watch, read_calibration, silent
from llmprune.self_generated import (
    CORPUS,
    conversation_start,
    row_starts,
    sample_rows,
    self_generated_set,
)
from llmprune.sources import load_dense
from llmprune.texts import calibration_name, num_self_generated

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model("llama", layers=1, dtype=torch.float32)


def test_rows_have_their_shape_and_begin_with_the_first_token(model):
    steps = []
    rows = sample_rows(
        model, num_rows=140, row_length=9, seed=0, on_token=lambda done, total: steps.append(total)
    )
    assert rows.shape == (140, 9)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == model.config.bos_token_id).all()
    # 140 rows are two batches of 8 steps each
    assert steps == [16] * 16


def test_equal_seeds_give_equal_rows_and_leave_the_generator_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample_rows(model, num_rows=4, row_length=12, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, sample_rows(model, num_rows=4, row_length=12, seed=1))
    assert not torch.equal(first, sample_rows(model, num_rows=4, row_length=12, seed=2))


def test_rows_follow_the_model_at_temperature_one(model):
    rows = sample_rows(model, num_rows=4096, row_length=2, seed=0)
    found = torch.bincount(rows[:, 1], minlength=tiny.VOCAB) / len(rows)
    with torch.no_grad():
        logits = model(torch.tensor([[model.config.bos_token_id]])).logits[0, -1]
    wanted = logits.softmax(-1)
    # total variation of 4,096 draws from 61 tokens is about 0.05 by chance
    assert (found - wanted).abs().sum() / 2 < 0.1
    assert (logits.div(2).softmax(-1) - wanted).abs().sum() / 2 > 0.2


def test_an_end_of_text_token_does_not_end_a_row(model):
    rows = sample_rows(model, num_rows=64, row_length=40, seed=0)
    position = (rows == model.config.eos_token_id).nonzero()
    early = position[(position[:, 1] > 0) & (position[:, 1] < 30)]
    assert len(early)
    assert any(len(rows[row, column + 1 :].unique()) > 1 for row, column in early.tolist())


def test_rows_begin_with_the_starts_in_turn(model):
    steps = []
    rows = sample_rows(
        model,
        num_rows=5,
        row_length=9,
        seed=0,
        starts=[[1], [7, 8, 9]],
        on_token=lambda done, total: steps.append((done, total)),
    )
    assert rows.shape == (5, 9)
    assert [row[:3] == [7, 8, 9] for row in rows.tolist()] == [False, True, False, True, False]
    assert all(row[0] == 1 for row in rows[::2].tolist())
    # one batch for each start: 8 steps and 6
    assert steps == [(done, 14) for done in range(1, 15)]
    # what a row says follows what it begins with
    alone = sample_rows(model, num_rows=3, row_length=9, seed=0, starts=[[1]])
    assert torch.equal(rows[::2], alone)


def test_there_may_be_fewer_rows_than_starts(model):
    rows = sample_rows(model, num_rows=1, row_length=9, seed=0, starts=[[1], [7, 8, 9]])
    assert rows.shape == (1, 9)
    assert rows[0, 0] == 1


def test_rows_have_room_behind_what_they_begin_with(model):
    with pytest.raises(InputError, match=r"row_length must be above the 8 tokens .* got 8"):
        sample_rows(model, num_rows=1, row_length=8, seed=0, starts=[list(range(8))])


TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [end] ' }}{% endfor %}"
)


def chat_tokenizer(template):
    words = ["<unk>", "[user]", "[end]", "WORDS", "[system]", "polite"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_begins_with_the_template_up_to_the_users_words(model):
    tokenizer = chat_tokenizer("{{ '[system] polite [end] ' }}" + TEMPLATE)
    assert conversation_start(tokenizer) == [4, 5, 2, 1]
    first = model.config.bos_token_id
    assert row_starts("text", model, tokenizer) == row_starts(None, model, tokenizer) == [[first]]
    assert row_starts("both", model, tokenizer) == [[first], [4, 5, 2, 1]]
    assert row_starts("conversations", model, tokenizer) == [[4, 5, 2, 1]]


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "this one has none"), ("{{ '[user]' }}", "before the words of a user")],
)
def test_conversations_need_a_template_that_repeats_the_user(model, template, message):
    with pytest.raises(InputError, match=message):
        row_starts("both", model, chat_tokenizer(template))
    assert row_starts("text", model, chat_tokenizer(template))


def test_a_model_without_a_first_token_is_refused():
    model = tiny.tiny_model("llama", layers=1, dtype=torch.float32)
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(InputError, match="begin-of-text"):
        sample_rows(model, num_rows=1, row_length=8, seed=0)


def test_rows_are_kept_and_taken_up_again(tmp_path):
    calls = []

    def sample():
        calls.append(1)
        return torch.arange(24).view(3, 8)

    file = tmp_path / "calibration.safetensors"
    first = self_generated_set(file, sample, seed=4, may_write=True)
    again = self_generated_set(file, sample, seed=4, may_write=False)
    assert calls == [1]
    assert torch.equal(first.rows, again.rows)
    assert (first.corpus, first.seed) == (CORPUS, 4)


def test_damaged_rows_are_refused(tmp_path):
    file = tmp_path / "calibration.safetensors"
    file.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="delete it"):
        self_generated_set(file, lambda: torch.zeros(1, 8), seed=0, may_write=True)


# some of the rows: `calibration.self_generated`


def calibration(**changes):
    return Recipe.parse(
        {
            "model": {"source": "x"},
            "prune": {"layers": {"sparsity": 0}},
            "calibration": {"dataset": "text.txt", "num_rows": 8, "row_length": 8, **changes},
        }
    ).calibration


@pytest.mark.parametrize(
    ("changes", "count", "name"),
    [
        ({}, 0, "text.txt"),
        ({"self_generated": 0.25}, 2, "text.txt (25% of the rows self-generated)"),
        (
            {"self_generated": 0.5, "self_generated_as": "both"},
            4,
            "text.txt (50% of the rows self-generated, half of them conversations)",
        ),
        ({"self_generated": 0.01}, 0, "text.txt (1% of the rows self-generated)"),
        ({"dataset": "builtin:self-generated"}, 8, "self-generated/train"),
        ({"dataset": "builtin:self-generated", "self_generated": 0.5}, 8, "self-generated/train"),
    ],
)
def test_a_share_of_the_rows_is_the_model_s_own(changes, count, name):
    rows = calibration(**changes)
    assert num_self_generated(rows) == count
    assert calibration_name(rows) == name


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(InputError, match="self_generated"):
        calibration(self_generated=share)


def test_a_share_that_rounds_to_all_rows_is_refused():
    with pytest.raises(InputError, match="must leave the data set a row"):
        num_self_generated(calibration(self_generated=0.99))


def test_both_kinds_of_row_are_mixed_by_the_seed():
    texts = CalibrationSet(torch.arange(48).view(6, 8), "text", "corpus", 3)
    own = CalibrationSet(-torch.arange(1, 17).view(2, 8), CORPUS, CORPUS, 3)
    mixed = texts.mixed_with(own)
    assert sorted(map(tuple, mixed.rows.tolist())) == sorted(
        map(tuple, [*texts.rows.tolist(), *own.rows.tolist()])
    )
    assert not torch.equal(mixed.rows[-2:], own.rows)
    assert (mixed.corpus, mixed.seed) == ("corpus", 3)
    assert torch.equal(mixed.rows, texts.mixed_with(own).rows)
    other = dataclasses.replace(texts, seed=4).mixed_with(own)
    assert not torch.equal(mixed.rows, other.rows)


@pytest.mark.parametrize("kind", ["text", "both"])
def test_a_run_keeps_its_own_rows_and_reads_the_others(tiny_folder, tmp_path, kind):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 40)
    recipe = Recipe.parse(
        {
            "model": {"source": str(tiny_folder)},
            "prune": {"layers": {"sparsity": 0}},
            "calibration": {
                "dataset": str(text),
                "num_rows": 8,
                "row_length": 8,
                "self_generated": 0.25,
                "self_generated_as": kind,
            },
        }
    )
    dense = load_dense(recipe.model)
    dense.tokenizer.chat_template = TEMPLATE
    start = dense.tokenizer("[user] ", add_special_tokens=False).input_ids
    run = RunFolder.begin(tmp_path / "run", recipe, resume=False)
    watch = Watch(start_accelerator(recipe.training, 0), silent)
    rows = read_calibration(recipe, dense, run, watch)
    own = load_file(run.file("calibration.safetensors"))["rows"]
    assert own.shape == (2, 8)
    begins = [row[: len(start)] == start for row in own.tolist()]
    assert begins == [False, kind == "both"]
    ours = [row for row in rows.rows.tolist() if row in own.tolist()]
    assert (len(rows.rows), len(ours)) == (8, 2)
    assert rows.corpus == "text"
    assert torch.equal(read_calibration(recipe, dense, run, watch).rows, rows.rows)
