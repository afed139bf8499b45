"""Run folders without a run: recipe, plan, scores, log, figures and verification by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
import yaml

from llmprune.plan import PrunePlan
from llmprune.recipe import ModelSource, Recipe
from llmprune.scores import UnitScores
from llmprune.verification import Verification
from llmprune.weight_blocks import BlockPlan
from llmprune_eval.bench_report import PointComparison
from llmprune_eval.intervals import make_ratio
from llmprune_eval.paired import Difference
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.quality_report import (
    Figure,
    MetricFigures,
    ModelLine,
    QualityReport,
    TaskFigures,
    TextFigures,
)
from llmprune_eval.report import EvalReport, LatencyResult, ModelSize, TextResult
from llmprune_eval.speed import Latency, ModelSpeed, SpeedRatio, SpeedReport
from llmprune_eval.subjects import Subject
from tests.llmprune.hub_runs import bench_of

LAYERS, HEADS, GROUPS, CHANNELS, HIDDEN = 6, 4, 2, 40, 32
MODEL = {
    "family": "llama",
    "hidden_size": HIDDEN,
    "head_dim": 8,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": CHANNELS,
}
PROMPT = "The <b>cat</b> & the mat"


def a_recipe(**changes):
    data = {
        "model": {"source": "owner/tiny-llama"},
        "calibration": {"dataset": "/secret/place/wiki.train.txt"},
        "prune": {"mlp_channels": {"sparsity": 0.5}},
        "recovery": {"steps": 3},
        "evaluation": {"prompt": PROMPT},
    }
    return Recipe.parse(data | changes)


def random_scores(names_and_counts):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(count, generator=generator) for name, count in names_and_counts}


def best(scores, count):
    return tuple(sorted(scores.topk(count).indices.tolist()))


def unit_run():
    """Equal widths: half the MLP channels of every layer and one KV group."""
    names = [(f"layers.{i}.mlp_channels", CHANNELS) for i in range(LAYERS)]
    names += [(f"layers.{i}.kv_groups", GROUPS) for i in range(LAYERS)]
    scores = random_scores(names)
    kept = {name: best(values, len(values) // 2) for name, values in scores.items()}
    return a_recipe(), PrunePlan(MODEL, kept), UnitScores(scores)


def per_layer_run():
    """All that can differ: a layer gone, sublayers gone, other widths, hidden channels gone."""
    kept = {
        "layers": (0, 1, 2, 4, 5),
        "attention_sublayers": (0, 2, 3, 4, 5),
        "mlp_sublayers": (0, 1, 2, 3, 4),
        "hidden_channels": tuple(range(0, HIDDEN, 2)),
        "layers.0.heads": (0, 2),
        "layers.2.kv_groups": (1,),
        "layers.4.mlp_channels": tuple(range(7)),
    }
    names = [("layers", LAYERS), ("attention_sublayers", LAYERS), ("hidden_channels", HIDDEN)]
    names += [("layers.4.mlp_channels", CHANNELS), ("layers.0.heads", HEADS)]
    scores = random_scores(names)
    dropped = {"layers.4.mlp_channels": torch.tensor([-1] * 7 + list(range(1, CHANNELS - 6)))}
    recipe = a_recipe(export={"format": "per_layer"})
    return recipe, PrunePlan(MODEL, kept), UnitScores(scores, dropped_at=dropped)


def block_run():
    """Two of four blocks in every block row of the MLPs' projections."""
    generator = torch.Generator().manual_seed(0)
    masks, scores = {}, {}
    for layer in range(LAYERS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            values = torch.rand(8, 4, generator=generator)
            mask = torch.zeros(8, 4, dtype=torch.bool)
            mask.scatter_(1, values.topk(2, dim=1).indices, True)
            key = f"model.layers.{layer}.mlp.{name}"
            masks[key], scores[key] = mask, values.flatten()
    recipe = a_recipe(prune={"weight_blocks": {"block": [16, 16], "sparsity": 0.5}})
    plan = BlockPlan(dict.fromkeys(masks, (16, 16)), masks)
    return recipe, plan, UnitScores(scores)


def a_report():
    dense = Perplexity(20.09, 33, 3, 12, 3.0, 0.1, (2.9, 3.0, 3.1))
    pruned = replace(dense, value=29.96, nll_mean=3.4, window_nlls=(3.3, 3.39, 3.51))

    def speed(ms):
        prefill, decode = Latency(ms, ms - 3.5, ms + 7.25), Latency(ms / 4, ms / 5, ms / 3)
        return ModelSpeed(prefill, decode, 4e3 / ms, 2)

    ratio = SpeedRatio(make_ratio(0.5, 0.4, 0.6), make_ratio(0.98, 0.9, 1.1))
    return EvalReport(
        environment={"device": "<processor>", "torch": "2.13.0", "date": "2026-01-02"},
        dense=ModelSize(parameters=134_515_008, decoder_parameters=106_203_456),
        pruned=ModelSize(
            parameters=81_413_280,
            decoder_parameters=53_101_728,
            disk_bytes=300 << 20,
            peak_memory=PeakMemory(550 << 20, 200 << 20, "cpu"),
        ),
        perplexities=(TextResult(name="wiki.test", in_domain=True, dense=dense, pruned=pruned),),
        speed=SpeedReport(
            batch_size=1,
            context=128,
            new_tokens=16,
            rounds=5,
            seed=0,
            device="cpu",
            dtype="float32",
            models={"dense": speed(80.0), "pruned": speed(40.0)},
            ratios={"pruned": ratio},
        ),
        latency=LatencyResult(
            phase="prefill",
            batch_size=1,
            context=256,
            predicted={"dense": 80.0, "pruned": 64.0},
            measured={"dense": 90.0, "pruned": 70.0},
            ratio=make_ratio(0.78, 0.75, 0.8),
        ),
        samples={"dense": f"{PROMPT} <script>alert(1)</script>", "pruned": "Elsewhere."},
        origin="owner/tiny-llama@0123",
    )


def a_verification():
    figures = {"forward": 0.0, "kv_cache": 1.5e-14}
    return Verification(
        reference="final",
        cut_from_gated={"float64": 2.5e-15},
        model_class="LlamaForCausalLM",
        remote_code=False,
        missing_keys=[],
        unexpected_keys=[],
        llmprune_imported=False,
        largest_logit=30.0,
        max_abs_difference={"float64": figures},
    )


def gates_of(kind, share):
    """Gates of which a share is open, as many closed, the rest between and all of it above 0.5."""
    shares = {"open": share, "half_open": 1 - share, "closed": share, "mean": 0.5}
    return {f"{kind}_{name}": value for name, value in shares.items()}


def a_log():
    rows = [
        {"phase": "gates", "step": step, "loss": 1 / step, "budget": 1 - step / 80}
        | gates_of("mlp_channels", step / 100)
        | gates_of("kv_groups", step / 200)
        for step in range(1, 41)
    ]
    rows += [
        {"phase": "recovery", "step": step, "loss": 0.5 + 0.1 * (step % 3)}
        for step in range(1, 101)
    ]
    lines = [json.dumps(row) for row in rows]
    # a loss that is no number, and the half of a line that a kill leaves
    return "\n".join([*lines, '{"phase": "recovery", "step": 101, "loss": NaN}', '{"phase": "re'])


def write_run(folder, run, *, without=()):
    """Write a run folder; files named in `without` are left out."""
    recipe, plan, scores = run
    files = {
        "recipe.yaml": yaml.safe_dump(recipe.model_dump(mode="json")),
        "plan.json": plan.to_json(),
        "scores.json": scores.to_json(),
        "log.jsonl": a_log(),
        "report.json": a_report().to_json(),
        "verification.json": a_verification().model_dump_json(),
        "model/config.json": '{"model_type": "llama"}',
        "model/model.safetensors": "0123456789",
    }
    for name, text in files.items():
        if name not in without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    # these name the model that they are of
    for name, make in (("bench.json", a_bench), ("eval/evaluation.json", an_evaluation)):
        if name not in without:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(make(folder).to_json(), encoding="utf-8")
    return folder


def a_bench(folder):
    """Two points; at the second nothing is decided."""
    weights = (folder / "model" / "model.safetensors").stat().st_size
    report = bench_of({"dense": 2 * weights, "pruned": weights})
    (point,) = report.points
    found = point.comparisons["pruned"].first_token
    noisy = found.model_copy(update={"verdict": "too noisy", "ratio": make_ratio(0.9, 0.7, 1.2)})
    pair = PointComparison(first_token=noisy, decode=noisy)
    second = point.model_copy(update={"context": 2048, "comparisons": {"pruned": pair}})
    return report.model_copy(update={"points": (point, second), "warnings": ()})


def an_evaluation(folder):
    """A text and three tasks: one that decides, one that doesn't, and a perplexity."""
    source = ModelSource(source=str(folder / "model"))
    lines = {
        "dense": ModelLine(
            name="owner/tiny-llama", fingerprint="0" * 64, parameters=134_515_008, dtype="float32"
        ),
        "pruned": ModelLine(
            name="run",
            fingerprint=Subject("pruned", source, "run").fingerprint(),
            parameters=81_413_280,
            dtype="float32",
        ),
    }
    text = a_report().perplexities[0]
    pair = {"dense": text.dense, "pruned": text.pruned}

    def task(name, metric, values, difference):
        figures = {
            label: Figure(value=value, stderr=0.03)
            for label, value in zip(pair, values, strict=True)
        }
        return TaskFigures(
            name=name,
            headline=metric,
            num_documents=200,
            num_subtasks=1,
            limit=200,
            num_fewshot=0,
            metrics={metric: MetricFigures(figures=figures, difference=difference)},
        )

    def difference(value, low, high, p_value):
        return Difference(
            kind="difference" if p_value is not None else "ratio",
            value=value,
            low=low,
            high=high,
            num_documents=200,
            p_value=p_value,
            conclusive=p_value is None or p_value < 0.05,
        )

    return QualityReport(
        environment={"device": "<processor>", "lm-eval": "0.4.13"},
        models=lines,
        texts=(
            TextFigures(
                name="wiki.test",
                in_domain=True,
                perplexities=pair,
                same_tokens=True,
                ratio=make_ratio(1.49, 1.4, 1.6),
            ),
        ),
        tasks=(
            task("piqa", "acc_norm", (0.68, 0.645), difference(-0.035, -0.075, 0.005, 0.14)),
            task("hellaswag", "acc_norm", (0.43, 0.34), difference(-0.09, -0.14, -0.04, 0.001)),
            task("lambada_openai", "perplexity", (20.0, 30.0), difference(1.5, 1.3, 1.7, None)),
        ),
        warnings=("the dense model misses its published figure of piqa",),
    )


def a_comparison(*, dense=20.09, text="wiki.test"):
    """A comparison.json with one method in two stages, a control, and one far off."""

    def figures(value, parameters, **tokens):
        return {
            "perplexity": value,
            "num_windows": 3,
            "window": 12,
            "parameters": parameters,
            "tokens": tokens,
        }

    def row(label, is_control=False, **stages):
        return {
            "method": label,
            "label": label,
            "is_control": is_control,
            "stages": {
                stage: {"mean": value, "spread": None, "seeds": [figures(value, 81_000_000)]}
                for stage, value in stages.items()
            },
            "final": None,
        }

    block = {
        "name": "half",
        "text": text,
        "dense": figures(dense, 134_515_008),
        "rows": [
            row("Wanda, <structured>", compensated=45.5, refit=33.25),
            row("control: prior", is_control=True, compensated=50.0),
            row("random", compensated=20_000.0),
        ],
    }
    return json.dumps({"format": "llmprune-comparison/1", "command": "", "blocks": [block]})
