"""lm-eval through this package, on tiny models and rows."""

import gzip
import json
import logging
import random
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmprune.errors import InputError
from llmprune.recipe import PerplexityTask, Recipe
from llmprune_eval.harness import BOOTSTRAP_ITERS, write_yaml
from llmprune_eval.published import Measured, check_published
from llmprune_eval.quality import Extent, evaluate_quality
from llmprune_eval.quality_report import QualityReport, to_markdown
from llmprune_eval.subjects import subjects_of
from llmprune_eval.suite import SHIPPED, Suite, SuiteTask, chosen_suite
from llmprune_eval.task_files import TASKS
from llmprune_eval.task_scores import TaskScores
from tests.llmprune_eval.tiny_tasks import (
    row_of,
    save_data,
    save_groups,
    save_model,
    save_rows,
)

ROOT = Path(__file__).parents[2]
WHOLE = SuiteTask()
SINGLE = [name for name, files in TASKS.items() if files.subtask_column is None]


@pytest.fixture(autouse=True)
def no_pip_list(monkeypatch):
    """lm-eval lists the installed packages in every result, which takes two seconds each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "other", intermediate_size=8, seed=1)


def silent(task, done, total):
    pass


def run(model, out, *, baseline=None, data=None, suite=None, recipe=None, **settings):
    """Evaluate a model folder on tasks; `settings` are those of `chosen_suite`."""
    subjects, _ = subjects_of(str(model), None if baseline is None else str(baseline), None)
    chosen = chosen_suite(suite, settings.get("tasks"), settings.get("limit"))
    extent = Extent(settings.get("texts", ()), chosen, data)
    on_progress = settings.get("on_progress", silent)
    return evaluate_quality(subjects, extent, out, recipe=recipe, on_progress=on_progress)


def own_figures(model, task, data, folder, *, settings=WHOLE):
    """What lm-eval itself gives on the same YAML."""
    folder.mkdir()
    write_yaml(task, settings, data, folder)
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), batch_size=8, device="cpu"),
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP_ITERS,
    )
    return results["results"][task]


def assert_equal_figures(report, task, wanted):
    """Every figure and standard error of lm-eval stands in the report, to the last digit."""
    (found,) = [one for one in report.tasks if one.name == task]
    assert found.num_documents == wanted["sample_len"]
    compared = 0
    for key, value in wanted.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        figure = found.metrics[metric if chosen == "none" else key].figures["model"]
        stderr = wanted[f"{metric}_stderr,{chosen}"]
        assert figure.value == value
        assert figure.stderr == (stderr if isinstance(stderr, float) else None)
        compared += 1
    assert compared == len(found.metrics)


# figures


@pytest.mark.parametrize("task", [name for name in SINGLE if name != "gsm8k"])
def test_figures_are_lm_evals_own_to_the_last_digit(dense, data, tmp_path, task):
    report = run(dense, tmp_path / "out", data=data, tasks=task)
    assert_equal_figures(report, task, own_figures(dense, task, data, tmp_path / "yaml"))


@pytest.mark.slow
def test_figures_of_generated_answers_are_lm_evals_own(dense, data, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: s\ntasks: {gsm8k: {limit: 2, num_fewshot: 1}}\n")
    report = run(dense, tmp_path / "out", data=data, suite=str(suite))
    settings = SuiteTask(limit=2, num_fewshot=1)
    wanted = own_figures(dense, "gsm8k", data, tmp_path / "yaml", settings=settings)
    assert_equal_figures(report, "gsm8k", wanted)
    assert report.tasks[0].num_fewshot == 1


def subtasks_of(task, shipped=Path(lm_eval.__file__).parent / "tasks"):
    folder = (shipped / TASKS[task].yaml).parent
    loaded = [yaml.load(f.read_text(), yaml.BaseLoader) for f in folder.glob("*.yaml")]
    return sorted(one["dataset_name"] for one in loaded if "dataset_name" in one)


@pytest.mark.slow
def test_a_groups_figure_is_lm_evals_and_its_subtasks_are_weighed_as_lm_eval_does(
    dense, other, tmp_path
):
    names = subtasks_of("blimp")
    assert len(names) == 67
    folder = save_groups(tmp_path, {name: 2 + (i % 2) for i, name in enumerate(names)}, {"x": 1})
    report = run(other, tmp_path / "out", baseline=dense, data=folder, tasks="blimp")
    (task,) = report.tasks
    assert (task.num_documents, task.num_subtasks) == (2 * 34 + 3 * 33, 67)
    wanted = own_figures(dense, "blimp", folder, tmp_path / "yaml")
    assert task.metrics["acc"].figures["dense"].value == wanted["acc,none"]
    assert task.metrics["acc"].figures["dense"].stderr == wanted["acc_stderr,none"]
    figures = task.metrics["acc"].figures
    difference = task.metrics["acc"].difference
    assert difference.value == pytest.approx(figures["pruned"].value - figures["dense"].value)


@pytest.mark.slow
def test_a_group_of_groups_is_weighed_by_documents_and_takes_its_shots(dense, tmp_path):
    counts = {name: 2 + i % 3 for i, name in enumerate(subtasks_of("mmlu"))}
    assert len(counts) == 57
    folder = save_groups(tmp_path, {"x": 1}, counts)
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: s\ntasks: {mmlu: {num_fewshot: 2}}\n")
    report = run(dense, tmp_path / "out", data=folder, suite=str(suite))
    settings = SuiteTask(num_fewshot=2)
    wanted = own_figures(dense, "mmlu", folder, tmp_path / "yaml", settings=settings)
    assert_equal_figures(report, "mmlu", wanted)
    stored = TaskScores.model_validate_json((tmp_path / "out" / "model" / "mmlu.json").read_text())
    assert stored.metrics["acc"].aggregation == "mean"
    assert not stored.metrics["acc"].equal_subtasks
    assert stored.num_fewshot == 2


def test_a_subtask_runs_alone(dense, tmp_path):
    folder = save_groups(tmp_path, {"causative": 5, "wh_island": 4}, {"anatomy": 3})
    report = run(dense, tmp_path / "out", data=folder, tasks="blimp_causative,mmlu_anatomy")
    assert [(t.name, t.num_documents) for t in report.tasks] == [
        ("blimp_causative", 5),
        ("mmlu_anatomy", 3),
    ]


def test_the_written_yaml_changes_only_where_rows_come_from(data, tmp_path):
    shipped = Path(lm_eval.__file__).parent / "tasks" / TASKS["hellaswag"].yaml
    for name, folder in (("local", data), ("hub", None)):
        (tmp_path / name).mkdir()
        write_yaml("hellaswag", SuiteTask(), folder, tmp_path / name)
    local = yaml.safe_load((tmp_path / "local" / "hellaswag.yaml").read_text())
    assert set(local) == {
        "include",
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        # there is no such file, and lm-eval would ask for it
        "training_split",
    }
    assert yaml.safe_load((tmp_path / "hub" / "hellaswag.yaml").read_text()) == {
        "include": str(shipped)
    }


def test_local_rows_become_the_prompts_and_targets_of_the_literature(dense, data, tmp_path):
    """Written out by hand: the other tests compare lm-eval with itself on the same rows."""
    tasks = "boolq,arc_easy,hellaswag,winogrande"
    run(dense, tmp_path / "out", data=data, tasks=tasks, limit=3)
    rows = {stem: read_rows(data, stem) for stem in ("boolq/boolq_val", "arc/ARC-Easy_test")}
    boolq = samples(tmp_path / "out", "boolq")
    for sample, row in zip(boolq, rows["boolq/boolq_val"], strict=False):
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        assert sample["arguments"] == [[prompt, " no"], [prompt, " yes"]]
        assert int(sample["target"]) == int(row["answer"])
    arc = samples(tmp_path / "out", "arc_easy")
    for sample, row in zip(arc, rows["arc/ARC-Easy_test"], strict=False):
        prompt = f"Question: {row['question']}\nAnswer:"
        assert sample["arguments"] == [[prompt, f" {text}"] for text in row["choices"]["text"]]
        assert int(sample["target"]) == "ABCD".index(row["answerKey"])
    hellaswag = samples(tmp_path / "out", "hellaswag")[0]
    row = read_rows(data, "hellaswag/hellaswag_val")[0]
    assert hellaswag["arguments"][1] == [f"cat: {row['ctx_a']} The dog", f" {row['endings'][1]}"]
    assert int(hellaswag["target"]) == int(row["label"])
    winogrande = samples(tmp_path / "out", "winogrande")[0]
    row = read_rows(data, "winogrande/winogrande_xl_dev")[0]
    assert winogrande["arguments"][0] == [f"the cat saw the dog under {row['option1']}", " quickly"]


def test_the_same_of_tasks_that_few_have_the_rows_of(dense, data, tmp_path):
    tasks = "arc_challenge,openbookqa,lambada_openai"
    report = run(dense, tmp_path / "out", data=data, tasks=tasks)
    # what the rows were stays with the figures
    assert [len(task.data) for task in report.tasks] == [64, 64, 64]
    for task, stem, question, ask in (
        ("arc_challenge", "arc/ARC-Challenge_test", "question", "Question: {}\nAnswer:"),
        ("openbookqa", "openbookqa/openbookqa_test", "question_stem", "{}"),
    ):
        rows = read_rows(data, stem)
        found = samples(tmp_path / "out", task)
        assert len(found) == len(rows)
        for sample, row in zip(found, rows, strict=True):
            prompt = ask.format(row[question])
            assert sample["arguments"] == [[prompt, f" {text}"] for text in row["choices"]["text"]]
            assert int(sample["target"]) == "ABCD".index(row["answerKey"])
    for sample, row in zip(
        samples(tmp_path / "out", "lambada_openai"),
        read_rows(data, "lambada/lambada_openai_test"),
        strict=True,
    ):
        words, _, last = row["text"].rpartition(" ")
        assert sample["arguments"] == [[words, f" {last}"]]


def test_each_subtask_gets_its_own_rows(dense, tmp_path):
    folder = save_groups(tmp_path, {"causative": 4, "wh_island": 4}, {"anatomy": 3, "virology": 3})
    run(dense, tmp_path / "out", data=folder, tasks="blimp_wh_island,mmlu_virology")
    for task, stem, column, own in (
        ("blimp_wh_island", "blimp/blimp_all", "UID", "wh_island"),
        ("mmlu_virology", "mmlu/mmlu_test", "subject", "virology"),
    ):
        wanted = [row for row in read_rows(folder, stem) if row[column] == own]
        assert [sample["doc"] for sample in samples(tmp_path / "out", task)] == wanted


def samples(out, task):
    with gzip.open(out / "model" / f"{task}.samples.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def read_rows(folder, stem):
    (file,) = folder.glob(f"{stem}.*")
    content = file.read_bytes()
    text = gzip.decompress(content) if file.suffix == ".gz" else content
    return [json.loads(line) for line in text.decode().splitlines()]


# pairs


def test_a_model_does_not_differ_from_itself(dense, data, tmp_path):
    report = run(dense, tmp_path / "out", baseline=dense, data=data, tasks="piqa,lambada_openai")
    for task in report.tasks:
        for both in task.metrics.values():
            neutral = 1.0 if both.difference.kind == "ratio" else 0.0
            found = both.difference
            assert (found.low, found.value, found.high) == (neutral, neutral, neutral)
            assert not found.conclusive


def test_a_planted_difference_is_found_through_the_harness(dense, other, tmp_path):
    """The rows' right answers are those that the dense model prefers."""
    rng = random.Random(0)
    rows = [row_of("piqa", i, rng) for i in range(60)]
    save_rows(tmp_path / "piqa" / "piqa_val.jsonl", rows)
    run(dense, tmp_path / "first", data=tmp_path, tasks="piqa")
    scores = TaskScores.model_validate_json(
        (tmp_path / "first" / "model" / "piqa.json").read_text()
    )
    for row, right in zip(rows, scores.metrics["acc"].documents, strict=True):
        row["label"] = row["label"] if right else 1 - row["label"]
    save_rows(tmp_path / "piqa" / "piqa_val.jsonl", rows)
    report = run(other, tmp_path / "out", baseline=dense, data=tmp_path, tasks="piqa")
    found = report.tasks[0].metrics["acc"]
    assert found.figures["dense"].value == 1.0
    assert found.difference.conclusive
    assert found.difference.high < 0
    assert found.difference.only_dense == round(60 * (1 - found.figures["pruned"].value))


