"""The comparison behind eval/results/weight-blocks.md: which weight blocks to keep.

    python eval/benchmarks/weight_blocks.py --out FOLDER --model SOURCE --data FOLDER [--parts ...]

Part `choice`: half and 70 % of the MLPs' blocks go, in three block shapes, by every method on the
same rows, weights as they are. Part `recovery`: the same training rows for all after the choice,
beside the alternation of dense and sparse phases by magnitude (ACDC-style). --data is a folder with
wikitext2/wiki.train.head.raw and wiki.test.raw. A row that is in --out is not computed again.
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

from llmprune.block_pruning import prune_blocks
from llmprune.checkpoint import load_pruned
from llmprune.files import save_text
from llmprune.recipe import Recipe
from llmprune.run_folder import RunFolder
from llmprune.run_steps import Watch
from llmprune.sources import LoadedModel, load_dense
from llmprune.texts import read_texts, resolve_text
from llmprune.training import start_accelerator
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


@dataclass(frozen=True)
class Row:
    """One cell of the table: a block shape, a sparsity, a method, with recovery or without."""

    block: tuple[int, int]
    sparsity: float
    method: str
    recovered: bool

    @property
    def key(self) -> str:
        """Name of its folder and file."""
        stage = "recovered" if self.recovered else "choice"
        return f"{self.block[0]}x{self.block[1]}-{self.sparsity:g}-{self.method}-{stage}"


def recipe_of(row: Row, arguments: argparse.Namespace) -> Recipe:
    """The recipe of a row."""
    wiki = Path(arguments.data) / "wikitext2"
    gates: dict[str, Any] = {"steps": 40, "batch_size": 2, "micro_batch_size": 1}
    steps = RECOVERY_STEPS if row.recovered else 0
    if row.method in WHOLE:
        gates, steps = WHOLE[row.method], 0
    return Recipe.parse(
        {
            "model": {"source": arguments.model},
            "calibration": {
                "dataset": str(wiki / "wiki.train.head.raw"),
                "num_rows": NUM_ROWS,
                "row_length": 512,
            },
            "prune": {"weight_blocks": {"block": list(row.block), "sparsity": row.sparsity}},
            "method": "sequential_attention" if row.method in WHOLE else row.method,
            "gates": gates,
            "recovery": {"steps": steps, "batch_size": 1, "learning_rate": 2.0e-4},
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
    """The dense model, loaded once."""
    return load_dense(
        Recipe.parse({"model": {"source": source}, "prune": {"layers": {"sparsity": 0}}}).model
    )


def measure(model: Any, recipe: Recipe, tokenizer: Any) -> Perplexity:
    """Perplexity on the recipe's text."""
    task = resolve_text(recipe.evaluation.perplexity[0])
    ids = encode(read_texts(task), tokenizer)
    return measure_perplexity(model, ids, window=task.window, max_windows=task.max_windows)


def compute(row: Row, arguments: argparse.Namespace) -> None:
    """Prune as the row says and measure, where --out does not hold that yet."""
    file = Path(arguments.out) / f"{row.key}.json"
    if file.is_file():
        return
    print(f"{row.key} ...", flush=True)
    recipe = recipe_of(row, arguments)
    dense = dense_model(arguments.model)
    watch = Watch(start_accelerator(recipe.training, recipe.seed), lambda *progress: None)
    path = Path(arguments.out) / "runs" / row.key
    folder = RunFolder.begin(path, recipe, resume=True)
    chosen = path.with_name(path.name.replace("-recovered", "-choice"))
    if row.recovered and (chosen / "plan.json").is_file():
        shutil.copy(chosen / "plan.json", path / "plan.json")
    start = time.perf_counter()
    prune_blocks(recipe, folder, dense, watch)
    seconds = time.perf_counter() - start
    found = measure(load_pruned(path), recipe, dense.tokenizer)
    result = {"perplexity": asdict(found), "seconds": round(seconds)}
    save_text(json.dumps(result) + "\n", file)
    shutil.rmtree(path / "model")
    print(f"{row.key}: {found.value:.2f} in {seconds:.0f} s", flush=True)


