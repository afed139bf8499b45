"""What `llmprune eval` and `bench` left in a run, and what a push makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llmprune.card_results import dataset_of, task_results
from llmprune.errors import InputError
from llmprune.publication import read_publication
from llmprune_eval.quality_report import Figure, MetricFigures, QualityReport
from llmprune_eval.results_of_run import read_bench, read_evaluation
from llmprune_eval.task_files import TASKS
from tests.llmprune.hub_runs import add_results, finished_run, front_matter
from tests.llmprune.hub_server import HubServer

REPO = "ann/small"
TOKEN = "hf_" + "aB3" * 10


@pytest.fixture
def run(tmp_path: Path, saved_folder: Path) -> Path:
    return finished_run(tmp_path / "run", saved_folder)


def entry_of(card: str) -> dict[str, Any]:
    """The one result of a card's model-index."""
    (entry,) = front_matter(card)["model-index"][0]["results"]
    return entry


def test_evaluation_and_bench_arrive_and_the_card_has_the_tasks(
    server: HubServer, run: Path, push: Any
) -> None:
    add_results(run)
    code, _, lines = push(run, REPO)
    assert (code, lines) == (0, [])
    files = server.files(REPO)
    assert files["llmprune/evaluation.json"] == (run / "eval" / "evaluation.json").read_bytes()
    assert files["llmprune/bench.json"] == (run / "bench.json").read_bytes()
    assert not {path for path in files if "piqa" in path}
    card = files["README.md"].decode()
    assert "| piqa acc_norm | 68.0 ± 1.0 % | 64.5 ± 2.0 % |" in card
    assert card.index("## Dense and pruned") < card.index("## lm-eval tasks")
    assert "piqa: 200 documents, not all there are, 0-shot" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("baber/piqa", "validation")
    assert (result.metric_type, result.metric_value) == ("acc_norm", 0.6451)
    assert result.metric_args == {
        "num_fewshot": 0,
        "documents": 200,
        "stderr": 0.02,
        "harness": "lm-eval 0.4.13",
    }
    assert result.dataset_args is None
    assert entry_of(card)["task"] == {"type": "text-generation"}


def test_the_card_has_the_times_of_bench_with_what_they_were_measured_on(
    server: HubServer, run: Path, push: Any
) -> None:
    add_results(run)
    file = run / "bench.json"
    # timed on another machine than what the run measured by itself
    file.write_text(file.read_text().replace("Some CPU", "Some GPU"))
    assert push(run, REPO)[0] == 0
    card = server.files(REPO)["README.md"].decode()
    section = card.partition("## Latency and memory\n")[2].partition("\n## ")[0]
    for line in (
        "|  | dense | pruned | pruned / dense |",
        "| load time | 0.25 s | 0.12 s | 0.500 |",
        "| **batch 1, context 128** |  |  |  |",
        "| first token | 80.0 ms (76.0 to 84.0) | 40.0 ms (38.0 to 42.0) "
        "| x 0.500 (0.450 to 0.550) faster |",
        "| tokens a second | 62.5 | 125.0 |  |",
        "| peak memory | 200 MiB | 50 MiB | 0.250 |",
    ):
        assert line in section.splitlines()
    assert section.strip().startswith("Measured by `llmprune bench` on Some GPU")
    assert "**WARNING: other programs ran**" in section
    assert "pruned: pruned, stored weights, bfloat16, attention sdpa" in section
    assert "machine named below each table (Some CPU and Some GPU)" in card
    assert card.index("## lm-eval tasks") < card.index("## Latency and memory")


def test_a_run_without_them_is_pushed_as_before(server: HubServer, run: Path, push: Any) -> None:
    assert push(run, REPO)[0] == 0
    files = server.files(REPO)
    assert not {"llmprune/evaluation.json", "llmprune/bench.json"} & set(files)
    card = files["README.md"].decode()
    assert "## lm-eval tasks" not in card
    assert "## Latency and memory" not in card
    assert "machine named below each table (Some CPU);" in card


def test_what_goes_up_of_an_evaluation_and_what_stays_is_listed(run: Path) -> None:
    add_results(run)
    publication = read_publication(run)
    paths = {upload.path for upload in publication.uploads}
    assert {"llmprune/evaluation.json", "llmprune/bench.json"} <= paths
    assert "eval/dense" in publication.left_out
    assert not {"eval", "eval/evaluation.json", "bench.json"} & set(publication.left_out)


def test_an_evaluation_folder_without_the_report_stays_whole(run: Path) -> None:
    (run / "eval" / "dense").mkdir(parents=True)
    assert "eval" in read_publication(run).left_out