def test_perplexities_of_different_tokenizers_are_not_compared(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 20)
    apart = Path(shutil.copytree(dense, tmp_path / "apart"))
    file = apart / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    file.write_text(json.dumps(words))
    texts = (PerplexityTask(dataset=str(text), window=16),)
    report = run(apart, tmp_path / "out", baseline=dense, texts=texts)
    assert report.texts[0].ratio is None
    assert "other tokenizer" in to_markdown(report)
    same = run(dense, tmp_path / "out", baseline=dense, texts=texts)
    assert same.texts[0].ratio.value == 1.0


# what is kept


def test_lm_evals_own_files_and_ours_are_kept(dense, data, tmp_path):
    report = run(dense, tmp_path / "out", data=data, tasks="arc_easy", limit=5)
    folder = tmp_path / "out" / "model"
    kept = json.loads((folder / "arc_easy.lm-eval.json").read_text())
    figure = report.tasks[0].metrics["acc_norm"].figures["model"]
    assert kept["results"]["arc_easy"]["acc_norm,none"] == figure.value
    assert kept["configs"]["arc_easy"]["metadata"]["version"] == 1.0
    with gzip.open(folder / "arc_easy.samples.jsonl.gz", "rt") as file:
        assert len([json.loads(line) for line in file]) == 5
    assert QualityReport.model_validate_json(report.to_json()) == report


