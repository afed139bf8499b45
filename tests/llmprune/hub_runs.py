"""Run folders to publish, written in milliseconds, and a client that talks to a loopback Hub."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from llmprune.recipe import ModelSource, Recipe
from llmprune.verification import Verification, model_sha256
from llmprune_eval.bench_report import (
    BenchReport,
    Comparison,
    ModelFacts,
    Phase,
    Point,
    PointComparison,
    PointModel,
    judge,
    times_of,
)
from llmprune_eval.intervals import make_ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.quality_report import (
    Figure,
    MetricFigures,
    ModelLine,
    QualityReport,
    TaskFigures,
)
from llmprune_eval.report import EvalReport, ModelSize, TextResult
from llmprune_eval.roofline import Rates
from llmprune_eval.subjects import Subject

DENSE = "ann/dense"
ORIGIN = f"{DENSE}@{'a1' * 20}"


def recipe_of(**changes: Any) -> Recipe:
    """A recipe as a run folder keeps it."""
    data = {
        "model": {"source": DENSE},
        "calibration": {"dataset": "builtin:python-reference", "num_rows": 8, "row_length": 16},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
        "evaluation": {"speed": None, "prompt": "the cat"},
    }
    return Recipe.parse({**data, **changes})


def verification_of(model: Path, **changes: Any) -> Verification:
    """What verifying a sound model finds."""
    figures = {"forward": 1e-15, "kv_cache": 2e-15, "left_padding": 1e-15}
    found: dict[str, Any] = {
        "reference": "gated",
        "dense_model": ORIGIN,
        "sha256": model_sha256(model),
        "cut_from_gated": {"float32": 0.0, "float64": 0.0},
        "model_class": "LlamaForCausalLM",
        "remote_code": False,
        "missing_keys": [],
        "unexpected_keys": [],
        "llmprune_imported": False,
        "largest_logit": 1.5,
        "max_abs_difference": {"float32": figures, "float64": figures},
    }
    return Verification(**{**found, **changes})


def perplexity(value: float) -> Perplexity:
    """Of three windows that differ a little."""
    nlls = tuple(math.log(value) + shift for shift in (-0.1, 0.0, 0.1))
    return Perplexity(value, 45, 3, 16, math.log(value), 0.06, nlls)


def report_of(**changes: Any) -> EvalReport:
    """Figures of a model that lost half of its channels."""
    text = TextResult(
        name="python-reference/test",
        in_domain=False,
        dense=perplexity(4.0),
        pruned=perplexity(6.0),
    )
    found: dict[str, Any] = {
        "environment": {"device": "Some CPU", "torch": "2", "date": "2026-11-01"},
        "dense": ModelSize(parameters=4000, decoder_parameters=3000),
        "pruned": ModelSize(parameters=3000, decoder_parameters=2000),
        "perplexities": (text,),
        "samples": {"dense": "the cat sat", "pruned": "the cat the"},
    }
    return EvalReport(**{**found, **changes})


def add_results(run: Path, **task: Any) -> tuple[QualityReport, BenchReport]:
    """Leave in a finished run what `llmprune eval` and `llmprune bench` leave."""
    model = ModelSource(source=str(run / "model"))
    fingerprint = Subject("pruned", model, "run").fingerprint()
    figures = {
        "dense": Figure(value=0.68, stderr=0.01),
        "pruned": Figure(value=0.64512, stderr=0.02),
    }
    found: dict[str, Any] = {
        "name": "piqa",
        "headline": "acc_norm",
        "num_documents": 200,
        "num_subtasks": 1,
        "limit": 200,
        "num_fewshot": 0,
        "data": "baber/piqa",
        "metrics": {"acc_norm": MetricFigures(figures=figures, difference=None)},
    }
    line = {"parameters": 3000, "dtype": "float32"}
    evaluation = QualityReport(
        environment={"device": "Some CPU", "lm-eval": "0.4.13"},
        models={
            "dense": ModelLine(name=DENSE, fingerprint="0" * 64, **line),
            "pruned": ModelLine(name="run", fingerprint=fingerprint, **line),
        },
        tasks=(TaskFigures(**{**found, **task}),),
    )
    (run / "eval" / "dense").mkdir(parents=True)
    (run / "eval" / "evaluation.json").write_text(evaluation.to_json())
    (run / "eval" / "dense" / "piqa.json").write_text("{}")
    weights = (run / "model" / "model.safetensors").stat().st_size
    bench = bench_of({"dense": 2 * weights, "pruned": weights})
    (run / "bench.json").write_text(bench.to_json())
    return evaluation, bench


def bench_of(weight_bytes: dict[str, int]) -> BenchReport:
    """A report of models of so many bytes; each is twice as fast and half as large as the last."""
    rates = Rates(flops_per_s=1e9, bytes_per_s=1e9, buffer_bytes=2**20)
    facts = {
        label: ModelFacts(
            name=label,
            form="stored weights",
            dtype="bfloat16",
            attention="sdpa",
            parameters=3000,
            weight_bytes=size,
            load_s=times_of([0.25 / 2**index]),
            rates=rates,
        )
        for index, (label, size) in enumerate(weight_bytes.items())
    }

    def phase(ms: float) -> Phase:
        return Phase(ms=times_of([0.9 * ms, ms, 1.1 * ms]), roofline_ms=0.5 * ms)

    models = {
        label: PointModel(
            first_token=phase(80.0 / 2**index),
            decode=phase(16.0 / 2**index),
            decode_tokens_per_s=62.5 * 2**index,
            peak_memory=PeakMemory((300 >> index) << 20, 100 << 20, "cpu"),
            warmup_passes=2,
            steady=True,
            backends=(),
        )
        for index, label in enumerate(facts)
    }
    ratio = make_ratio(0.5, 0.45, 0.55)
    comparison = Comparison(ratio=ratio, roofline=0.5, verdict=judge(ratio))
    point = Point(
        batch_size=1,
        context=128,
        models=models,
        comparisons={
            label: PointComparison(first_token=comparison, decode=comparison)
            for label in list(facts)[1:]
        },
    )
    return BenchReport(
        environment={"device": "Some CPU"},
        backend="as stored",
        new_tokens=4,
        rounds=10,
        seed=0,
        load_average=0.1,
        models=facts,
        points=(point,),
        warnings=("other programs ran",),
    )


def finished_run(
    folder: Path,
    model: Path,
    *,
    recipe: Recipe | None = None,
    verification: dict[str, Any] | None = None,
    report: EvalReport | None = None,
) -> Path:
    """A folder as `prune` leaves it, around a saved model."""
    shutil.copytree(model, folder / "model")
    (folder / "recipe.yaml").write_text((recipe or recipe_of()).to_yaml())
    plan = {"format": "llmprune-plan/1", "model": {}, "kept": {}}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "scores.json").write_text("{}")
    found = verification_of(folder / "model", **(verification or {}))
    (folder / "verification.json").write_text(found.model_dump_json())
    (folder / "report.json").write_text((report or report_of()).to_json())
    (folder / "README.md").write_text("# of the run folder\n")
    (folder / "log.jsonl").write_text('{"phase": "gates", "step": 1, "loss": 0.5}\n')
    (folder / "gates.safetensors").write_bytes(b"a state that is under way")
    return folder


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a model card."""
    return yaml.safe_load(card.split("---\n")[1])
