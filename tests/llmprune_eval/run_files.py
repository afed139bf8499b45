"""Run folders without a run: recipe, plan, scores, log, figures and verification by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
import yaml

from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from llmprune.scores import UnitScores
from llmprune.verification import Verification
from llmprune.weight_blocks import BlockPlan
from llmprune_eval.intervals import make_ratio
from llmprune_eval.peak_memory import PeakMemory
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.report import EvalReport, LatencyResult, ModelSize, TextResult
from llmprune_eval.speed import Latency, ModelSpeed, SpeedRatio, SpeedReport

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


def a_log():
    rows = [("gates", step, 1 / step) for step in range(1, 41)]
    rows += [("recovery", step, 0.5 + 0.1 * (step % 3)) for step in range(1, 101)]
    lines = [json.dumps({"phase": p, "step": s, "loss": loss}) for p, s, loss in rows]
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
    }
    folder.mkdir()
    for name, text in files.items():
        if name not in without:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


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
