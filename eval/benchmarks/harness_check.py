"""Whether `llmprune eval` gives lm-eval's own figures, to the last digit.

    python eval/benchmarks/harness_check.py MODEL --data FOLDER [--tasks a,b] [--limit N] [--out F]

Both command lines run on the same model, the same YAML and the same documents. The table has every
figure of both; the exit code is 1 where one differs. lm-eval's own takes half a minute to read all
the tasks that it ships.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmprune.files import save_text
from llmprune_eval.harness import write_yaml
from llmprune_eval.report import environment
from llmprune_eval.suite import BATCH_SIZE, SuiteTask

TASKS = (
    "hellaswag,piqa,arc_easy,winogrande,"
    "blimp_causative,blimp_wh_island,blimp_anaphor_number_agreement"
)


def ours(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Figures of `llmprune eval`, {task: {metric: value, metric_stderr: value}}."""
    command = [sys.executable, "-m", "llmprune.cli", "eval", arguments.model, "--json"]
    command += ["--tasks", arguments.tasks, "--data", arguments.data]
    command += ["--limit", str(arguments.limit), "--out", str(scratch / "ours")]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, dict[str, Any]] = {}
    for task in json.loads(shown)["tasks"]:
        figures = {m: both["figures"]["model"] for m, both in task["metrics"].items()}
        values = {metric: figure["value"] for metric, figure in figures.items()}
        errors = {f"{metric}_stderr": figure["stderr"] for metric, figure in figures.items()}
        found[task["name"]] = values | errors
    return found


def theirs(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Figures of `lm-eval run` on the YAML that `llmprune eval` writes."""
    for task in arguments.tasks.split(","):
        folder = scratch / "tasks" / task
        folder.mkdir(parents=True)
        write_yaml(task, SuiteTask(), Path(arguments.data), folder)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={arguments.model}", "--device", "cpu"]
    command += ["--tasks", arguments.tasks, "--include_path", str(scratch / "tasks")]
    command += ["--limit", str(arguments.limit), "--batch_size", str(BATCH_SIZE)]
    command += ["--output_path", str(scratch / "theirs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (file,) = (scratch / "theirs").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {
        task: {key.partition(",")[0]: value for key, value in figures.items() if "," in key}
        for task, figures in results.items()
    }


def main() -> int:
    """Run both, print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--out", type=Path, help="JSON of every figure of both")
    arguments = parser.parse_args()
    arguments.data = str(Path(arguments.data).resolve())
    with tempfile.TemporaryDirectory(prefix="llmprune-check-") as scratch:
        mine = ours(arguments, Path(scratch))
        other = theirs(arguments, Path(scratch))
    differ = 0
    print(f"{'':52}{'llmprune eval':>24}{'lm-eval run':>24}")
    for task, figures in mine.items():
        for metric, value in figures.items():
            # a bootstrap, of fewer resamples here than there
            is_bootstrap = metric == "perplexity_stderr"
            same = value == other[task].get(metric) or is_bootstrap
            differ += not same
            mark = "" if same else "  DIFFERS"
            print(f"{task + ' ' + metric:52}{value!r:>24}{other[task].get(metric)!r:>24}{mark}")
    count = sum(map(len, mine.values()))
    print(f"{count} figures, {differ} differ (limit {arguments.limit})")
    if arguments.out:
        found = {
            "figures": count,
            "differ": differ,
            "documents of a task, at most": arguments.limit,
            "llmprune eval": mine,
            "lm-eval run": {task: other[task] for task in mine},
            "environment": environment("cpu", "float32") | {"lm_eval": version("lm_eval")},
        }
        save_text(json.dumps(found, indent=1) + "\n", arguments.out)
    return int(differ > 0)


if __name__ == "__main__":
    raise SystemExit(main())