@pytest.mark.parametrize("name", ["bench.json", "eval/evaluation.json"])
def test_a_token_in_them_is_refused(run: Path, name: str) -> None:
    add_results(run)
    file = run / name
    file.write_text(file.read_text().replace("Some CPU", TOKEN))
    with pytest.raises(InputError, match=r"llmprune/(bench|evaluation).json: must hold no access"):
        read_publication(run)


@pytest.mark.parametrize("name", ["bench.json", "eval/evaluation.json"])
def test_a_path_in_them_is_replaced(run: Path, name: str) -> None:
    add_results(run)
    file = run / name
    file.write_text(file.read_text().replace("Some CPU", f"{run.parent}/client/x.txt"))
    found = {upload.path: upload for upload in read_publication(run).uploads}
    upload = found[f"llmprune/{Path(name).name}"]
    assert isinstance(upload.content, bytes)
    assert b"local:x.txt" in upload.content
    assert str(run.parent).encode() not in upload.content


def test_an_evaluation_of_another_model_is_refused_without_a_request(
    server: HubServer, run: Path, push: Any
) -> None:
    add_results(run)
    file = run / "eval" / "evaluation.json"
    found = json.loads(file.read_text())
    found["models"]["pruned"]["fingerprint"] = "1" * 64
    file.write_text(json.dumps(found))
    code, _, lines = push(run, REPO)
    assert code == 2
    assert f"run `llmprune eval {run}` again, or delete it" in lines[-1]
    assert not server.requests


def test_a_bench_of_another_model_is_refused(run: Path) -> None:
    add_results(run)
    assert read_bench(run) is not None
    (run / "bench.json").write_text(
        (run / "bench.json").read_text().replace('"weight_bytes": ', '"weight_bytes": 1')
    )
    with pytest.raises(InputError, match="must be of the model beside it, which is another now"):
        read_bench(run)


@pytest.mark.parametrize(
    ("read", "name"), [(read_bench, "bench.json"), (read_evaluation, "eval/evaluation.json")]
)
def test_a_damaged_file_is_refused(run: Path, read: Any, name: str) -> None:
    assert read(run) is None
    add_results(run)
    (run / name).write_text('{"format": 1')
    with pytest.raises(InputError, match=name):
        read(run)


def test_rows_that_were_local_are_named_by_their_hash(run: Path) -> None:
    evaluation, _ = add_results(run, data="ab" * 32)
    (result,) = task_results(evaluation)
    assert result.dataset_args == {"local_rows_sha256": "ab" * 32}


def test_every_metric_of_a_known_task_becomes_a_result_and_none_of_others(run: Path) -> None:
    both = {label: Figure(value=0.5, stderr=None) for label in ("dense", "pruned")}
    metrics = {name: MetricFigures(figures=both, difference=None) for name in ("acc", "acc_norm")}
    evaluation, _ = add_results(run, metrics=metrics)
    own = evaluation.tasks[0].model_copy(update={"name": "mine"})
    more = evaluation.model_copy(update={"tasks": (*evaluation.tasks, own)})
    results = task_results(more)
    assert [(r.dataset_name, r.metric_type) for r in results] == [
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
    ]
    assert all("stderr" not in result.metric_args for result in results)


def test_the_data_set_of_every_task_is_the_one_that_lm_eval_takes() -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from llmprune_eval.task_files import read_config

    shipped = Path(lm_eval.__path__[0]) / "tasks"
    for name, files in TASKS.items():
        path = shipped / files.yaml
        if files.subtask_column is not None:
            # the group names no data; any of its subtasks does
            configs = map(read_config, sorted(path.parent.glob("*.yaml")))
            config = next(c for c in configs if "dataset_path" in c and "dataset_name" in c)
            subtask = f"{name}_{config['dataset_name']}"
            assert dataset_of(subtask)[:2] == (config["dataset_path"], config["dataset_name"])
            assert dataset_of(name)[0] == config["dataset_path"]
        else:
            config = read_config(path)
            expected = (config["dataset_path"], config.get("dataset_name"))
            assert dataset_of(name)[:2] == expected, name
        split = config.get("test_split") or config["validation_split"]
        assert dataset_of(name)[2] == split, name
    assert dataset_of("mine") is None


def test_an_evaluation_is_read_back_as_it_was(run: Path) -> None:
    evaluation, _ = add_results(run)
    assert read_evaluation(run) == evaluation
    assert QualityReport.from_json(evaluation.to_json()) == evaluation