def test_what_is_stored_is_not_run_again_unless_something_differs(dense, data, tmp_path):
    out, seen = tmp_path / "out", []

    def run_again(model=dense, data=data, **settings):
        seen.clear()
        asked = {"tasks": "piqa", "limit": 4, **settings}
        run(model, out, data=data, on_progress=lambda task, *_: seen.append(task), **asked)
        return any("piqa" in task for task in seen)

    assert run_again()
    assert not run_again()
    assert run_again(limit=5)
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    (file,) = changed.glob("piqa/*")
    file.unlink()
    save_rows(changed / "piqa" / "piqa_val.jsonl", [row_of("piqa", 0, random.Random(9))] * 6)
    assert run_again(data=changed, limit=5)
    moved = save_model(tmp_path / "moved")
    assert not run_again(model=moved, data=changed, limit=5)
    moved = save_model(moved, seed=7)
    assert run_again(model=moved, data=changed, limit=5)


def test_scores_of_another_device_are_not_taken_for_this_ones(dense, data, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []

    def run_on(device):
        seen.clear()
        monkeypatch.setattr("llmprune_eval.report._device_name", lambda _: device)
        asked = {"tasks": "piqa", "limit": 4, "on_progress": lambda task, *_: seen.append(task)}
        assert run(dense, out, data=data, **asked).environment["device"] == device
        return any("piqa" in task for task in seen)

    assert run_on("one")
    assert not run_on("one")
    assert run_on("another")


# published figures

RECIPE = {"model": {"source": "unused"}, "prune": {"mlp_channels": {"sparsity": 0.5}}}


def test_a_missed_published_figure_is_a_warning_before_the_table(dense, data, tmp_path):
    recipe = Recipe.parse({**RECIPE, "evaluation": {"published": {"piqa": {"acc": 0.99}}}})
    report = run(dense, tmp_path / "out", data=data, tasks="piqa", recipe=recipe)
    (warning,) = report.warnings
    assert "piqa acc" in warning
    assert "0.99 as published" in warning
    assert to_markdown(report).startswith("**WARNING: piqa acc")
    met = report.tasks[0].metrics["acc"].figures["model"].value
    published = {"piqa": {"acc": round(met, 2)}, "mmlu": {"acc": 0.5}}
    recipe = Recipe.parse({**RECIPE, "evaluation": {"published": published}})
    report = run(dense, tmp_path / "out", data=data, tasks="piqa", recipe=recipe)
    assert not report.warnings
    assert "published figures of mmlu: not measured here" in to_markdown(report)


def test_the_tolerance_is_absolute_for_shares_and_relative_for_perplexities():
    measured = {
        "piqa": {"acc": Measured(0.68, 0.01, is_part=False)},
        "wiki": {"perplexity": Measured(20.5, 0.1, is_part=False)},
    }
    assert not check_published({"piqa": {"acc": 0.699}}, measured, 0.02)
    assert check_published({"piqa": {"acc": 0.701}}, measured, 0.02)
    assert not check_published({"wiki": {"perplexity": 20.1}}, measured, 0.02)
    assert check_published({"wiki": {"perplexity": 20.0}}, measured, 0.02)


def test_a_figure_of_some_documents_may_miss_by_its_sampling_error():
    for stderr, is_part, misses in ((0.05, True, 0), (0.01, True, 1), (0.05, False, 1)):
        measured = {"piqa": {"acc": Measured(0.62, stderr, is_part)}}
        assert len(check_published({"piqa": {"acc": 0.7}}, measured, 0.02)) == misses


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"piqa": {"accuracy": 0.6}}, "accuracy is no metric of it; those are acc"),
        ({"piqa": {"acc": 62.0}}, "must be a share between 0 and 1, got 62"),
    ],
)
def test_a_published_figure_that_can_not_be_is_refused(published, message):
    with pytest.raises(InputError, match=message):
        check_published(published, {"piqa": {"acc": Measured(0.6, None, is_part=False)}}, 0.02)


