from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmprune.calibration import CalibrationSet
from llmprune.errors import InputError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a digit or newline; adds <s> in front unless told not to; context of 8."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "\n": 1, **{str(i): i + 2 for i in range(10)}}))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", model_max_length=8)


def calibration(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    *,
    num_rows: int = 4,
    row_length: int = 3,
    seed: int = 0,
) -> CalibrationSet:
    return CalibrationSet.from_texts(
        texts,
        tokenizer,
        num_rows=num_rows,
        row_length=row_length,
        seed=seed,
        name="digits",
        corpus="digits",
    )


# Each run of three digits occurs once, so that a row tells where in the text it was cut.
COUNTED = ["".join(f"{i:03d}" for i in range(50)) + "99"]


def test_rows_are_consecutive_pieces_of_the_joined_documents(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = calibration(tokenizer, ["123", "45", "6"], num_rows=3).rows
    assert rows.dtype == torch.int64
    # 1 2 3 | \n \n 4 | 5 \n \n, and the 6 fills no row.
    assert sorted(rows.tolist()) == [[1, 1, 6], [3, 4, 5], [7, 1, 1]]


def test_rows_are_drawn_without_repetition_from_the_whole_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    everything = calibration(tokenizer, COUNTED, num_rows=50).rows
    assert sorted(everything.tolist()) == [
        [i // 100 + 2, i // 10 % 10 + 2, i % 10 + 2] for i in range(50)
    ]
    some = calibration(tokenizer, COUNTED, num_rows=20).rows
    assert len({tuple(row) for row in some.tolist()}) == 20
    assert some.tolist() != sorted(some.tolist())
    assert max(some.tolist())[1] > 5


def test_same_seed_gives_same_rows_and_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    one, same, other = (calibration(tokenizer, COUNTED, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.rows, same.rows)
    assert one.fingerprint() == same.fingerprint()
    assert not torch.equal(one.rows, other.rows)
    assert one.fingerprint() != other.fingerprint()


def test_fingerprint_tells_shapes_apart() -> None:
    rows = torch.arange(6)
    prints = {CalibrationSet(rows.view(s), "a", "a").fingerprint() for s in ((2, 3), (3, 2))}
    prints |= {CalibrationSet(rows.view(2, 3), "b", "b", seed=4).fingerprint()}
    assert len(prints) == 2
    assert all(len(value) == 64 for value in prints)


def test_text_shorter_than_a_row_is_an_input_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"digits: .* row of 3 tokens, got 2;"):
        calibration(tokenizer, ["12"])
    with pytest.raises(InputError, match="got 0;"):
        calibration(tokenizer, [])


def test_fewer_rows_than_asked_is_an_input_error_that_counts_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert len(calibration(tokenizer, COUNTED, num_rows=50).rows) == 50
    with pytest.raises(InputError, match=r"at most the 50 rows of 3 tokens .* got 51; lower"):
        calibration(tokenizer, COUNTED, num_rows=51)


def test_first_epoch_goes_through_the_rows_in_order() -> None:
    rows = torch.arange(14).view(7, 2)
    data = CalibrationSet(rows, "a", "a", seed=3)
    assert torch.equal(torch.cat([data.batch(step, 2) for step in range(3)]), rows[:6])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
def test_every_epoch_holds_each_row_once_in_an_order_of_its_own(batch_size: int) -> None:
    rows = torch.arange(14).view(7, 2)
    data = CalibrationSet(rows, "a", "a", seed=3)
    seen = torch.cat([data.batch(step, batch_size) for step in range(28)])[:28]
    epochs = seen.view(4, 7, 2)
    assert all(sorted(epoch.tolist()) == rows.tolist() for epoch in epochs)
    assert len({str(epoch.tolist()) for epoch in epochs}) == 4


def test_batch_depends_on_seed_step_and_size_alone() -> None:
    rows = torch.arange(14).view(7, 2)
    data = CalibrationSet(rows, "a", "a", seed=3)
    torch.manual_seed(0)
    first = data.batch(11, 3)
    data.batch(5, 2)
    torch.manual_seed(1)
    assert torch.equal(CalibrationSet(rows.clone(), "b", "b", seed=3).batch(11, 3), first)
    others = [CalibrationSet(rows, "a", "a", seed=seed).batch(11, 3) for seed in (4, 5, 2**70)]
    assert not all(torch.equal(other, first) for other in others)


def test_impossible_step_is_a_value_error() -> None:
    data = CalibrationSet(torch.zeros(2, 2, dtype=torch.int64), "a", "a")
    for step, batch_size in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="step must be >= 0"):
            data.batch(step, batch_size)
