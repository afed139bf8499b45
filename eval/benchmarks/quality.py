"""The comparison behind eval/results/quality-smollm2-135m.md.

    python eval/benchmarks/quality.py --out FOLDER [--data FOLDER] [--model SOURCE] [--parts ...]

Everything is kept in --out and never computed twice, so parts can be run one after the other, on
other days, or stopped; the last step writes the tables and the plot of all that is there. --data is
a folder with wikitext2/wiki.train.head.raw and wikitext2/wiki.test.raw (and c4/*.jsonl.gz), for
machines that cannot reach the Hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprune.files import save_text
from llmprune.recipe import Recipe
from llmprune_eval.compare import Extent, compare
from llmprune_eval.comparison import Comparison
from llmprune_eval.comparison_plot import plot
from llmprune_eval.contenders import CONTENDERS

SUITE = Path(__file__).parents[1] / "suites" / "quality-smollm2-135m"
RESULTS = Path(__file__).parents[1] / "results"
NAME = "quality-smollm2-135m"
# Of the controls this one stands in every block, and all in the main block.
GRADUAL = "gradual"
# Both ends of the logits' rates stand there, too: `learning_rate: auto` lies between them.
FASTER, SLOWER = "faster_gates", "slower_gates"
OF_US = (GRADUAL, FASTER, SLOWER)
METHODS = [name for name, one in CONTENDERS.items() if not one.is_control or name in OF_US]
EVERYONE = [name for name, one in CONTENDERS.items() if not one.is_ablation or name in OF_US]
ABLATIONS = ["sequential_attention", "gradual", "prior_alone"]
ABLATIONS += [name for name, one in CONTENDERS.items() if one.is_ablation]

# Who is trained after the cut: the best baseline of the main block, and the nearest control.
FURTHEST = ["sequential_attention", "taylor_squared", GRADUAL, FASTER]


@dataclass(frozen=True)
class Part:
    """A block and how far it goes; `title` is for a table apart from the block's own."""

    block: str
    methods: list[str] | None
    extent: Extent
    title: str | None = None

    @property
    def table(self) -> str:
        """What its table is called."""
        return self.title or self.block


PARTS = {
    "main": Part("main-25", EVERYONE, Extent(refit="best:6")),
    "mlp": Part("mlp-25", METHODS, Extent(refit="best:4")),
    "half": Part("main-50", METHODS, Extent(refit="best:4")),
    "mixed": Part("mixed-25", METHODS, Extent(refit="best:4", recover="best:1")),
    "mixed-importance": Part("mixed-25-importance", METHODS, Extent(refit="best:4")),
    "recovery": Part("main-25", FURTHEST, Extent(refit="best:3", recover="best:3")),
    "seeds": Part("main-25", EVERYONE, Extent(refit="best:6", recover="best:5", seeds=3)),
    "c4": Part("main-25-c4", METHODS, Extent(refit="best:4")),
    "ablations": Part("main-25", ABLATIONS, Extent(refit="best:0"), title="main-25-ablations"),
    "c4-next-token": Part(
        "main-25-c4",
        ["sequential_attention", "next_token"],
        Extent(refit="best:0"),
        title="main-25-c4-next-token",
    ),
    "final": Part(
        "main-25",
        [*FURTHEST[:2], FASTER],
        Extent(refit="best:2", recover="best:2", final_windows=0),
        title="main-25-whole-test-set",
    ),
}


def recipe_of(block: str, arguments: argparse.Namespace, changes: Sequence[str] = ()) -> Recipe:
    """The suite's recipe with changes, on local files where they are given."""
    overrides = [*changes]
    if arguments.model:
        overrides += [f"model.source={arguments.model}"]
    if arguments.data:
        wiki = Path(arguments.data) / "wikitext2"
        rows = wiki / "wiki.train.head.raw"
        if block.endswith("-c4"):
            rows = Path(arguments.data) / "c4" / "c4_en_train_head1000.jsonl.gz"
        overrides += [f"calibration.dataset={rows}", "calibration.config=null"]
        overrides += [f"evaluation.perplexity.0.dataset={wiki / 'wiki.test.raw'}"]
        overrides += ["evaluation.perplexity.0.config=null"]
    return Recipe.read(SUITE / f"{block}.yaml", overrides)


def run(part: Part, arguments: argparse.Namespace, *, report_only: bool) -> Comparison:
    """One part, or what is there of it."""
    return compare(
        {part.table: recipe_of(part.block, arguments)},
        arguments.out,
        part.methods,
        extent=part.extent,
        report_only=report_only,
        on_progress=lambda task, done, total: print(f"{task}: {done}/{total}", flush=True),
    )


def main() -> None:
    """Run the parts, then write the tables of every block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--report", action="store_true", help="compute nothing")
    arguments = parser.parse_args()
    names = [name for name in arguments.parts.split(",") if name]
    for name in [] if arguments.report else names:
        run(PARTS[name], arguments, report_only=False)
    furthest = {PARTS[name].table: PARTS[name] for name in PARTS if name in names}
    tables = [t for one in furthest.values() for t in run(one, arguments, report_only=True).blocks]
    command = f"python eval/benchmarks/quality.py --out FOLDER --parts {arguments.parts}"
    whole = Comparison(tuple(tables), command)
    RESULTS.mkdir(exist_ok=True)
    save_text(whole.to_markdown(), RESULTS / f"{NAME}.md")
    save_text(whole.to_json(), RESULTS / f"{NAME}.json")
    plot(whole, RESULTS / f"{NAME}.png")
    print(f"wrote {RESULTS / NAME}.md")


if __name__ == "__main__":
    sys.exit(main())