# what a user gets wrong


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_are_read_and_name_known_tasks(name):
    suite = Suite.read(name)
    assert suite.name == name
    assert set(suite.tasks) <= set(TASKS)
    if name == "full":
        assert set(suite.tasks) == set(TASKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: s\ntasks: {piqa: {limits: 3}}", "unknown key tasks.piqa.limits"),
        ("name: s\ntasks: {piqa: {limit: 0}}", "tasks.piqa.limit"),
        ("name: s\ntasks: {}", "at least one lm-eval task"),
        ("- piqa", "a mapping of keys, got list"),
        ("name: [", "must be YAML"),
    ],
)
def test_a_wrong_suite_is_refused(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        Suite.read(str(tmp_path / "s.yaml"))


def test_a_suite_keeps_its_settings_under_tasks_and_limit():
    chosen = chosen_suite("full", "mmlu,blimp_causative", 7)
    assert list(chosen.tasks) == ["mmlu", "blimp_causative"]
    assert chosen.tasks["mmlu"].num_fewshot == 5
    assert {task.limit for task in chosen.tasks.values()} == {7}
    for arguments in (("absent", None, None), (None, "a,,b", None), (None, "a,a", None)):
        with pytest.raises(InputError):
            chosen_suite(*arguments)
    for limit, suite in ((0, "quick"), (3, None)):
        with pytest.raises(InputError, match="--limit"):
            chosen_suite(suite, None, limit)


def test_unknown_tasks_and_metrics_are_refused(dense, data, tmp_path):
    with pytest.raises(InputError, match=r"must be one of hellaswag, .* got sciq"):
        run(dense, tmp_path / "out", data=data, tasks="sciq")
    with pytest.raises(InputError, match="no subtask of blimp"):
        run(dense, tmp_path / "out", tasks="blimp_nothing")
    suite = tmp_path / "s.yaml"
    suite.write_text("name: s\ntasks: {piqa: {metric: accuracy, limit: 2}}\n")
    with pytest.raises(InputError, match="metric must be one of acc, acc_norm, got accuracy"):
        run(dense, tmp_path / "out", data=data, suite=str(suite))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one row"),
        ('{"goal": "a"}\n', "line 1 must have 'sol1', got the columns goal"),
        ("[1]\n", "line 1 must be one JSON object, got a list"),
        ("{\n", "line 1 must be one JSON object"),
    ],
)
def test_damaged_data_files_are_refused(dense, tmp_path, content, message):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "piqa_val.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        run(dense, tmp_path / "out", data=tmp_path, tasks="piqa")
    assert str(caught.value).startswith("piqa/piqa_val.jsonl: ")


