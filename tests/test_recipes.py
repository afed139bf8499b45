"""Every recipe file is read, planned on a tiny model of its family, and its shape built."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmprune.recipe import Recipe
from llmprune.scores import UnitScores
from llmprune.selection import choose
from llmprune.surgery import cut
from llmprune.targets import targets_of
from llmprune.units import map_units
from llmprune.weight_blocks import choose_blocks, map_blocks

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "eval" / "suites").rglob("*.yaml")])
FAMILY = {"qwen3": "qwen3", "gpt2": "gpt2"}


def small_model(path, hidden_size=64):
    """Wide enough for every multiple_of in the recipes, otherwise as small as can be."""
    family = FAMILY.get(path.stem.partition("-")[0], "llama")
    if family == "gpt2":
        options = {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_inner": 2048, "n_positions": 32}
    else:
        options = {
            "hidden_size": hidden_size,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 8192,
            "head_dim": 8,
        }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](vocab_size=64, **options)).eval()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read_and_planned(path):
    recipe = Recipe.read(path)
    model = small_model(path)
    if recipe.prune.weight_blocks is not None:
        block_map = map_blocks(small_model(path, 512), recipe.prune.weight_blocks)
        scores = {name: torch.rand(p.num_blocks) for name, p in block_map.projections.items()}
        plan = choose_blocks(UnitScores(scores), block_map)
        assert 1 - plan.density == pytest.approx(recipe.prune.weight_blocks.sparsity, abs=0.05)
        return
    unit_map = map_units(model)
    targets = targets_of(unit_map, recipe)
    scores = UnitScores({g.name: torch.rand(g.num_units) for g in unit_map.groups.values()})
    plan = choose(scores, unit_map, targets)
    pruned = cut(model, plan, form=recipe.export.format)
    before = sum(p.numel() for p in model.get_submodule(unit_map.architecture.layers).parameters())
    after = sum(p.numel() for p in pruned.get_submodule(unit_map.architecture.layers).parameters())
    assert 1 - after / before == pytest.approx(recipe.budget.sparsity, abs=recipe.budget.tolerance)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_saved_recipe_reads_back_equal(path, tmp_path):
    recipe = Recipe.read(path)
    copy = tmp_path / "recipe.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.read(copy) == recipe
