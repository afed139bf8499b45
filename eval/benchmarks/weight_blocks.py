"""The comparison behind eval/results/weight-blocks.md: which weight blocks to keep.

    python eval/benchmarks/weight_blocks.py --out FOLDER --model SOURCE --data FOLDER [--parts ...]

Half and 70 % of the MLPs' blocks go, in three block shapes, by every method on the same rows. Parts
are stages, each on top of the one before: `choice` (weights as they are), `refit` (least squares on
what stays), `recovered` (the same training rows for all, beside ways that train all along:
magnitude masks that close and open again, ACDC-style, and gates and weights together). On a GPU
several processes may share the cases (`--share 0/4` to `3/4`); one with `--report` then writes the
table. --data is a folder with wikitext2/wiki.train.head.raw and wiki.test.raw. What is in --out is
not computed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from weight_blocks_cases import (
    BLOCKS,
    NUM_ROWS,
    RECOVERY_STEPS,
    REFIT_ROWS,
    STAGES,
    WHOLE,
    Case,
    all_cases,
    file_of,
)
from weight_blocks_report import read, report

from llmprune.accelerator import start_accelerator
from llmprune.block_gates import BlockGates
from llmprune.block_pruning import prune_blocks
from llmprune.block_reconstruction import reconstruct_blocks
from llmprune.checkpoint import load_pruned
from llmprune.files import save_text
from llmprune.recipe import Recipe
from llmprune.recipe_training import Reconstruction
from llmprune.recovery import recover
from llmprune.run_folder import RunFolder
from llmprune.run_steps import Watch, read_calibration
from llmprune.sources import LoadedModel, load_dense
from llmprune.streams import even_batches
from llmprune.texts import read_texts, resolve_text
from llmprune.units import map_units
from llmprune.weight_blocks import BlockPlan, map_blocks, zero_blocks
from llmprune_eval.documents import encode
from llmprune_eval.perplexity import Perplexity, measure_perplexity
from llmprune_eval.report import environment

RESULTS = Path(__file__).parents[1] / "results"
NAME = "weight-blocks"


def recipe_of(case: Case, arguments: argparse.Namespace) -> Recipe:
    """The recipe of a case: choice, refit and recovery."""
    wiki = Path(arguments.data) / "wikitext2"
    # on a CPU row by row, for the memory's sake
    size = None if torch.cuda.is_available() else 1
    gates: dict[str, Any] = {"steps": 40, "batch_size": 2, "micro_batch_size": size}
    return Recipe.parse(
        {
            "model": {"source": arguments.model},
            "calibration": {
                "dataset": str(wiki / "wiki.train.head.raw"),
                "num_rows": NUM_ROWS,
                "row_length": 512,
            },
            "prune": {"weight_blocks": {"block": list(case.block), "sparsity": case.sparsity}},
            "method": "sequential_attention" if case.method in WHOLE else case.method,
            "gates": WHOLE.get(case.method, gates),
            "reconstruction": {"num_rows": REFIT_ROWS},
            "recovery": {"steps": RECOVERY_STEPS, "batch_size": 1, "learning_rate": 2.0e-4},
            "training": {"mixed_precision": "bf16"},
            "evaluation": {
                "perplexity": [
                    {"dataset": str(wiki / "wiki.test.raw"), "window": 512, "max_windows": 32}
                ]
            },
        }
    )


@cache
def dense_model(source: str) -> LoadedModel:
    """The dense model, loaded once, on the GPU where there is one."""
    recipe = Recipe.parse({"model": {"source": source}, "prune": {"layers": {"sparsity": 0}}})
    dense = load_dense(recipe.model)
    dense.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return dense


def measure(model: Any, recipe: Recipe, tokenizer: Any) -> Perplexity:
    """Perplexity on the recipe's text."""
    task = resolve_text(recipe.evaluation.perplexity[0])
    ids = encode(read_texts(task), tokenizer)
    return measure_perplexity(model, ids, window=task.window, max_windows=task.max_windows)


