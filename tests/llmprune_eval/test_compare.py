from __future__ import annotations

import json
import math
import re
import statistics
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune import cli, prune, unit_pruning
from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from llmprune_eval import compare as module
from llmprune_eval import stored_scores, workbench
from llmprune_eval.compare import CONTENDERS, Extent, compare
from llmprune_eval.contenders import variant
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.stored_results import Result

torch.set_num_threads(1)
WORDS = ["<unk>", "the", "cat", "sat", "on", "mat", "a", "dog", "ran", "far"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama of four layers, so that whole layers can meet a budget of a quarter."""
    folder = tmp_path_factory.mktemp("compare") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **heads)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (1200,), generator=generator)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS[i] for i in drawn))
    return Recipe.parse(
        {
            "model": {"source": str(model_folder)},
            "calibration": {"dataset": str(text), "num_rows": 8, "row_length": 16},
            "prune": {"heads": {}, "mlp_channels": {}},
            "budget": {"sparsity": 0.25, "tolerance": 0.05},
            "gates": {"steps": 3, "prior_rows": 4},
            "compensation": "mean",
            "reconstruction": {"num_rows": 4},
            "recovery": {"steps": 2},
            "evaluation": {"perplexity": [{"dataset": str(text), "window": 16, "max_windows": 6}]},
        }
    )


@pytest.fixture
def work(monkeypatch):
    """How often each costly step ran."""
    counts = dict.fromkeys(("score", "train", "refit", "recover", "measure", "statistics"), 0)

    def count(place, name, step):
        real = getattr(place, name)

        def counted(*args, **options):
            counts[step] += 1
            return real(*args, **options)

        monkeypatch.setattr(place, name, counted)

    count(stored_scores, "score_units", "score")
    count(stored_scores, "collect_statistics", "statistics")
    count(workbench, "train_scores", "train")
    count(workbench, "reconstruct", "refit")
    count(workbench, "recover", "recover")
    count(workbench, "measure_perplexity", "measure")
    return counts


def stages_of(out, block=0):
    """Method -> stages that comparison.json has figures for."""
    data = json.loads((out / "comparison.json").read_text())
    return {row["method"]: set(row["stages"]) for row in data["blocks"][block]["rows"]}


@pytest.mark.slow
def test_every_method_runs_once_and_stands_in_the_table(recipe, tmp_path, work):
    out = tmp_path / "out"
    data = recipe.model_dump(mode="json")
    budget = data["budget"] | {"sparsity": 0.1, "tolerance": 0.1}
    other = Recipe.parse(data | {"prune": {"heads": {}}, "budget": budget})
    compare({"both": recipe, "heads": other}, out)
    text = (out / "comparison.md").read_text()
    for contender in CONTENDERS.values():
        assert text.count(f"| {contender.label} |") == 2 * (not contender.is_ablation), contender
    figures = json.loads((out / "comparison.json").read_text())["blocks"][0]["rows"]
    for row in figures:
        assert set(row["stages"]) == {"compensated", "refit"}, row["method"]
        assert row["stages"]["refit"]["mean"] > 1
    layers = next(row for row in figures if row["method"] == "block_influence")
    found = layers["stages"]["refit"]["seeds"][0]
    assert found["units"] == {"layers": [1, 4]}
    assert abs(found["removed"] - 0.25) < 0.02
    # one pass of gradients for both blocks: taylor, taylor_squared, fisher; and one matching
    names = [file.name.partition("-")[0] for file in (out / "scores").iterdir()]
    for shared in ("taylor", "taylor_squared", "fisher", "omp"):
        assert names.count(shared) == 1, shared
    assert work["statistics"] == 1
    assert (out / "comparison.png").stat().st_size > 10_000
    done = dict(work)
    compare({"both": recipe, "heads": other}, out)
    assert work == done
    assert (out / "comparison.md").read_text() == text
    compare({"both": recipe, "heads": other}, out, report_only=True)
    assert work == done
    assert (out / "comparison.md").read_text() == text


@pytest.mark.slow
def test_ablations_run_where_they_are_named(recipe, tmp_path):
    names = [name for name, one in CONTENDERS.items() if one.is_ablation]
    out = tmp_path / "out"
    extent = Extent(refit="best:0")
    found = compare({"one": recipe}, out, ["sequential_attention", *names], extent=extent)
    rows = {row.method: row for row in found.blocks[0].rows}
    assert set(rows) == {"sequential_attention", *names}
    for name in names:
        assert rows[name].is_control
        assert rows[name].mean("compensated") > 1, name
    settings = {variant(recipe, name).gates for name in names}
    assert len(settings | {recipe.gates}) == len(names) + 1


def test_the_best_go_on_to_the_next_stage(recipe, tmp_path):
    out = tmp_path / "out"
    methods = ("sequential_attention", "random", "wanda", "flap")
    extent = Extent(refit="best:1", recover="best:0", final_windows=0)
    found = compare({"one": recipe}, out, methods, extent=extent)
    others = [row for row in found.blocks[0].ranked("compensated") if row.method != methods[0]]
    stages = stages_of(out)
    assert stages.pop("sequential_attention") == {"compensated", "refit", "recovered"}
    assert stages.pop(others[0].method) == {"compensated", "refit"}
    assert all(left == {"compensated"} for left in stages.values())
    assert found.blocks[0].dense_final.perplexity.num_windows == 75
    own = next(row for row in found.blocks[0].rows if row.method == "sequential_attention")
    assert own.final.perplexity.num_windows == 75
    assert own.final.tokens == {"scores": 64, "gates": 96, "refit": 64, "recovery": 64}


@pytest.mark.slow
def test_a_killed_comparison_goes_on(recipe, tmp_path, work, monkeypatch):
    methods = ("sequential_attention", "magnitude", "wanda")
    whole, out = tmp_path / "whole", tmp_path / "out"
    compare({"one": recipe}, whole, methods)
    expected, work["measure"] = dict(work), 0

    real = workbench.reconstruct
    calls = []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(workbench, "reconstruct", killed)
    with pytest.raises(KeyboardInterrupt):
        compare({"one": recipe}, out, methods)
    compare({"one": recipe}, out, methods)
    assert work["measure"] == expected["measure"]
    assert work["score"] == 2 * expected["score"]
    assert figures(out) == figures(whole)


def figures(out):
    """Every perplexity in comparison.json, method by method."""
    data = json.loads((out / "comparison.json").read_text())
    return [
        (row["method"], stage, found["mean"])
        for block in data["blocks"]
        for row in block["rows"]
        for stage, found in row["stages"].items()
    ]


@pytest.mark.slow
def test_further_seeds_give_mean_and_spread(recipe, tmp_path):
    out = tmp_path / "out"
    methods = ("sequential_attention", "random", "magnitude", "wanda")
    found = compare({"one": recipe}, out, methods, extent=Extent(seeds=3, refit="none"))
    (block,) = found.blocks
    seeded = {r.method for r in block.rows if len(r.stages["compensated"].results) == 3}
    first = {r.method: r.stages["compensated"].values[0] for r in block.rows}
    baselines = sorted(methods[1:], key=lambda method: first[method])
    assert seeded == {"sequential_attention", *baselines[:2]}
    for row in block.rows:
        values = row.stages["compensated"].values
        assert row.mean("compensated") == pytest.approx(sum(values) / len(values))
        if row.method in seeded:
            spread = row.stages["compensated"].spread
            assert spread == pytest.approx(statistics.stdev(values))
            cell = f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} (3)"
            assert cell in (out / "comparison.md").read_text()
    one = compare({"one": recipe.model_copy(update={"seed": 2})}, out, methods[:1]).blocks[0]
    third = next(r for r in block.rows if r.method == methods[0]).stages["compensated"].results[2]
    assert one.rows[0].stages["compensated"].results[0] == third


def test_the_best_baselines_and_controls_are_repeated_with_other_seeds(recipe):
    value = {"sequential_attention": 30.0, "prior_alone": 29.0, "gradual": 31.0}
    value |= {"as_published": 32.0, "faster_gates": 28.0}
    value |= {"taylor_squared": 40.0, "wanda": 50.0, "flap": 60.0}
    asked = []

    def fetch(job):
        asked.append((job.method, job.seed))
        nll = math.log(value.get(job.method, 20.0))
        return Result(Perplexity(math.exp(nll), 15, 1, 16, nll, None, (nll,)))

    module.table_of("one", recipe, list(value), Extent(seeds=2, refit="none"), fetch)
    repeated = {method for method, seed in asked if seed == 1}
    wanted = {"sequential_attention", "prior_alone", "gradual", "taylor_squared", "wanda"}
    assert repeated == wanted


def test_a_method_that_can_not_meet_the_budget_has_a_row_with_the_reason(recipe, tmp_path):
    budget = recipe.budget.model_copy(update={"sparsity": 0.4})
    out = tmp_path / "out"
    recipe = recipe.model_copy(update={"budget": budget})
    found = compare({"one": recipe}, out, ("magnitude", "block_influence"))
    assert found.blocks[0].rows[1].mean("compensated") is None
    assert found.blocks[0].rows[0].mean("refit") is not None
    assert re.search(r"whole layers: no figure: .*must be met within", found.to_markdown())


@pytest.mark.parametrize("form", ["uniform", "per_layer"])
def test_budgets_by_importance_are_met_by_every_method(recipe, tmp_path, form):
    data = recipe.model_dump(mode="json")
    data["budget"] |= {"allocation": "importance"}
    methods = ("sequential_attention", "wanda", "gradual_magnitude")
    one = Recipe.parse(data | {"export": {"format": form}})
    found = compare({"one": one}, tmp_path / "out", methods, extent=Extent(refit="none"))
    rows = {row.method: row for row in found.blocks[0].rows}
    if form == "uniform":
        assert "needs gates.prior, got none" in rows.pop("gradual_magnitude").result.refused
    for row in rows.values():
        assert row.result.removed == pytest.approx(0.25, abs=0.05), row.method


@pytest.mark.parametrize("form", ["uniform", "per_layer"])
def test_a_comparison_keeps_what_prune_keeps(recipe, tmp_path, monkeypatch, form):
    """Layers and residual channels too, where importance divides the budget between all kinds."""
    trained_under = []

    def train_scores(recipe, folder, found, pool_list, watch):
        trained_under.append(pool_list)
        return unit_pruning_train_scores(recipe, folder, found, pool_list, watch)

    unit_pruning_train_scores = unit_pruning.train_scores
    monkeypatch.setattr(unit_pruning, "train_scores", train_scores)
    monkeypatch.setattr(workbench, "train_scores", train_scores)
    data = recipe.model_dump(mode="json")
    kinds = {"layers": {}, "hidden_channels": {}, "kv_groups": {}, "mlp_channels": {}}
    budget = data["budget"] | {"allocation": "importance"}
    changes = {"prune": kinds, "budget": budget, "export": data["export"] | {"format": form}}
    if form == "uniform":
        # no stock class has the biases
        changes["compensation"] = "none"
    recipe = Recipe.parse(data | changes)
    prune(recipe, tmp_path / "run")
    compare({"one": recipe}, tmp_path / "out", ["sequential_attention"])
    (file,) = (tmp_path / "out" / "plans").iterdir()
    plan = PrunePlan.read(file)
    assert trained_under[0] == trained_under[1]
    assert plan == PrunePlan.read(tmp_path / "run" / "plan.json")


def test_without_matplotlib_the_table_is_written_all_the_same(
    recipe, tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    compare({"one": recipe}, out, ("magnitude",), extent=Extent(refit="none"))
    assert (out / "comparison.md").is_file()
    assert not (out / "comparison.png").exists()
    assert "llmprune[plots]" in caplog.text


def test_what_a_user_gets_wrong_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=r"--methods must be all or some of .*omp.*got 'best'"):
        compare({"one": recipe}, tmp_path / "out", ("best",))
    with pytest.raises(InputError, match="--refit must be all, none or best:N, got 'some'"):
        Extent(refit="some")
    with pytest.raises(InputError, match="--seeds must be at least 1, got 0"):
        Extent(seeds=0)
    without = recipe.model_copy(update={"budget": None})
    with pytest.raises(InputError, match=r"one: a comparison needs budget\.sparsity"):
        compare({"one": without}, tmp_path / "out")
    still = recipe.model_copy(update={"recovery": recipe.recovery.model_copy(update={"steps": 0})})
    with pytest.raises(InputError, match=r"needs recovery.steps above 0"):
        compare({"one": still}, tmp_path / "out", extent=Extent(recover="best:1"))
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_a_report_without_paths(recipe, tmp_path, monkeypatch):
    file = tmp_path / "one.yaml"
    file.write_text(recipe.to_yaml())
    out = tmp_path / "out"
    words = ["llmprune", "compare", str(file), "--out", str(out), "--methods", "magnitude,random"]
    monkeypatch.setattr(sys, "argv", [*words, "--refit", "none"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    text = (out / "comparison.md").read_text()
    command = "llmprune compare one.yaml --out out --methods magnitude,random --refit none"
    assert f"```\n{command}\n```" in text
    assert str(tmp_path) not in text + (out / "comparison.json").read_text()
    monkeypatch.setattr(sys, "argv", [*words, "--refit", "some"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2


def test_controls_change_only_their_gates(recipe):
    controls = [name for name, one in module.CONTENDERS.items() if one.is_control]
    assert len(controls) == 4 + sum(one.is_ablation for one in module.CONTENDERS.values())
    for name in controls:
        changed = module.variant(recipe, name)
        assert changed.model_copy(update={"gates": recipe.gates}) == recipe
        assert changed.gates != recipe.gates
