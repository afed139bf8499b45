"""The comparison of quality.py on a GPU: in a given time, and with more tokens.

    python eval/benchmarks/quality_gpu.py --out FOLDER --results FOLDER --budget-s 270 \
        [--jobs N] [--data FOLDER] [--model SOURCE] [--parts ...] [--without omp]

Processes side by side compute what is wanted most; after --budget-s nothing is begun, after
--grace-s more everything is stopped, and whatever is there becomes tables and a plot, called after
the device. What is in --out is not computed again.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import quality
from quality import NAME, PARTS, RESULTS, Part

from llmprune.files import save_text
from llmprune.recipe import Recipe
from llmprune_eval.compare import Extent
from llmprune_eval.comparison import Comparison
from llmprune_eval.comparison_plot import plot
from llmprune_eval.contenders import check_methods
from llmprune_eval.crew import Block, Crew, Figure, compute, default_size, known_table
from llmprune_eval.stored_results import Result, StoredResults

# A GPU has the memory for whole batches; states of gates are kept for runs that take hours.
ON_A_GPU = ("gates.micro_batch_size=null", "training.save_every=1000000")
# Eight times the tokens of gates, refit and recovery, four times those of scores. The text of
# quality.py's --data has 454 rows.
MORE_TOKENS = (
    "calibration.num_rows=448",
    "gates.prior_rows=256",
    "gates.steps=160",
    "gates.batch_size=4",
    "reconstruction.num_rows=256",
    "recovery.steps=240",
    "recovery.batch_size=2",
)
BEST_BASELINES = ["taylor_squared", "flap", "block_influence"]
ALL_PARTS = PARTS | {
    "more-tokens": Part(
        "main-25",
        ["sequential_attention", *BEST_BASELINES, "gradual", "next_token", quality.FASTER],
        Extent(refit="best:3", recover="best:2", final_windows=0),
        title="main-25-more-tokens",
    ),
    "ablations": replace(PARTS["ablations"], methods=quality.ABLATIONS),
}
# Most wanted first.
ORDER = ["main", "more-tokens", "seeds", "half", "mlp", "mixed", "mixed-importance", "c4"]
ORDER += ["ablations", "final", "c4-next-token"]
# How often tables are written, so that a kill leaves some.
WRITE_S = 30.0


def block_of(name: str, arguments: argparse.Namespace) -> Block:
    """A part with its recipe for a GPU."""
    part = ALL_PARTS[name]
    overrides = [*ON_A_GPU, *(MORE_TOKENS if name == "more-tokens" else ()), *arguments.set]
    recipe = quality.recipe_of(part.block, arguments, overrides)
    without = arguments.without.split(",")
    methods = [one for one in check_methods(part.methods) if one not in without]
    return Block(part.table, recipe, methods, part.extent)


def stored(store: StoredResults) -> dict[str, Result]:
    """What an earlier run left, by request."""
    return {key: result for key, result in store.all_asked().items() if not result.refused}


class Tables:
    """The tables of what is there, written under a name that says on which device."""

    def __init__(self, blocks: list[Block], folder: Path, command: str, jobs: int) -> None:
        # a later part of the same table goes further
        self.blocks = list({block.name: block for block in blocks}.values())
        self.folder = folder
        self.command = command
        self.jobs = jobs
        self.written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, known: dict[str, Result], *, with_plot: bool) -> None:
        """Write Markdown and JSON, and the plot where it is asked for."""
        tables = [known_table(block, known) for block in self.blocks]
        tables = [table for table in tables if table.dense is not None and table.stages]
        if not tables:
            return
        whole = Comparison(tuple(tables), self.command)
        assert tables[0].dense is not None
        device = str(tables[0].dense.environment.get("device", "unknown"))
        name = f"{NAME}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"
        note = (
            f"\n{self.jobs} processes shared the device, so seconds are those of a crowded one and "
            "tell nothing about a method alone. Gates train on whole batches at once (on the CPU "
            "row by row). Rows and stages without a figure were not computed.\n"
        )
        save_text(whole.to_markdown() + note, self.folder / f"{name}.md")
        save_text(whole.to_json(), self.folder / f"{name}.json")
        if with_plot:
            plot(whole, self.folder / f"{name}.png")
        self.written = time.monotonic()


def main() -> int:
    """Compute and write."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--parts", default=",".join(ORDER))
    # ten times as long as any other, and all refits of a block wait for it (H200: 230 s)
    parser.add_argument("--without", default="omp", help="methods, with commas; default omp")
    parser.add_argument("--jobs", type=int, default=default_size())
    parser.add_argument("--budget-s", type=float, default=3600.0)
    parser.add_argument("--grace-s", type=float, default=20.0)
    parser.add_argument("--set", action="append", default=[], help="key=value for every recipe")
    arguments = parser.parse_args()
    until = began + arguments.budget_s
    names = [name for name in arguments.parts.split(",") if name]
    blocks = [block_of(name, arguments) for name in names]
    out = Path(arguments.out)
    (out / "results").mkdir(parents=True, exist_ok=True)
    recipes: list[Recipe] = [recipe for block in blocks for recipe in block.recipes()]
    crew = Crew(arguments.jobs, out, recipes)
    command = (
        "python eval/benchmarks/quality_gpu.py --out FOLDER "
        f"--parts {arguments.parts} --jobs {arguments.jobs}"
    )
    tables = Tables(blocks, arguments.results, command, arguments.jobs)
    known = stored(StoredResults(out / "results"))

    def on_figure(figure: Figure, result: Result) -> None:
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in result.seconds.items())
        said = f"{result.value:.3f}" if result.value is not None else f"REFUSED {result.refused}"
        print(f"{time.monotonic() - began:6.1f} s  {figure.title}: {said}  [{seconds}]", flush=True)
        if time.monotonic() - tables.written > WRITE_S:
            tables.write(known, with_plot=False)

    try:
        compute(
            blocks, crew, known, until=until, at_most=until + arguments.grace_s, on_figure=on_figure
        )
    finally:
        for figure in crew.at_work:
            print(f"not finished: {figure.title}", flush=True)
        crew.end()
        tables.write(known, with_plot=True)
    print(f"{len(known)} figures after {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
