"""What README says can be run, runs."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from llmprune.cli import app
from llmprune.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_every_command_and_option_in_readme_exists():
    lines = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("llmprune ")]
    assert len(commands) >= 5
    for line in commands:
        name = line.split()[1]
        result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, line
        for option in re.findall(r"--[a-z-]+", line.partition("#")[0]):
            assert option in result.output, line


def test_every_recipe_with_overrides_that_readme_and_docs_name_is_one():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = re.findall(r"llmprune prune\s+(recipes/[\w.-]+\.yaml)([^`#]*)", text)
    assert any("--set" in options for _, options in found)
    for recipe, options in found:
        Recipe.read(ROOT / recipe, re.findall(r"--set\s+(\S+=\S+)", options))


def test_the_make_targets_in_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_in_readme_names_every_module():
    for folder in ("llmprune", "eval/llmprune_eval"):
        for file in (ROOT / folder).glob("*.py"):
            if file.name != "__init__.py":
                assert file.name in README, file


@pytest.mark.slow
def test_the_python_block_runs(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    code = code.replace("recipes/smollm2-135m.yaml", str(tiny_recipe))
    found = {}
    exec(code, found)
    assert found["model"].config.intermediate_size == 8
    assert (tmp_path / "runs" / "smollm2-135m" / "verification.json").is_file()


@pytest.fixture
def tiny_recipe(tmp_path):
    """A recipe for a random Llama of two layers with a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "the", "cat", "sat", "on", "mat", "a", "dog", "ran"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "dense"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat a dog ran " * 60, encoding="utf-8")
    recipe = {
        "model": {"source": str(folder)},
        "calibration": {"dataset": str(text), "num_rows": 8, "row_length": 32},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
        "gates": {"steps": 3},
        "reconstruction": {"num_rows": 4},
        "recovery": {"steps": 2},
        "evaluation": {"perplexity": [{"dataset": str(text), "window": 32}], "speed": None},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file
