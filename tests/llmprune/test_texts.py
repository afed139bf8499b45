from __future__ import annotations

import gzip
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from llmprune import texts
from llmprune.errors import InputError
from llmprune.recipe import Calibration, TextSource

PYTHON = "builtin:python-reference"
WIKITEXT = {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}
BODIES = ["a\nb", "", "ü"]


def test_importing_texts_imports_no_heavy_library() -> None:
    code = "import sys, llmprune.texts; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "datasets", "pyarrow"}.isdisjoint(run.stdout.split())


def test_python_reference_holds_every_tenth_topic_out() -> None:
    train = texts.read_texts(TextSource(dataset="builtin:python-reference"))
    test = texts.read_texts(TextSource(dataset="builtin:python-reference", split="test"))
    assert train == texts.read_texts(TextSource(dataset="builtin:python-reference", split="train"))
    assert sum(map(len, train)) > 100_000
    everything = iter(train)
    both = [test[i // 10] if i % 10 == 0 else next(everything) for i in range(len(topics))]
    assert both == [topics[key] for key in sorted(topics)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ({"dataset": "builtin:other"}, "must be builtin:python-reference .*, got builtin:other"),
        (
            {"dataset": "builtin:python-reference", "split": "validation"},
            "split must be train or test, got validation",
        ),
    ],
)
def test_builtin_text_that_there_is_not_is_an_input_error(text: dict[str, str], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        texts.read_texts(TextSource(**text))


@pytest.mark.parametrize("name", ["wiki.test.raw", "a.txt", "notes", "notes.md", "a.txt.gz"])
def test_plain_text_is_one_document_unchanged(tmp_path: Path, name: str) -> None:
    content = " \n = Title = \n \n First line . \r\n\n\rLäst".encode()
    packed = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(packed)
    rows = texts.read_texts(TextSource(dataset=str(tmp_path / name)))
    assert [row.encode() for row in rows] == [content]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz", ".parquet"])
def test_column_of_a_table_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": BODIES}), path)
    else:
        lines = "".join(json.dumps({"n": 1, "body": body}) + "\n" for body in BODIES)
        opener = gzip.open if suffix.endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(lines)
    assert texts.read_texts(TextSource(dataset=str(path), column="body")) == BODIES
    with pytest.raises(InputError, match=r"no text in column 'text'.*body"):
        texts.read_texts(TextSource(dataset=str(path)))
    with pytest.raises(InputError, match="column 'n'"):
        texts.read_texts(TextSource(dataset=str(path), column="n"))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("blank.txt", b" \n\n", "must hold words"),
        ("latin.txt", b"\xff\xfe\xfa", "not a readable UTF-8 text"),
        ("rows.jsonl", b'{"text": "a"}\n{"te', "line 2 must be one JSON object"),
        ("rows.jsonl", b"[1]", "line 1 must be one JSON object, got a list"),
        ("rows.jsonl.gz", b"not gzip", "not a readable"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-6], "not a readable"),
        ("rows.parquet", b"PAR1", "not a parquet file"),
    ],
)
def test_damaged_text_is_an_input_error(
    tmp_path: Path, name: str, content: bytes, rule: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rule):
        texts.read_texts(TextSource(dataset=str(tmp_path / name)))


def test_text_file_that_does_not_exist_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no such text file"):
        texts.read_texts(TextSource(dataset="lost.jsonl.gz"))


@pytest.mark.usefixtures("unreachable_hub")
def test_unreachable_data_set_is_an_input_error_that_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"owner/data/test: the Hub can't.*or a fallback"):
        texts.read_texts(TextSource(dataset="owner/data", split="test"))


@pytest.mark.usefixtures("hub")
def test_data_set_that_the_hub_does_not_have_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no such dataset"):
        texts.read_texts(TextSource(dataset="missing/data"))


@pytest.mark.parametrize(
    ("text", "name", "corpus"),
    [
        (WIKITEXT, "Salesforce/wikitext/wikitext-2-raw-v1/train", "wikitext"),
        (
            WIKITEXT | {"split": "test"},
            "Salesforce/wikitext/wikitext-2-raw-v1/test",
            "wikitext",
        ),
        ({"dataset": "/data/x/wiki.train.head.raw"}, "wiki.train.head.raw", "wikitext"),
        ({"dataset": "./wiki.test.raw"}, "wiki.test.raw", "wikitext"),
        ({"dataset": "/data/wikitext/test.txt"}, "test.txt", "wikitext"),
        ({"dataset": "allenai/c4", "config": "en"}, "allenai/c4/en/train", "c4"),
        (
            {"dataset": "/d/c4-train.00000-of-01024.json.gz"},
            "c4-train.00000-of-01024.json.gz",
            "c4",
        ),
        ({"dataset": "abc4/Books"}, "abc4/Books/train", "abc4/books"),
        ({"dataset": "/data/News.train.jsonl.gz"}, "News.train.jsonl.gz", "news"),
        ({"dataset": "/data/news_test.jsonl"}, "news_test.jsonl", "news"),
        ({"dataset": "/data/poems/train.txt"}, "train.txt", "poems"),
        ({"dataset": PYTHON}, "python-reference/train", "python-reference"),
        ({"dataset": PYTHON, "split": "test"}, "python-reference/test", "python-reference"),
    ],
)
def test_name_has_no_path_and_corpus_no_split(text: dict[str, str], name: str, corpus: str) -> None:
    source = TextSource(**text)
    assert (texts.text_name(source), texts.corpus_of(source)) == (name, corpus)


