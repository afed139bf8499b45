"""The comparison behind eval/results/weight-blocks.md: which weight blocks to keep.

    python eval/benchmarks/weight_blocks.py --out FOLDER --model SOURCE --data FOLDER [--parts ...]

Half and 70 % of the MLPs' blocks go, in three block shapes, by every method on the same rows. Parts
are stages, each on top of the one before: `choice` (weights as they are), `refit` (least squares on
what stays), `recovered` (the same training rows for all, 64x64 alone, beside ways that train all
along: magnitude masks that close and open again, ACDC-style, and gates and weights together).
--data is a folder with wikitext2/wiki.train.head.raw and wiki.test.raw. What is in --out is not
computed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

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
from llmprune_eval.perplexity_intervals import paired_ratio
from llmprune_eval.report import environment

RESULTS = Path(__file__).parents[1] / "results"
NAME = "weight-blocks"
BLOCKS = ((64, 64), (128, 32), (32, 32))
SPARSITIES = (0.5, 0.7)
# Rows that scores look at, in all methods; gate steps are 40 of 2 rows.
NUM_ROWS = 64
RECOVERY_STEPS = 60
# The refit's rows are the first of these; recovery begins behind them.
REFIT_ROWS = 32
# As many rows as 40 gate steps of 2 and the recovery steps together.
ACDC_STEPS = 140
ACDC = {
    "variant": "magnitude",
    "train": "all",
    "prior": "none",
    "steps": ACDC_STEPS,
    "batch_size": 1,
    "cycles": 3,
    "curve": "at_once",
    "dense": 0.45,
    "sparsify": 0.1,
    "sparse": 0.45,
    "weights_learning_rate": 2.0e-4,
    "weight_decay": 0.0,
}
# The published way: weights learn along while the budget shrinks; as many rows as ACDC-style.
JOINT = {
    "train": "all",
    "curve": "gradual",
    "steps": ACDC_STEPS,
    "batch_size": 1,
    "dense": 0.0,
    "sparsify": 0.7,
    "sparse": 0.3,
    "weights_learning_rate": 2.0e-4,
    "weight_decay": 0.0,
}
# Trained all the way: no choice apart from the training.
WHOLE = {"acdc": ACDC, "joint": JOINT}
METHODS = {
    "sequential_attention": "SequentialAttention++",
    "joint": "SequentialAttention++, weights learn along",
    "taylor_squared": "squared Taylor",
    "wanda": "Wanda-style",
    "magnitude": "magnitude",
    "acdc": "ACDC-style",
}

OURS = ("sequential_attention", "joint")
STAGES = ("choice", "refit", "recovered")


@dataclass(frozen=True)
class Case:
    """Whose choice of which blocks: a block shape, a sparsity, a method."""

    block: tuple[int, int]
    sparsity: float
    method: str

    @property
    def key(self) -> str:
        """Name of its folder and files."""
        return f"{self.block[0]}x{self.block[1]}-{self.sparsity:g}-{self.method}"

    @property
    def stages(self) -> tuple[str, ...]:
        """How far it goes."""
        return ("recovered",) if self.method in WHOLE else STAGES


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


def file_of(case: Case, stage: str, arguments: argparse.Namespace) -> Path:
    """Where a figure is kept."""
    return Path(arguments.out) / f"{case.key}-{stage}.json"


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


def all_cases() -> list[Case]:
    """What is to be computed, most telling first."""
    return [Case(b, s, m) for s in SPARSITIES for b in BLOCKS for m in METHODS]


@dataclass(frozen=True)
class Found:
    """What a stage gave."""

    perplexity: Perplexity
    seconds: int
    about: str


Column = tuple[tuple[int, int], float]


def read(arguments: argparse.Namespace) -> dict[str, dict[Case, Found]]:
    """All figures that are there, by stage."""
    found: dict[str, dict[Case, Found]] = {stage: {} for stage in STAGES}
    for case in all_cases():
        for stage in case.stages:
            file = file_of(case, stage, arguments)
            if file.is_file():
                data = json.loads(file.read_text())
                about = "; ".join(f"{key} {value}" for key, value in data["environment"].items())
                perplexity = Perplexity(**data["perplexity"])
                found[stage][case] = Found(perplexity, data["seconds"], about)
    return found


def report(found: dict[str, dict[Case, Found]], dense: Perplexity) -> str:
    """Markdown of all that is there."""
    abouts = sorted({one.about for stage in found.values() for one in stage.values()})
    lines = [
        "# Which weight blocks to keep: SmolLM2-135M-Instruct",
        "",
        f"Perplexity of wiki.test.raw, first {dense.num_windows} windows of {dense.window} tokens, "
        f"float32 (dense {dense.value:.2f}). Blocks of the MLPs' three projections become zero, "
        f"equally many in every block row. All methods score on the same {NUM_ROWS} rows of 512 "
        "tokens of wiki.train (in-domain); SequentialAttention++ also takes 40 gate steps of 2 of "
        "these rows, all weights fixed. One seed. 128x32 does not divide down_proj, whose blocks "
        "are 64x64 there.",
        "",
    ]
    for stage, title in TITLES.items():
        if rows := found[stage]:
            lines += [f"## {title[0]}", "", *title[1:], *_table(rows), "", *_ratios(rows), ""]
    lines += [
        "Seconds are of the stage alone, one thread on a machine that others used. Made by "
        f"`{COMMAND}`.",
        "",
        *(f"- {about}" for about in abouts),
        "",
    ]
    return "\n".join(lines)


COMMAND = "python eval/benchmarks/weight_blocks.py"
TITLES = {
    "choice": (
        "Choice alone: no weight is changed",
        "So many blocks at once, and nothing done about it, is more than the model survives: no "
        "figure here is of a model to use. They say who breaks it less.",
        "",
    ),
    "refit": (
        "After the refit",
        f"What stays of every projection is refitted by least squares on {REFIT_ROWS} rows, layer "
        "by layer, to what the dense layer makes of the same stream (`reconstruction`).",
        "",
    ),
    "recovered": (
        "After training",
        f"{RECOVERY_STEPS} steps of one row (distillation, all weights) after each refit. "
        f"ACDC-style and the way in which weights learn along train in all their {ACDC_STEPS} "
        "steps, as many rows as gate and recovery steps of SequentialAttention++ together, and "
        "have no refit; in the first magnitude masks close three times, in the second gates shrink "
        "once.",
        "",
    ),
}


def _columns(rows: dict[Case, Found]) -> list[Column]:
    return sorted({(row.block, row.sparsity) for row in rows}, key=lambda c: (c[1], c[0]))


def _table(rows: dict[Case, Found]) -> list[str]:
    columns = _columns(rows)
    heads = " | ".join(f"{b[0]}x{b[1]}, {s:.0%} zero" for b, s in columns)
    lines = [f"| method | {heads} | seconds |", "|---|" + "---:|" * (len(columns) + 1)]
    by_column = {c: _of_column(rows, c) for c in columns}
    for method, label in METHODS.items():
        own = [by_column[column].get(method) for column in columns]
        times = sorted(one.seconds for one in own if one)
        if not times:
            continue
        least = [min(v.perplexity.value for v in by_column[c].values()) for c in columns]
        cells = []
        for one, best in zip(own, least, strict=True):
            shown = "" if one is None else f"{one.perplexity.value:.2f}"
            is_best = one is not None and one.perplexity.value == best
            cells.append(f"**{shown}**" if is_best else shown)
        lines.append(f"| {label} | {' | '.join(cells)} | {times[0]} to {times[-1]} |")
    return lines


def _of_column(rows: dict[Case, Found], column: Column) -> dict[str, Found]:
    return {r.method: v for r, v in rows.items() if (r.block, r.sparsity) == column}


def _ratios(rows: dict[Case, Found]) -> list[str]:
    """The best of SequentialAttention++ over the best of the others, with a paired interval."""
    lines = []
    for block, sparsity in _columns(rows):
        others = _of_column(rows, (block, sparsity))
        own = [others.pop(name) for name in OURS if name in others]
        if not own or not others:
            continue
        ours = min(own, key=lambda one: one.perplexity.value)
        name, best = min(others.items(), key=lambda pair: pair[1].perplexity.value)
        ratio = paired_ratio(best.perplexity, ours.perplexity)
        lines.append(
            f"- {block[0]}x{block[1]}, {sparsity:.0%}: SequentialAttention++ has {ratio.value:.3f} "
            f"({ratio.low:.3f} to {ratio.high:.3f}) times the perplexity of {METHODS[name]}, the "
            "best of the others."
        )
    return lines


def main() -> None:
    """Compute what is missing; write the table after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--parts", default=",".join(STAGES))
    parser.add_argument("--cases", default="", help="only names that hold this")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th of them, from the I-th on")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    arguments = parser.parse_args()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    dense = measure_dense(arguments)
    share, of = (int(number) for number in arguments.share.split("/"))
    cases = [case for case in all_cases() if arguments.cases in case.key][share::of]
    for case in [] if arguments.report else cases:
        compute(case, set(arguments.parts.split(",")), arguments)
    RESULTS.mkdir(exist_ok=True)
    save_text(report(read(arguments), dense), RESULTS / f"{NAME}.md")
    print(f"wrote {RESULTS / NAME}.md")


if __name__ == "__main__":
    main()
