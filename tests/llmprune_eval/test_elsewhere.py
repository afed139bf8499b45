"""Every path of a comparison and of `prune` with its models on a GPU that is not there."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune import pipeline, prune
from llmprune.recipe import Recipe
from llmprune_eval.compare import CONTENDERS, Extent, compare
from llmprune_kernels import BlockSparseLinear
from tests.llmprune.elsewhere import elsewhere
from tests.llmprune_eval.test_compare import model_folder, recipe  # noqa: F401


@pytest.fixture(autouse=True)
def no_state_is_left():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def wide_recipe(recipe, model_folder, tmp_path):  # noqa: F811
    """The same of a model that blocks and hidden channels can be pruned from."""
    folder = tmp_path / "wide"
    shutil.copytree(model_folder, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    vocab_size = LlamaConfig.from_pretrained(folder).vocab_size
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **heads)).save_pretrained(folder)
    source = recipe.model.model_copy(update={"source": str(folder)})
    return recipe.model_copy(update={"model": source})


def test_the_gpu_that_is_not_there_refuses_what_a_gpu_refuses():
    here = torch.ones(3)
    with elsewhere():
        there = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="one device"):
            there + here
        with pytest.raises(RuntimeError, match="one device"):
            torch.cat([there, here])
        with pytest.raises(RuntimeError, match="indices"):
            here[torch.zeros(1, dtype=torch.int64, device="cuda")]
        with pytest.raises(TypeError, match="numpy"):
            (2 * there).numpy()
        model = nn.Linear(3, 3).to("cuda")
        with pytest.raises(RuntimeError, match="one device"):
            model(here)
        model(there).sum().backward()
        torch.optim.AdamW(model.parameters()).step()
        found = [copy.deepcopy(model).weight, model.weight.grad, there.new_zeros(2), there[:2]]
        assert all(one.device.type == "cuda" for one in found)
        assert there.cpu().numpy().tolist() == [1.0, 1.0, 1.0]
        assert float(there.sum() * torch.tensor(2.0)) == 6.0
    assert there.device.type == "cpu"


def test_a_dense_copy_goes_when_a_layer_moves_to_another_kind_of_device():
    mask = torch.ones(2, 2, dtype=torch.bool)
    layer = BlockSparseLinear.from_dense(nn.Linear(32, 32), mask).eval()
    layer.keep_dense()
    assert layer.double().dense is not None
    assert layer.to("meta").dense is None


@pytest.mark.slow
def test_every_method_is_compared_on_it(recipe, tmp_path):  # noqa: F811
    extent = Extent(refit="all", recover="best:1", seeds=2, final_windows=0)
    with elsewhere():
        found = compare({"both": recipe}, tmp_path / "out", list(CONTENDERS), extent=extent)
    (block,) = found.blocks
    assert block.dense.environment["device"] == "elsewhere"
    for row in block.rows:
        assert row.result.value is not None, row.result.refused


@pytest.mark.slow
def test_every_kind_of_unit_is_compared_on_it(wide_recipe, tmp_path):
    kinds = {"layers": {}, "kv_groups": {}, "mlp_channels": {}, "hidden_channels": {}}
    budget = {"sparsity": 0.25, "tolerance": 0.1, "allocation": "importance"}
    data = wide_recipe.model_dump(mode="json") | {"prune": kinds, "budget": budget}
    mixed = Recipe.parse(data | {"export": {"format": "per_layer"}})
    methods = [name for name, one in CONTENDERS.items() if not one.is_control]
    with elsewhere():
        found = compare({"mixed": mixed}, tmp_path / "out", methods, extent=Extent(refit="all"))
    refused = {row.method: row.result.refused for row in found.blocks[0].rows}
    assert not {name: said for name, said in refused.items() if said}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gates": {"steps": 4, "sparsify": 0.5, "sparse": 0.5, "prior_rows": 4, "seeds": 2}},
        {"gates": {"steps": 4, "variant": "plus_plus", "train": "all", "prior_rows": 4}},
        {"gates": {"steps": 2, "train": "lora"}, "recovery": {"steps": 2, "train": "lora"}},
        {"weight_blocks": {"block": [16, 16], "sparsity": 0.5, "modules": ["mlp"]}},
    ],
)
def test_prune_runs_on_it(wide_recipe, tmp_path, monkeypatch, changes):
    # a fresh process, on the CPU in any case
    monkeypatch.setattr(pipeline, "verify", lambda folder: None)
    data = wide_recipe.model_dump(mode="json") | changes
    data["evaluation"]["speed"] = None
    if "weight_blocks" in changes:
        data |= {"prune": changes, "budget": None, "compensation": "none"}
        del data["weight_blocks"]
    with elsewhere():
        result = prune(Recipe.parse(data), tmp_path / "out")
        assert result.model.device.type == "cuda"
    assert result.report.environment["device"] == "elsewhere"