@pytest.fixture
def cached_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Owner/MyData`, configuration `plain`, split `test`: in the cache, and the switch off."""
    cache = tmp_path / "datasets-cache"
    (tmp_path / "rows.txt").write_text("a\n\nb\n")
    rows = {"test": str(tmp_path / "rows.txt")}
    datasets.load_dataset("text", data_files=rows, cache_dir=str(cache))
    made = next(cache.glob("text/*/*/*/dataset_info.json")).parent
    folder = Path(shutil.copytree(made, cache / "Owner___my_data" / "plain" / "0.0.0" / "abc"))
    (folder / "text-test.arrow").rename(folder / "my_data-test.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"config_name": "plain", "dataset_name": "my_data"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("cached_data_set")
def test_cached_data_set_is_read_offline_with_its_empty_rows_and_no_fallback() -> None:
    text = TextSource(dataset="Owner/MyData", config="plain", split="test", fallback=PYTHON)
    assert texts.resolve_text(text) == text
    assert texts.read_texts(text) == ["a", "", "b"]
    with pytest.raises(InputError, match=r"no text in column 'body'.*text"):
        texts.read_texts(text.model_copy(update={"column": "body"}))


@pytest.mark.usefixtures("cached_data_set")
def test_other_configuration_in_the_cache_does_not_count() -> None:
    text = TextSource(dataset="Owner/MyData", config="other", fallback=PYTHON)
    assert texts.resolve_text(text).dataset == PYTHON


@pytest.mark.usefixtures("unreachable_hub")
@pytest.mark.parametrize(
    ("split", "taken"),
    [
        ("train", "train"),
        ("test", "test"),
        ("validation", "test"),
        ("test[:10%]", "test"),
        ("train[90%:]", "train"),
        ("all", "train"),
    ],
)
def test_builtin_fallback_has_the_split_that_is_held_out_too(split: str, taken: str) -> None:
    text = Calibration(dataset="owner/data", config="raw", split=split, fallback=PYTHON, num_rows=3)
    expected = Calibration(dataset=PYTHON, split=taken, num_rows=3)
    assert texts.resolve_text(text) == expected
    assert texts.read_texts(expected)


@pytest.mark.usefixtures("unreachable_hub")
def test_file_is_a_fallback_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "the cat"}')
    text = TextSource(dataset="owner/data", config="raw", column="body", fallback=str(path))
    found = texts.resolve_text(text)
    assert texts.read_texts(found) == ["the cat"]
    assert (texts.text_name(found), texts.corpus_of(found)) == ("rows.jsonl", "rows")


@pytest.mark.usefixtures("unreachable_hub")
def test_rows_that_the_model_writes_are_a_fallback_for_calibration_alone() -> None:
    own = "builtin:self-generated"
    text = texts.resolve_text(Calibration(dataset="owner/data", fallback=own, num_rows=3))
    assert (text.dataset, text.num_rows) == (own, 3)
    with pytest.raises(InputError, match="fallback must be a local file or builtin:python"):
        texts.resolve_text(TextSource(dataset="owner/data", fallback=own))


def test_fallback_is_told_of_once_for_a_data_set_and_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    splits = ("train", "train", "test", "train", "test")
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        for split in splits:
            texts.resolve_text(TextSource(dataset="owner/told", split=split, fallback=PYTHON))
    said = [record.getMessage() for record in caplog.records if record.name == "llmprune"]
    assert len(said) == 2
    assert all("the Hub can't be reached" in line and "not in the cache" in line for line in said)
    assert [line.split(":")[0] for line in said] == ["owner/told/train", "owner/told/test"]
    assert said[1].endswith("using python-reference/test instead")


@pytest.mark.usefixtures("unreachable_hub")
@pytest.mark.parametrize("fallback", ["lost.txt", "owner/other", "builtin:other", "."])
def test_fallback_that_is_no_file_is_an_input_error(fallback: str) -> None:
    with pytest.raises(InputError, match="owner/data/train: fallback must be a local file or"):
        texts.resolve_text(TextSource(dataset="owner/data", fallback=fallback))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("dataset", "rule"), [("missing/data", "no such dataset"), ("gated/data", "is gated")]
)
def test_a_no_from_the_hub_never_takes_the_fallback(dataset: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        texts.resolve_text(TextSource(dataset=dataset, fallback=PYTHON))


@pytest.mark.usefixtures("hub")
def test_data_set_in_reach_takes_no_fallback() -> None:
    text = TextSource(dataset="owner/tiny", fallback="never looked at")
    assert texts.resolve_text(text) == text


@pytest.mark.usefixtures("unreachable_hub")
@pytest.mark.parametrize("dataset", ["lost.txt", PYTHON, "builtin:other", "./lost"])
def test_text_that_is_not_on_the_hub_takes_no_fallback(dataset: str) -> None:
    text = TextSource(dataset=dataset, fallback=PYTHON)
    assert texts.resolve_text(text) == text