def compute(case: Case, wanted: set[str], arguments: argparse.Namespace) -> None:
    """Prune as the case says and measure stage by stage, where --out does not hold that yet."""
    stages = [stage for stage in case.stages if stage in wanted]
    if all(file_of(case, stage, arguments).is_file() for stage in stages):
        return
    print(f"{case.key} ...", flush=True)
    whole = recipe_of(case, arguments)
    only = {"reconstruction": None, "recovery": whole.recovery.model_copy(update={"steps": 0})}
    recipe = whole.model_copy(update=only)
    watch = Watch(start_accelerator(recipe.training, recipe.seed), lambda *progress: None)
    dense = dense_model(arguments.model)
    path = Path(arguments.out) / "runs" / case.key
    folder = RunFolder.begin(path, recipe, resume=True)
    start = time.perf_counter()
    prune_blocks(recipe, folder, dense, watch)
    model = load_pruned(path).to(dense.model.device)
    model.requires_grad_(True)
    rows = read_calibration(recipe, dense, folder, watch)
    plan = BlockPlan.read(path / "plan.json")
    if case.method not in WHOLE:
        start = keep(case, "choice", model, start, arguments)
    if "refit" in stages:
        reconstruct_blocks(
            model,
            dense.model,
            map_units(dense.model),
            plan,
            batches=even_batches(rows.rows[:REFIT_ROWS]),
            ridge=Reconstruction().ridge,
        )
        start = keep(case, "refit", model, start, arguments)
    if "recovered" in stages:
        if case.method not in WHOLE:
            rule = recipe.prune.weight_blocks
            assert rule is not None
            gates = BlockGates(model, map_blocks(model, rule))
            gates.set_plan(plan)
            recover(
                model,
                rows,
                recipe=whole,
                accelerator=watch.accelerator,
                teacher=dense.model,
                on_step=lambda *progress: None,
                first_row=REFIT_ROWS,
            )
            zero_blocks(model, plan)
            gates.detach()
        keep(case, "recovered", model, start, arguments)
    shutil.rmtree(path / "model")


def keep(case: Case, stage: str, model: Any, start: float, arguments: argparse.Namespace) -> float:
    """Measure a stage that began at `start` and write its figure; when the next one begins."""
    seconds = round(time.perf_counter() - start)
    file = file_of(case, stage, arguments)
    if not file.is_file():
        found = measure(model, recipe_of(case, arguments), dense_model(arguments.model).tokenizer)
        result = {
            "perplexity": asdict(found),
            "seconds": seconds,
            "environment": environment(model.device, "float32"),
        }
        save_text(json.dumps(result) + "\n", file)
        print(f"{case.key}, {stage}: {found.value:.2f} in {seconds} s", flush=True)
    return time.perf_counter()


def measure_dense(arguments: argparse.Namespace) -> Perplexity:
    """The dense model's perplexity; kept in --out."""
    file = Path(arguments.out) / "dense.json"
    if file.is_file():
        return Perplexity(**json.loads(file.read_text()))
    dense = dense_model(arguments.model)
    found = measure(
        dense.model, recipe_of(Case(BLOCKS[0], 0.5, "magnitude"), arguments), dense.tokenizer
    )
    save_text(json.dumps(asdict(found)) + "\n", file)
    return found


def main() -> None:
    """Compute what is missing; write the table after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--parts", default=",".join(STAGES))
    parser.add_argument("--cases", default="", help="only names that hold this")
    parser.add_argument("--name", default=NAME, help="of the table's file")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th of them, from the I-th on")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    arguments = parser.parse_args()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    dense = measure_dense(arguments)
    share, of = (int(number) for number in arguments.share.split("/"))
    cases = [case for case in all_cases() if arguments.cases in case.key][share::of]
    for case in [] if arguments.report else cases:
        compute(case, set(arguments.parts.split(",")), arguments)
    file = RESULTS / f"{arguments.name}.md"
    RESULTS.mkdir(exist_ok=True)
    save_text(report(read(arguments), dense), file)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
