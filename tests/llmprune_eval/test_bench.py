"""`llmprune bench` as a user calls it, and what it concludes from given times."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from llmprune import cli, cli_measure
from llmprune.errors import InputError
from llmprune.recipe import ModelSource, Recipe
from llmprune_eval import bench as bench_module
from llmprune_eval import footprint
from llmprune_eval.bench import BenchSettings, bench, compare_passes
from llmprune_eval.bench_command import bench_subjects, read_counts, results_file
from llmprune_eval.bench_report import (
    BenchReport,
    Point,
    PointModel,
    judge,
    noise_warnings,
    times_of,
)
from llmprune_eval.intervals import make_ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.roofline import Rates
from llmprune_eval.subjects import Subject
from llmprune_eval.timing import Pass, WarmUp
from tests.llmprune_eval.tiny_tasks import save_model

SMALL = ("--context", "8", "--new-tokens", "2", "--rounds", "3")
RATES = Rates(flops_per_s=1e9, bytes_per_s=1e9, buffer_bytes=2**20)
EQUAL = {"first_token": 1.0, "decode": 1.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No child processes, and rates without measuring them."""

    def peak(folder, *, batch_size, context, new_tokens, **options):
        assert Path(folder).is_dir()
        return PeakMemory(2**20 * (100 + batch_size * context), 2**20 * 90, "cpu")

    monkeypatch.setattr(footprint, "measure_peak_memory", peak)
    monkeypatch.setattr(bench_module, "measure_rates", lambda model, shape: RATES)
    monkeypatch.setattr(bench_module, "_load_average", lambda: 0.1)


@pytest.fixture
def run_folder(tmp_path):
    """What prune leaves, as far as bench reads it."""
    recipe = {
        "model": {"source": str(save_model(tmp_path / "dense-model"))},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.parse(recipe).to_yaml())
    save_model(folder / "model", intermediate_size=12, seed=1)
    return folder


