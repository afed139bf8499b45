import getpass
import io
import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llmprune.errors import InputError
from llmprune_eval.intervals import make_ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.report import (
    EvalReport,
    LatencyResult,
    ModelSize,
    TextResult,
    busy_warnings,
    environment,
    render_table,
    to_markdown,
)
from llmprune_eval.speed import Latency, ModelSpeed, SpeedRatio, SpeedReport


def a_speed_report():
    def one(ms):
        return ModelSpeed(Latency(ms, ms, ms), Latency(ms / 4, ms / 4, ms / 4), 4e3 / ms, 2)

    ratio = SpeedRatio(make_ratio(0.5, 0.4, 0.6), make_ratio(0.98, 0.9, 1.1))
    shape = {"batch_size": 1, "context": 128, "new_tokens": 16, "rounds": 5, "seed": 0}
    return SpeedReport(
        **shape,
        device="cpu",
        dtype="float32",
        models={"dense": one(80.0), "pruned": one(40.0)},
        ratios={"pruned": ratio},
    )


def a_report():
    dense = Perplexity(20.09, 33, 3, 12, 3.0, 0.1, (2.9, 3.0, 3.1))
    pruned = replace(dense, value=29.96, nll_mean=3.4, window_nlls=(3.3, 3.39, 3.51))
    return EvalReport(
        environment=environment("cpu", torch.float32),
        dense=ModelSize(
            parameters=134_515_008,
            decoder_parameters=106_203_456,
            disk_bytes=500 << 20,
            peak_memory=PeakMemory(900 << 20, 200 << 20, "cpu"),
        ),
        pruned=ModelSize(
            parameters=81_413_280,
            decoder_parameters=53_101_728,
            disk_bytes=300 << 20,
            peak_memory=PeakMemory(550 << 20, 200 << 20, "cpu"),
        ),
        perplexities=(
            TextResult(name="wikitext2", in_domain=True, dense=dense, pruned=pruned),
            TextResult(name="pydoc", in_domain=False, dense=dense, pruned=dense),
        ),
        speed=a_speed_report(),
        latency=LatencyResult(
            phase="prefill",
            batch_size=1,
            context=256,
            predicted={"dense": 80.0, "pruned": 64.0},
            measured={"dense": 90.0, "pruned": 70.0},
            ratio=make_ratio(0.78, 0.75, 0.8),
        ),
    )


def rendered(report):
    console = Console(file=io.StringIO(), width=160)
    console.print(render_table(report))
    return console.file.getvalue()


def test_json_round_trip_is_exact():
    report = a_report()
    text = report.to_json()
    assert EvalReport.from_json(text) == report
    assert json.loads(text)["speed"]["ratios"]["pruned"]["decode"]["conclusive"] is False
    bare = EvalReport(environment={}, dense=report.dense, pruned=report.pruned)
    assert EvalReport.from_json(bare.to_json()) == bare


@pytest.mark.parametrize("text", ["", "[]", '{"environment": {}}', '{"more": 1}'])
def test_json_of_something_else_is_named(text):
    with pytest.raises(InputError, match=r"^run/report.json: .*write the report anew"):
        EvalReport.from_json(text, name="run/report.json")


@pytest.mark.parametrize("show", [rendered, to_markdown])
def test_tables_hold_every_number_and_mark(show):
    text = show(a_report())
    lines = {re.split(r" +[│|]", line.strip("│| "))[0]: line for line in text.splitlines()}
    for cells in [
        ("parameters", "134.52 M", "81.41 M", "0.605"),
        ("decoder parameters", "106.20 M", "53.10 M", "0.500"),
        ("bytes on disk", "500 MiB", "300 MiB", "0.600"),
        ("perplexity wikitext2 (in-domain)", "20.09", "29.96", "1.492 ("),
        ("perplexity pydoc", "20.09", "1.000 (1.000 to 1.000), not conclusive"),
        ("prefill", "80.0 ms", "40.0 ms", "0.500 (0.400 to 0.600)"),
        ("decode, a token", "20.0 ms", "0.980 (0.900 to 1.100), not conclusive"),
        ("prefill budget, predicted", "80.0 ms", "64.0 ms", "0.800"),
        ("prefill budget, measured", "90.0 ms", "70.0 ms", "0.780 (0.750 to 0.800)"),
        ("peak memory", "900 MiB", "550 MiB", "0.611"),
        ("peak memory, model's share", "700 MiB", "350 MiB", "0.500"),
    ]:
        label, *values = cells
        assert all(value in lines[label] for value in values), (label, lines[label])
    assert "not conclusive" not in lines["prefill"]
    assert "(in-domain)" not in lines["perplexity pydoc"]
    assert "3 windows of 12, 33 scored tokens" in text
    assert "torch " in text