def measure_dense(arguments: argparse.Namespace) -> Perplexity:
    """The dense model's perplexity; kept in --out."""
    file = Path(arguments.out) / "dense.json"
    if file.is_file():
        return Perplexity(**json.loads(file.read_text()))
    dense = dense_model(arguments.model)
    found = measure(
        dense.model, recipe_of(Row(BLOCKS[0], 0.5, "magnitude", False), arguments), dense.tokenizer
    )
    save_text(json.dumps(asdict(found)) + "\n", file)
    return found


def rows_of(parts: list[str]) -> list[Row]:
    """The rows of some parts, most telling first."""
    rows = []
    if "choice" in parts:
        plain = [name for name in METHODS if name not in WHOLE]
        rows += [Row(b, s, m, False) for b in BLOCKS for s in SPARSITIES for m in plain]
    if "recovery" in parts:
        rows += [Row(BLOCKS[0], s, m, True) for s in SPARSITIES for m in METHODS]
    return rows


@dataclass(frozen=True)
class Found:
    """What a row gave."""

    perplexity: Perplexity
    seconds: int


Column = tuple[tuple[int, int], float]


def read(arguments: argparse.Namespace) -> dict[Row, Found]:
    """All rows that are there."""
    found = {}
    for row in rows_of(["choice", "recovery"]):
        file = Path(arguments.out) / f"{row.key}.json"
        if file.is_file():
            data = json.loads(file.read_text())
            found[row] = Found(Perplexity(**data["perplexity"]), data["seconds"])
    return found


def report(found: dict[Row, Found], dense: Perplexity) -> str:
    """Markdown of all that is there."""
    about = "; ".join(f"{key} {value}" for key, value in environment("cpu", "float32").items())
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
    for recovered, title in TITLES.items():
        rows = {row: value for row, value in found.items() if row.recovered == recovered}
        if rows:
            lines += [f"## {title[0]}", "", *title[1:], *_table(rows), "", *_ratios(rows), ""]
    return "\n".join(
        [
            *lines,
            "Seconds are of pruning alone, one thread on a machine that others used. Made by "
            f"`{COMMAND}`; {about}.",
            "",
        ]
    )


COMMAND = "python eval/benchmarks/weight_blocks.py"
TITLES = {
    False: (
        "Choice alone: no weight is changed",
        "So many blocks at once, and nothing trained after it, is more than the model survives: no "
        "figure here is of a model to use. They say who breaks it less.",
        "",
    ),
    True: (
        "After training",
        f"{RECOVERY_STEPS} steps of one row (distillation, all weights) after each choice. "
        f"ACDC-style and the way in which weights learn along train in all their {ACDC_STEPS} "
        "steps, as many rows as gate and recovery steps of SequentialAttention++ together; in the "
        "first magnitude masks close three times, in the second gates shrink once.",
        "",
    ),
}


def _columns(rows: dict[Row, Found]) -> list[Column]:
    return sorted({(row.block, row.sparsity) for row in rows}, key=lambda c: (c[1], c[0]))


def _table(rows: dict[Row, Found]) -> list[str]:
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


def _of_column(rows: dict[Row, Found], column: Column) -> dict[str, Found]:
    return {r.method: v for r, v in rows.items() if (r.block, r.sparsity) == column}


def _ratios(rows: dict[Row, Found]) -> list[str]:
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
    parser.add_argument("--parts", default="choice,recovery")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    arguments = parser.parse_args()
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    dense = measure_dense(arguments)
    for row in [] if arguments.report else rows_of(arguments.parts.split(",")):
        compute(row, arguments)
    RESULTS.mkdir(exist_ok=True)
    save_text(report(read(arguments), dense), RESULTS / f"{NAME}.md")
    print(f"wrote {RESULTS / NAME}.md")


if __name__ == "__main__":
    main()