def call(monkeypatch, *arguments):
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["llmprune", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def refusal(monkeypatch, capfd, *arguments):
    capfd.readouterr()
    assert call(monkeypatch, *arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line.removeprefix("llmprune: ")


def subject(label, folder):
    return Subject(label, ModelSource(source=str(folder), dtype="float32"), Path(folder).name)


def clocked(monkeypatch, took):
    """Let passes take what `took(model, batch_size, context, count)` says, milliseconds."""
    count = iter(range(10**6))

    def time_pass(model, prompt, new_tokens, cache):
        ms = took(model, *prompt.shape, next(count))
        return Pass(10 * ms, ms)

    monkeypatch.setattr(bench_module, "time_pass", time_pass)


def test_a_run_is_compared_with_its_dense_model_at_every_point(
    monkeypatch, capfd, run_folder, tmp_path
):
    monkeypatch.setattr(cli_measure, "console", Console(width=160))
    options = ("--batch", "1,2", "--context", "8,16", "--new-tokens", 2, "--rounds", 6, "--check")
    assert call(monkeypatch, run_folder, *options) == 0
    shown = capfd.readouterr()
    for words in ("batch 2, context 16", "first token", "roofline", "against itself", "load time"):
        assert words in shown.out
    report = BenchReport.model_validate_json((run_folder / "bench.json").read_text())
    assert list(report.models) == ["dense", "pruned"]
    assert report.models["dense"].name == "dense-model"
    dense, pruned = report.models.values()
    assert dense.parameters > pruned.parameters
    assert pruned.weight_bytes == (run_folder / "model" / "model.safetensors").stat().st_size
    assert len(pruned.load_s.each) == 3
    assert (dense.attention, dense.dtype) == ("sdpa", "float32")
    assert report.environment["cpu_threads"] >= 1
    assert [p.name for p in report.points] == [
        f"batch {b}, context {c}" for b in (1, 2) for c in (8, 16)
    ]
    for point in report.points:
        assert list(point.comparisons) == ["pruned"]
        assert point.comparisons["pruned"].decode.roofline < 1
        assert point.control is not None
        for model in point.models.values():
            assert len(model.first_token.ms.each) == len(model.decode.ms.each) == 6
            assert model.decode_tokens_per_s == pytest.approx(
                1e3 * point.batch_size / model.decode.ms.median
            )
            assert model.peak_memory.model_bytes == 2**20 * (10 + point.batch_size * point.context)
    assert str(tmp_path) not in (run_folder / "bench.json").read_text()


def test_json_is_all_that_stands_on_stdout_and_out_takes_the_file(
    monkeypatch, capfd, run_folder, tmp_path
):
    file = tmp_path / "new" / "times.json"
    assert call(monkeypatch, run_folder, "--json", "--no-memory", "--out", file, *SMALL) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["format"] == "llmprune-bench/1"
    assert report == json.loads(file.read_text())
    assert not (run_folder / "bench.json").exists()
    assert report["points"][0]["models"]["pruned"]["peak_memory"] is None
    assert report["points"][0]["control"] is None


def test_a_model_stands_alone_or_against_another(monkeypatch, capfd, tmp_path):
    one, other = (save_model(tmp_path / name) for name in ("one", "other"))
    assert call(monkeypatch, one, *SMALL) == 0
    report = json.loads((one / "bench.json").read_text())
    assert list(report["models"]) == ["model"]
    assert report["points"][0]["comparisons"] == {}
    assert call(monkeypatch, one, "--against", other, "--batch-size", "2", *SMALL) == 0
    report = json.loads((one / "bench.json").read_text())
    assert {label: m["name"] for label, m in report["models"].items()} == {
        "against": "other",
        "model": "one",
    }
    assert report["points"][0]["batch_size"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "1,x"), "--batch must be counts with commas, as 1,8, got '1,x'"),
        (("--batch", "0"), "batch must be at least 1, got 0"),
        (("--context", "8,"), "--context must be counts with commas"),
        (("--rounds", "2"), "rounds must be at least 3, got 2"),
        (("--new-tokens", "0"), "new-tokens must be at least 1, got 0"),
        (("--context", "8,600"), "context + new-tokens must be at most the model's max_position"),
        (("--backend", "block_sparse"), "needs a model that weight blocks were pruned from"),
        (("--against", "./nowhere"), "no such folder or file"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(
    monkeypatch, capfd, run_folder, options, message
):
    monkeypatch.setattr(footprint, "measure_peak_memory", None)
    assert message in refusal(monkeypatch, capfd, run_folder, *options)
    assert not (run_folder / "bench.json").exists()


def test_three_models_of_known_sizes_are_ordered_by_their_times(monkeypatch, tmp_path):
    sizes = {"small": 12, "middle": 24, "large": 48}
    folders = {n: save_model(tmp_path / n, intermediate_size=s) for n, s in sizes.items()}
    # everything slows down while the run goes on
    clocked(monkeypatch, lambda m, b, c, i: b * m.config.intermediate_size * (1 + i / 20))
    report = bench(
        [subject(name, folders[name]) for name in ("middle", "large", "small")],
        BenchSettings(batch_sizes=(2,), contexts=(8,), new_tokens=2),
        lambda *progress: None,
    )
    (point,) = report.points
    assert point.comparisons["large"].decode.verdict == "slower"
    assert point.comparisons["small"].first_token.verdict == "faster"
    assert point.comparisons["large"].decode.ratio.value == pytest.approx(2.0, rel=0.1)
    assert (
        point.comparisons["large"].decode.roofline > 1 > point.comparisons["small"].decode.roofline
    )
    assert point.models["small"].first_token.ms.median > point.models["small"].decode.ms.median


def test_noise_is_told_and_not_concluded_from(monkeypatch, capfd, run_folder):
    clocked(monkeypatch, lambda m, b, c, i: 1.0 + 5 * (i * 7919 % 13))
    assert call(monkeypatch, run_folder, "--context", "8", "--new-tokens", "2") == 0
    told = " ".join(capfd.readouterr().err.split())
    assert "batch 1, context 8, first token: too noisy to conclude, pruned took x" in told
    assert "take more --rounds or a quieter machine" in told
    report = BenchReport.model_validate_json((run_folder / "bench.json").read_text())
    assert any("too noisy" in warning for warning in report.warnings)
    assert any("was not steady after 5 passes" in warning for warning in report.warnings)
    assert report.points[0].comparisons["pruned"].decode.verdict == "too noisy"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.90, 0.99, "faster"),
        (1.01, 1.90, "slower"),
        (0.96, 1.04, "same"),
        (0.90, 1.04, "too noisy"),
        (0.80, 1.40, "too noisy"),
        (None, None, "too noisy"),
    ],
)
def test_a_verdict_needs_an_interval_off_one_or_a_narrow_one(low, high, verdict):
    assert judge(make_ratio(1.0 if low is None else (low + high) / 2, low, high)) == verdict


