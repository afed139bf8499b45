"""Whether `llmprune bench` can be believed: equal models come out equal, others in order.

    python eval/benchmarks/bench_check.py [--runs 20] [--rounds 10] [--model SOURCE] [--out FILE]

Two copies of one model, loaded from the same files, are measured against each other again and
again; the 95 % interval of the ratio must hold 1.0 in at least 19 of 20 runs, for the first token
and for the decode step. Three random models of two, four and eight layers, in the same rounds, must
come out in that order with intervals off 1. The exit code is 1 where either fails. An interval of
95 % (with 10 rounds: 97.9 %) may miss in 2 of 20 runs by chance, once in about 14 series.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from llmprune.recipe import ModelSource
from llmprune_eval.bench import BenchSettings, bench
from llmprune_eval.bench_report import PHASES, BenchReport
from llmprune_eval.subjects import Subject

LAYERS = {"small": 2, "middle": 4, "large": 8}
NEEDED = 0.95


def save_models(folder: Path) -> dict[str, Path]:
    """Random Llamas that differ in their number of layers."""
    for name, num_layers in LAYERS.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=2000,
            max_position_embeddings=2048,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return {name: folder / name for name in LAYERS}


def run(names: dict[str, str], settings: BenchSettings) -> BenchReport:
    """One run of bench over models by label."""
    subjects = [
        Subject(label, ModelSource(source=source, dtype="float32"), label)
        for label, source in names.items()
    ]
    return bench(subjects, settings, lambda *progress: None)


def repeat_against_itself(source: str, runs: int, settings: BenchSettings) -> dict[str, Any]:
    """Ratios of a model against a copy of it, by phase, and how many intervals hold 1.0."""
    found: dict[str, Any] = {phase: {"ratios": [], "holds": 0} for phase in PHASES}
    for index in range(runs):
        report = run({"model": source, "copy": source}, replace(settings, seed=index))
        for phase in PHASES:
            ratio = getattr(report.points[0].comparisons["copy"], phase).ratio
            holds = ratio.low <= 1.0 <= ratio.high
            found[phase]["holds"] += holds
            found[phase]["ratios"].append([ratio.value, ratio.low, ratio.high])
            mark = "" if holds else "  MISSES 1"
            print(
                f"{index + 1:3} {PHASES[phase]:12} x {ratio.value:.3f} "
                f"({ratio.low:.3f} to {ratio.high:.3f}){mark}",
                flush=True,
            )
    return found


def order(models: dict[str, Path], settings: BenchSettings) -> dict[str, Any]:
    """Times and ratios of the three models to the middle one."""
    names = ("middle", "small", "large")
    report = run({name: str(models[name]) for name in names}, settings)
    (point,) = report.points
    found: dict[str, Any] = {"environment": report.environment, "load": report.load_average}
    for phase, title in PHASES.items():
        small, large = (getattr(point.comparisons[name], phase) for name in names[1:])
        medians = {name: getattr(point.models[name], phase).ms.median for name in LAYERS}
        right = small.verdict == "faster" and large.verdict == "slower"
        found[phase] = {"ms": medians, "right": right}
        for name, comparison in (("small", small), ("large", large)):
            ratio = comparison.ratio
            found[phase][name] = [ratio.value, ratio.low, ratio.high]
            print(
                f"{title:12} {name} / middle x {ratio.value:.3f} ({ratio.low:.3f} to "
                f"{ratio.high:.3f}), roofline {comparison.roofline:.3f}: {comparison.verdict}"
            )
    return found


def main() -> int:
    """Run both checks; print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--model", help="default: the middle one of the random models")
    parser.add_argument("--out", type=Path, help="JSON of everything found")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = BenchSettings(
        contexts=(arguments.context,),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        memory=False,
    )
    with tempfile.TemporaryDirectory(prefix="llmprune-check-") as scratch:
        models = save_models(Path(scratch))
        # the machine's speed changes over minutes: more rounds for the one run that has to decide
        ordered = order(models, replace(settings, rounds=2 * settings.rounds))
        source = arguments.model or str(models["middle"])
        itself = repeat_against_itself(source, arguments.runs, settings)
    held = {phase: itself[phase]["holds"] for phase in PHASES}
    right = {phase: ordered[phase]["right"] for phase in PHASES}
    for phase, title in PHASES.items():
        print(
            f"{title}: {held[phase]} of {arguments.runs} intervals hold 1.0; order {right[phase]}"
        )
    print("; ".join(f"{key} {value}" for key, value in ordered["environment"].items()))
    if arguments.out:
        text = json.dumps({"itself": itself, "order": ordered, "runs": arguments.runs}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    enough = all(count >= NEEDED * arguments.runs for count in held.values())
    return int(not (enough and all(right.values())))


if __name__ == "__main__":
    raise SystemExit(main())