def test_missing_data_files_are_refused_before_a_model_is_read(dense, data, tmp_path):
    with pytest.raises(InputError, match=r"^piqa: --data must hold piqa/piqa_val\.jsonl or pi"):
        run(dense, tmp_path / "out", data=tmp_path, tasks="piqa")
    shots = tmp_path / "s.yaml"
    shots.write_text("name: s\ntasks: {piqa: {num_fewshot: 2}}\n")
    with pytest.raises(InputError, match="must hold piqa/piqa_train"):
        run(dense, tmp_path / "out", data=data, suite=str(shots))
    # the validation split would else be scored in place of the test split
    part = Path(shutil.copytree(data, tmp_path / "part"))
    (file,) = part.glob("arc/ARC-Easy_test*")
    file.unlink()
    with pytest.raises(InputError, match="must hold arc/ARC-Easy_test"):
        run(dense, tmp_path / "out", data=part, tasks="arc_easy")


def test_all_tasks_without_rows_are_named_at_once_with_those_that_have_them(dense, data, tmp_path):
    part = Path(shutil.copytree(data, tmp_path / "part"))
    for folder in ("boolq", "openbookqa", "lambada"):
        shutil.rmtree(part / folder)
    with pytest.raises(InputError) as caught:
        run(dense, tmp_path / "out", data=part, suite="full")
    told = str(caught.value)
    lacking = told.partition("has none of ")[2].partition("; leave them out")[0]
    present = told.partition("--tasks ")[2].partition(", or leave --data out")[0].split(",")
    named = [part.partition(" (")[0] for part in lacking.split(", ")]
    assert set(named) | set(present) == set(TASKS)
    assert not set(named) & set(present)
    assert {"boolq", "openbookqa", "lambada_openai"} <= set(named)
    assert "boolq (boolq/boolq_val)" in lacking
    assert {"piqa", "arc_challenge"} <= set(present)
    with pytest.raises(InputError) as caught:
        run(dense, tmp_path / "out", data=tmp_path, tasks="boolq,mmlu")
    assert "boolq (boolq/boolq_val), mmlu (mmlu/mmlu_test); leave --data out" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_network_or_data_the_missing_data_set_is_named(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"piqa: needs the data set baber/piqa: .* --data"):
        run(dense, tmp_path / "out", tasks="piqa")