def point_of(passes, control):
    models = {
        label: PointModel(
            first_token={"ms": times_of([t.prefill_ms for t in timed]), "roofline_ms": 1.0},
            decode={"ms": times_of([t.decode_ms for t in timed]), "roofline_ms": 1.0},
            decode_tokens_per_s=1.0,
            peak_memory=None,
            warmup_passes=2,
            steady=True,
            backends=(),
        )
        for label, timed in passes.items()
    }
    first, *others = passes
    return Point(
        batch_size=1,
        context=8,
        models=models,
        comparisons={n: compare_passes(passes[first], passes[n], EQUAL) for n in others},
        control=compare_passes(passes[first], control, EQUAL),
    )


def test_a_control_that_misses_one_warns_of_the_comparison():
    steady = [Pass(10.0, 1.0)] * 10
    halved = [Pass(5.0, 0.5)] * 10
    assert list(noise_warnings([point_of({"a": steady, "b": halved}, steady)])) == []
    told = list(noise_warnings([point_of({"a": steady, "b": halved}, halved)]))
    assert len(told) == 2
    assert all("do not trust the comparison: the first model against itself" in t for t in told)


class SharedProcessor:
    """A simulated clock: a model's work in seconds of a processor that it gets only a part of."""

    def __init__(self, monkeypatch, share_of):
        self.wall = self.ran = 0.0
        self.share_of = share_of
        monkeypatch.setattr("llmprune_eval.timing.time.perf_counter", lambda: self.wall)
        monkeypatch.setattr("llmprune_eval.timing.time.thread_time", lambda: self.ran)
        forward = LlamaForCausalLM.forward

        def forward_on_the_clock(model, *arguments, **options):
            work = 0.001 * model.config.intermediate_size
            self.ran += work
            self.wall += work / self.share_of(model)
            return forward(model, *arguments, **options)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward_on_the_clock)


def measured(tmp_path, **changes):
    """A model against one of half its work."""
    sizes = {"dense": 24, "pruned": 12}
    folders = {n: save_model(tmp_path / n, intermediate_size=s) for n, s in sizes.items()}
    settings = BenchSettings(contexts=(8,), new_tokens=3, memory=False, **changes)
    subjects = [subject(name, folder) for name, folder in folders.items()]
    return bench(subjects, settings, lambda *progress: None)


def test_on_a_processor_of_ones_own_the_work_decides(monkeypatch, tmp_path):
    SharedProcessor(monkeypatch, lambda model: 0.95)
    report = measured(tmp_path)
    decode = report.points[0].comparisons["pruned"].decode
    assert decode.ratio.value == pytest.approx(0.5)
    assert decode.waited == pytest.approx((0.05, 0.05))
    assert decode.verdict == "faster"
    assert not any("too noisy" in warning for warning in report.warnings)
    dense = report.points[0].models["dense"]
    assert dense.decode.waited == pytest.approx((0.05,) * 10)
    assert len(dense.switches) == 10


def test_on_a_busy_processor_no_verdict_is_given(monkeypatch, tmp_path):
    # each round alike: nothing but the processor's own time shows that 0.1 is not the model's
    SharedProcessor(monkeypatch, lambda m: 0.2 if m.config.intermediate_size == 24 else 1.0)
    report = measured(tmp_path, check=True)
    point = report.points[0]
    for phase in (point.comparisons["pruned"].first_token, point.comparisons["pruned"].decode):
        assert phase.ratio.value == pytest.approx(0.1)
        assert phase.ratio.high < 1.0
        assert phase.verdict == "too noisy"
    assert point.control.decode.verdict == "too noisy"
    told = [warning for warning in report.warnings if "too noisy to conclude" in warning]
    assert len(told) == 2
    assert "other programs had the processor for 80% of dense's time and 0% of pruned's" in told[0]
    assert "which no --rounds mend" in told[0]