@pytest.mark.parametrize("show", [rendered, to_markdown])
def test_times_on_a_busy_processor_decide_nothing(show):
    whole = a_report()
    speed = whole.speed
    dense = speed.models["dense"]
    slowed = replace(dense, prefill=replace(dense.prefill, waited=0.3))
    busy = whole.model_copy(
        update={
            "speed": replace(speed, models={**speed.models, "dense": slowed}),
            "latency": whole.latency.model_copy(update={"waited": {"dense": 0.0, "pruned": 0.11}}),
        }
    )
    assert EvalReport.from_json(busy.to_json()) == busy
    text = show(busy)
    lines = {re.split(r" +[│|]", line.strip("│| "))[0]: line for line in text.splitlines()}
    assert "0.500 (0.400 to 0.600), too noisy" in lines["prefill"]
    assert "0.780 (0.750 to 0.800), too noisy" in lines["prefill budget, measured"]
    assert "0.980 (0.900 to 1.100), not conclusive" in lines["decode, a token"]
    assert "too noisy: other programs had the processor" in text
    told = busy_warnings(busy)
    assert len(told) == 2
    assert told[0].startswith(
        "prefill: too noisy to conclude; other programs had the processor for 30% of dense's time "
        "and 0% of pruned's; take a quieter machine"
    )
    assert told[1].startswith("prefill budget, measured: too noisy to conclude; ")
    assert all(f"**WARNING: {warning}**" in to_markdown(busy) for warning in told)
    assert busy_warnings(whole) == ()
    assert "too noisy" not in show(whole)


def test_rows_that_were_not_measured_are_left_out():
    whole = a_report()
    size = ModelSize(parameters=10, decoder_parameters=0)
    text = to_markdown(EvalReport(environment=whole.environment, dense=size, pruned=size))
    assert [line.split(" |")[0] for line in text.splitlines()[2:4]] == [
        "| parameters",
        "| decoder parameters",
    ]
    assert "perplexity" not in text
    assert "prefill" not in text


def test_speed_of_other_models_is_refused():
    report = a_report()
    other = replace(report.speed, models={"a": report.speed.models["dense"]}, ratios={})
    with pytest.raises(ValueError, match="dense, pruned in this order, got a"):
        EvalReport(environment={}, dense=report.dense, pruned=report.pruned, speed=other)


def test_environment_names_no_person_or_machine():
    facts = environment("cpu", torch.bfloat16)
    assert facts["dtype"] == "bfloat16"
    assert facts["cpu_threads"] == torch.get_num_threads()
    assert {"device", "cpu_count", "torch", "transformers", "llmprune", "date"} <= facts.keys()
    words = " ".join(str(value) for value in facts.values()).split()
    assert platform.node() not in words
    assert getpass.getuser() not in words
    assert str(Path.home()) not in words


def test_import_does_not_load_transformers():
    modules = ["perplexity", "speed", "peak_memory", "report"]
    code = f"import sys; {'; '.join(f'import llmprune_eval.{name}' for name in modules)}; "
    code += "sys.exit('transformers' in sys.modules)"
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "eval")]
    code = f"import sys; sys.path[:0] = {paths!r}; {code}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_outer_folder_is_no_package():
    assert not (Path(__file__).parents[2] / "eval" / "__init__.py").exists()
