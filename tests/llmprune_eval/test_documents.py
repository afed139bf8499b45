import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmprune_eval.documents import encode, encode_documents

ARTICLE = " = {} = \n \n one two \n \n = = Part = = \n \n three {} \n \n"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, as SmolLM2's: blanks and line ends are tokens or parts of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=level)


def parts_of(texts, tokenizer):
    """What each document's tokens say."""
    ids, documents = encode_documents(texts, tokenizer)
    assert ids.equal(encode(texts, tokenizer))
    assert documents.of_token.equal(documents.of_token.sort().values)
    return documents.kind, [
        tokenizer.decode(ids[documents.of_token == number])
        for number in documents.of_token.unique()
    ]


def test_articles_of_a_plain_text_begin_with_their_headings(tokenizer):
    first, second = ARTICLE.format("Du Fu", "four"), ARTICLE.format("Kiss You ( song )", "five")
    assert parts_of([f" \n{first}{second}"], tokenizer) == ("articles", [f" \n{first}", second])


def test_articles_of_a_table_begin_with_rows_that_are_headings(tokenizer):
    rows = ["", " = Du Fu = \n", " one two \n", " = = Part = = \n", "", " = Ise = \n", " x \n"]
    kind, parts = parts_of(rows, tokenizer)
    assert kind == "articles"
    assert [part.split() for part in parts] == [
        ["=", "Du", "Fu", "=", "one", "two", "=", "=", "Part", "=", "="],
        ["=", "Ise", "=", "x"],
    ]


def test_else_a_row_of_a_table_is_a_document(tokenizer):
    rows = ["one two", "", "three\n = no heading = \nfour", "five é"]
    kind, parts = parts_of(rows, tokenizer)
    assert kind == "rows"
    assert [part.strip() for part in parts] == [rows[0], rows[2], rows[3]]


@pytest.mark.parametrize("texts", [["one two three"], ["", "one two", " \n"], [" = One = \n a b"]])
def test_one_text_is_one_document(tokenizer, texts):
    kind, parts = parts_of(texts, tokenizer)
    assert kind == "text"
    assert len(parts) == 1


def test_a_tokenizer_that_tells_no_places_makes_one_document():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            assert "return_offsets_mapping" not in options
            return {"input_ids": [1] * len(text)}

    assert encode_documents(["one", "two"], Slow())[1].kind == "text"