def test_some_disturbed_rounds_do_not_withhold_the_verdict(monkeypatch, tmp_path):
    calls = iter(range(10**6))
    # three whole rounds out of ten, of two models with four forward passes each
    SharedProcessor(monkeypatch, lambda model: 0.3 if next(calls) % 80 < 24 else 1.0)
    report = measured(tmp_path)
    assert report.points[0].comparisons["pruned"].decode.verdict == "faster"


def test_a_model_alone_on_a_busy_processor_is_warned_of(monkeypatch, tmp_path):
    SharedProcessor(monkeypatch, lambda model: 0.25)
    settings = BenchSettings(contexts=(8,), new_tokens=3, memory=False)
    alone = [subject("model", save_model(tmp_path / "model"))]
    told = bench(alone, settings, lambda *progress: None).warnings
    assert sum("for 75% of model's time, which is too long by that" in one for one in told) == 2


def test_a_busy_machine_and_unlike_models_are_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "_load_average", lambda: 1e6)
    save_model(tmp_path / "a")
    subjects = [
        Subject(name, ModelSource(source=str(tmp_path / "a"), dtype=name), name)
        for name in ("float32", "bfloat16")
    ]
    settings = BenchSettings(contexts=(4,), new_tokens=1, rounds=3, memory=False)
    told = " ".join(bench(subjects, settings, lambda *progress: None).warnings)
    assert "other programs ran: load average 1000000.0" in told
    assert "the models differ in dtype (float32 float32, bfloat16 bfloat16)" in told


def test_the_control_is_the_first_model_itself(monkeypatch, tmp_path):
    seen = []
    clocked(monkeypatch, lambda m, *rest: seen.append(id(m)) or 1.0)
    monkeypatch.setattr(bench_module, "warm_up", lambda *arguments: WarmUp(2, steady=True))
    folders = [save_model(tmp_path / name) for name in ("a", "b")]
    settings = BenchSettings(contexts=(4,), new_tokens=1, rounds=4, check=True, memory=False)
    report = bench([subject(f.name, f) for f in folders], settings, lambda *progress: None)
    assert sorted(seen.count(model) for model in set(seen)) == [4, 8]
    assert report.points[0].control.decode.verdict == "same"


def test_points_are_all_pairs_and_none_twice():
    settings = BenchSettings(batch_sizes=read_counts("batch", "1,8,1"), contexts=(128, 2048))
    assert settings.points == [(1, 128), (1, 2048), (8, 128), (8, 2048)]


def test_results_of_a_hub_id_lie_in_runs(tmp_path):
    hub = Subject("model", ModelSource(source="owner/name"), "owner/name")
    assert results_file("owner/name", hub) == Path("runs/bench/owner--name.json")
    assert results_file(str(tmp_path), hub) == tmp_path / "bench.json"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be a folder that prune wrote, or that of a model"):
        bench_subjects(str(tmp_path), None, None)


@pytest.mark.parametrize(("kind", "mode"), [("cuda", "reduce-overhead"), ("cpu", None)])
def test_a_gpu_runs_compiled_models_as_cuda_graphs_and_a_cpu_does_not(
    monkeypatch, make_llama, kind, mode
):
    model, asked = make_llama(), []
    monkeypatch.setattr(model, "compile", lambda **options: asked.append(options))
    # a prompt that stays here whatever device the model is said to be on
    ids = torch.randint(99, (2, 5))
    prompt = SimpleNamespace(shape=ids.shape, to=lambda device: ids)
    monkeypatch.setattr(bench_module, "device_of", lambda model: torch.device(kind))
    settings = BenchSettings(new_tokens=3, backend="compile")
    with torch.no_grad():
        caches = bench_module._prepare({"dense": model}, prompt, settings)
    assert asked == [{"dynamic": False, "mode": mode}]
    assert caches["dense"].layers[0].max_cache_len == 8
    assert bench_module._prepare({"dense": model}, prompt, BenchSettings()) == {"dense": None}
    assert len(asked) == 1


@pytest.mark.slow
def test_a_compiled_model_runs_every_point(monkeypatch, capfd, run_folder):
    options = ("--backend", "compile", "--batch", "1,2", "--no-memory", *SMALL)
    assert call(monkeypatch, run_folder, *options) == 0
    assert "compile: torch.compile with a KV cache of fixed size" in capfd.readouterr().out
    report = json.loads((run_folder / "bench.json").read_text())
    assert report["backend"] == "compile"
    assert len(report["points"]) == 2
