"""The shape of the project: where packages lie, which way they import, what is public."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVAL_CALLERS = {"pipeline.py", "cli.py", "cli_measure.py"}
ACCELERATE_IMPORTERS = {"accelerator.py"}


def imported_packages(file, *, with_type_checking=False):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = set()
    if not with_type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_source_roots_are_no_packages():
    assert not (ROOT / "eval" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_imports_run_one_way():
    callers = {
        file.name
        for file in (ROOT / "llmprune").rglob("*.py")
        if "llmprune_eval" in imported_packages(file)
    }
    assert callers <= EVAL_CALLERS


def test_accelerate_is_imported_in_one_file():
    importers = {
        file.name
        for folder in ("llmprune", "eval")
        for file in (ROOT / folder).rglob("*.py")
        if "accelerate" in imported_packages(file)
    }
    assert importers == ACCELERATE_IMPORTERS


def test_lm_eval_is_imported_in_one_file():
    importers = {
        file.name
        for folder in ("llmprune", "eval", "kernels")
        for file in (ROOT / folder).rglob("*.py")
        if "lm_eval" in imported_packages(file)
    }
    assert importers == {"harness.py"}


def test_the_travelling_files_import_nothing_of_llmprune():
    for name in ("configuration_decilm.py", "modeling_pruned.py", "stock_logits.py"):
        assert "llmprune" not in imported_packages(ROOT / "llmprune" / name)


def test_the_public_names_are_these():
    import llmprune

    assert set(llmprune.__all__) == {"InputError", "Recipe", "load_pruned", "prune"}
    for name in llmprune.__all__:
        assert getattr(llmprune, name).__name__ == name


def test_importing_llmprune_does_not_import_torch():
    code = "import sys, llmprune, llmprune.cli; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'eval'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_every_recipe_key_is_documented():
    from llmprune.recipe import UNIT_KINDS, Recipe

    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for part, field in Recipe.model_fields.items():
        assert f"## {part}" in text
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"`{key}`" in text, f"{part}.{key}"
    for kind in UNIT_KINDS:
        assert f"`{kind}`" in text