def test_without_lm_eval_the_message_says_how_to_install_it(dense, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llmprune_eval.harness")
    with pytest.raises(InputError, match=r'not installed; pip install "llmprune\[eval\]"'):
        run(dense, tmp_path / "out", data=data, tasks="piqa")


def test_a_task_of_ones_own_is_run_by_its_yaml(dense, tmp_path):
    save_rows(tmp_path / "rows.jsonl", [{"q": "the cat", "a": "sat", "b": "ran"}] * 3)
    own = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{[a, b]}}",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "s.yaml").write_text("name: s\ntasks: {own: {include: own.yaml}}\n")
    report = run(dense, tmp_path / "out", suite=str(tmp_path / "s.yaml"))
    assert report.tasks[0].num_documents == 3
    own["doc_to_target"] = "{{nothing_there.x}}"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own | {"test_split": "absent"}))
    with pytest.raises(InputError, match="own: lm-eval can't load the task"):
        run(dense, tmp_path / "out", suite=str(tmp_path / "s.yaml"))


def test_the_harness_leaves_logging_and_output_as_they_were(dense, data, tmp_path, capsys):
    level = logging.getLogger("lm_eval").level
    run(dense, tmp_path / "out", data=data, tasks="lambada_openai")
    assert logging.getLogger("lm_eval").level == level
    assert capsys.readouterr().out == ""
