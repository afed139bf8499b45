"""Feature selection: Sequential Attention beside other selectors, on tables in a folder.

The paper's protocol (Yasuda et al. 2023, arXiv 2209.14881): select 50 columns, retrain a network
of one hidden layer of 67 ReLU units on them from scratch, test accuracy over 5 seeds, each with a
split of its own. Gene expression: 20 columns, 5 folds, selection inside each fold. Every method
sees the same rows, and every network is trained in the same way. A figure that is in the results
file already is not computed again.

    python eval/benchmarks/features.py --data DIR --out eval/results
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.stats import entropy
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import mutual_info_classif
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch.nn import functional

from llmprune.feature_crosses import cross_candidates
from llmprune.features import SequentialAttentionSelector
from llmprune.files import save_text

# files that are not called as their set is here
MATLAB = {"isolet": "Isolet", "coil20": "COIL20", "prostate": "Prostate-GE"}
GENES = ("leukemia", "colon", "prostate")
DATASETS = ("mice", "isolet", "coil20", "mnist", *GENES)
HIDDEN_SIZE = 67
# on the fifty to eighty rows of gene data a network has seen everything long before
RETRAINING_STEPS, GENE_STEPS = 1500, 300
# nearest neighbours are counted among so many rows at most
MUTUAL_INFORMATION_ROWS = 2000

Select = Callable[[NDArray, NDArray, int, int], NDArray]


def read(data: Path, name: str) -> tuple[NDArray, NDArray]:
    """Columns and class numbers of a data set."""
    if name == "mice":
        with (data / "mice_protein/Data_Cortex_Nuclear.csv").open() as file:
            rows = list(csv.DictReader(file))
        proteins = [name for name in rows[0] if name.endswith("_N")]
        values = np.array([[float(row[name] or "nan") for name in proteins] for row in rows])
        # a few proteins of a few mice were not measured
        values = np.where(np.isnan(values), np.nanmean(values, 0), values)
        labels = np.array([row["class"] for row in rows])
    elif name == "mnist":
        images = gzip.decompress((data / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())
        digits = gzip.decompress((data / "mnist/t10k-labels-idx1-ubyte.gz").read_bytes())
        values = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784) / 255
        labels = np.frombuffer(digits, np.uint8, offset=8)
    else:
        matrix = loadmat(data / f"scikit_feature/{MATLAB.get(name, name)}.mat")
        values, labels = matrix["X"].astype(np.float64), matrix["Y"].ravel()
    return values, np.unique(labels, return_inverse=True)[1]


def splits(name: str, labels: NDArray, seed: int) -> Iterator[tuple[NDArray, NDArray]]:
    """Training and test rows: one stratified split of 80 to 20, or five folds of gene data."""
    if name in GENES:
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        yield from folds.split(labels[:, None], labels)
    else:
        rows = np.arange(len(labels))
        yield train_test_split(rows, test_size=0.2, stratify=labels, random_state=seed)


def standardised(values: NDArray, like: NDArray) -> NDArray[np.float32]:
    """Columns by the mean and deviation that they have in `like`."""
    scale = like.std(0)
    return ((values - like.mean(0)) / np.where(scale > 1e-12, scale, 1)).astype(np.float32)


def retrained_accuracy(
    train: tuple[NDArray, NDArray], test: tuple[NDArray, NDArray], steps: int, seed: int
) -> float:
    """Test accuracy of a new network on these columns; the same training for every method."""
    inputs = torch.from_numpy(standardised(train[0], train[0]))
    targets = torch.from_numpy(train[1])
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(inputs.shape[1], HIDDEN_SIZE),
        torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN_SIZE, int(targets.max()) + 1),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (min(len(inputs), 256),))
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guess = network(torch.from_numpy(standardised(test[0], train[0]))).argmax(1)
    return float((guess.numpy() == test[1]).mean())


def by_softmax(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """The selector as it comes."""
    return SequentialAttentionSelector(None, count, random_state=seed).fit(inputs, labels).order_


def by_linear(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """The selector with linear gates."""
    selector = SequentialAttentionSelector(None, count, gate="linear", random_state=seed)
    return selector.fit(inputs, labels).order_


def by_logistic(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """Logistic regression with an L1 penalty on the columns' norms over the classes.

    Proximal gradient with momentum along a path of falling penalties, each started from the one
    before, until three times `count` columns have a weight; of those the largest. (Stopped at
    `count`, where the penalty is stronger, the columns are worse.)
    """
    columns = torch.from_numpy(standardised(inputs, inputs))
    targets = functional.one_hot(torch.from_numpy(labels)).float()
    offset = targets.mean(0).log()
    smoothness = float(torch.linalg.matrix_norm(columns, 2)) ** 2 / len(columns) / 2
    weights = torch.zeros(columns.shape[1], targets.shape[1])

    def gradient(point: torch.Tensor) -> torch.Tensor:
        errors = torch.softmax(columns @ point + offset, 1) - targets
        return columns.T @ errors / len(columns)

    penalty = float(gradient(weights).norm(dim=1).max())
    while int((weights.norm(dim=1) > 0).sum()) < 3 * count and penalty > 1e-6:
        penalty *= 0.85
        point, momentum = weights, 1.0
        for _ in range(60):
            stepped = point - gradient(point) / smoothness
            norms = stepped.norm(dim=1, keepdim=True).clamp_min(1e-30)
            new = stepped * (1 - penalty / smoothness / norms).clamp_min(0)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            point = new + (momentum - 1) / following * (new - weights)
            weights, momentum = new, following
    return weights.norm(dim=1).argsort(descending=True)[:count].numpy()


def counted_information(columns: NDArray, labels: NDArray) -> NDArray:
    """H(class) + H(column) - H(both) of every column, by counts."""
    classes = np.eye(labels.max() + 1)[labels]
    joint = np.stack([(columns == value).T @ classes for value in np.unique(columns)], axis=1)
    both = joint.reshape(len(joint), -1)
    return entropy(classes.sum(0)) + entropy(joint.sum(2), axis=1) - entropy(both, axis=1)


def by_mutual_information(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """Mutual information of each column with the class: counted where it has at most ten values.

    Of the other columns by nearest neighbours, on 2,000 rows at most.
    """
    if len(inputs) > MUTUAL_INFORMATION_ROWS:
        rows = np.random.default_rng(seed).permutation(len(inputs))[:MUTUAL_INFORMATION_ROWS]
        inputs, labels = inputs[rows], labels[rows]
    few = np.array([len(np.unique(column)) <= 10 for column in inputs.T])
    scores = np.zeros(inputs.shape[1])
    if few.any():
        scores[few] = counted_information(inputs[:, few], labels)
    if not few.all():
        scores[~few] = mutual_info_classif(inputs[:, ~few], labels, random_state=seed)
    return np.argsort(-scores, kind="stable")[:count]


def by_forest(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """Impurity importance of a random forest of 300 trees."""
    forest = RandomForestClassifier(300, random_state=seed).fit(inputs, labels)
    return np.argsort(-forest.feature_importances_, kind="stable")[:count]


def by_pursuit(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """Orthogonal matching pursuit on least squares with one-hot targets."""
    columns = standardised(inputs, inputs).astype(np.float64)
    targets = np.eye(labels.max() + 1)[labels]
    targets -= targets.mean(0)
    order: list[int] = []
    residual = targets
    while len(order) < count:
        pulls = np.linalg.norm(columns.T @ residual, axis=1)
        pulls[order] = -1
        order.append(int(pulls.argmax()))
        selected = columns[:, order]
        residual = targets - selected @ np.linalg.lstsq(selected, targets)[0]
    return np.array(order)


def by_chance(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """Random columns."""
    return np.random.default_rng(seed).choice(inputs.shape[1], count, replace=False)


def everything(inputs: NDArray, labels: NDArray, count: int, seed: int) -> NDArray:
    """All columns."""
    return np.arange(inputs.shape[1])


METHODS: dict[str, Select] = {
    "SA": by_softmax,
    "SA, linear gate": by_linear,
    "L1-logistic": by_logistic,
    "mutual information": by_mutual_information,
    "random forest": by_forest,
    "OMP": by_pursuit,
    "random": by_chance,
    "all columns": everything,
}


def measure(name: str, method: str, seed: int, values: NDArray, labels: NDArray) -> dict:
    """One row of the results: mean accuracy over the splits, processor seconds per selection."""
    count = 20 if name in GENES else 50
    accuracies, seconds = [], []
    for fold, (train, test) in enumerate(splits(name, labels, seed)):
        started = time.process_time()
        # seeds of folds apart, so that no two start from the same weights
        chosen = METHODS[method](values[train], labels[train], count, 100 * seed + fold)
        seconds.append(time.process_time() - started)
        accuracies.append(
            retrained_accuracy(
                (values[train][:, chosen], labels[train]),
                (values[test][:, chosen], labels[test]),
                GENE_STEPS if name in GENES else RETRAINING_STEPS,
                100 * seed + fold,
            )
        )
    return {
        "accuracy": float(np.mean(accuracies)),
        "cpu_seconds": float(np.mean(seconds)),
        "processor": processor(),
    }


def processor() -> str:
    """Its name, as Linux has it; elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0].replace("(R)", "") if names else platform.processor() or platform.machine()


def tables(results: dict[str, dict], datasets: list[str], seeds: int) -> str:
    """Markdown: accuracy as mean and sample deviation over the seeds; processor seconds.

    Seconds of different processors are not comparable: one table each.
    """
    head = "| method | " + " | ".join(datasets) + " |\n|---|" + "---|" * len(datasets)
    accuracy = [head]
    timed = [row for row in results.values() if "cpu_seconds" in row]
    seconds = {name: [f"{name}:\n\n{head}"] for name in sorted({r["processor"] for r in timed})}
    known = {key.split("/")[1] for key in results}
    for method in [method for method in METHODS if method in known]:
        cells: list[str] = []
        times: dict[str, list[str]] = {name: [] for name in seconds}
        for name in datasets:
            rows = [results.get(f"{name}/{method}/{seed}") for seed in range(seeds)]
            found = [row for row in rows if row]
            values = [row["accuracy"] for row in found]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            missing = "" if len(found) == seeds else f" ({len(found)} of {seeds})"
            cells.append(f"{np.mean(values):.3f}{spread}{missing}" if found else "-")
            for machine, column in times.items():
                here = [row for row in found if row["processor"] == machine]
                spent = [row["cpu_seconds"] for row in here if "cpu_seconds" in row]
                column.append(f"{np.median(spent):.1f}" if spent else "-")
        accuracy.append(f"| {method} | " + " | ".join(cells) + " |")
        for machine, column in times.items():
            seconds[machine].append(f"| {method} | " + " | ".join(column) + " |")
    return "\n\n".join("\n".join(lines) for lines in (accuracy, *seconds.values()))


def differences(results: dict[str, dict], datasets: list[str], seeds: int) -> str:
    """Markdown: SA less each other method, over the seeds that both have; mean, wins and losses."""
    lines = ["| SA less | " + " | ".join(datasets) + " |\n|---|" + "---|" * len(datasets)]
    known = {key.split("/")[1] for key in results} - {"SA"}
    for method in [method for method in METHODS if method in known]:
        cells = []
        for name in datasets:
            pairs = [
                [results.get(f"{name}/{who}/{seed}") for who in ("SA", method)]
                for seed in range(seeds)
            ]
            gaps = np.array([a["accuracy"] - b["accuracy"] for a, b in pairs if a and b])
            won, lost = (gaps > 1e-9).sum(), (gaps < -1e-9).sum()
            cells.append(f"{gaps.mean():+.3f} ({won}:{lost})" if len(gaps) else "-")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict], datasets: list[str], seeds: int, path: Path) -> None:
    """Accuracy per data set and method, one bar a method, the seeds as dots."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    known = {key.split("/")[1] for key in results} - {"all columns"}
    methods = [method for method in METHODS if method in known]
    figure, axes = pyplot.subplots(figsize=(11, 4.2), layout="constrained")
    colours = dict(
        zip(
            METHODS,
            ["#0b5394", "#6fa8dc", "#e69138", "#93c47d", "#38761d", "#a64d79", "#bbbbbb"],
            strict=False,
        )
    )
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        for place, name in enumerate(datasets):
            rows = [results.get(f"{name}/{method}/{seed}") for seed in range(seeds)]
            values = [row["accuracy"] for row in rows if row]
            if values:
                at = place + (number - (len(methods) - 1) / 2) * width
                label = method if place == 0 else None
                axes.bar(at, np.mean(values), width * 0.92, color=colours[method], label=label)
                axes.plot([at] * len(values), values, "k.", markersize=2.5)
    counts = [20 if name in GENES else 50 for name in datasets]
    axes.set_xticks(
        range(len(datasets)),
        [f"{name}\n{count} columns" for name, count in zip(datasets, counts, strict=True)],
    )
    axes.set_ylim(0.4, 1.0)
    axes.set_ylabel("test accuracy of the retrained network")
    axes.set_title("Bars: mean over the seeds; dots: single seeds. The axis starts at 0.4.")
    axes.legend(ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.savefig(path, dpi=130)


def show_crosses(data: Path, budget: float) -> str:
    """What is picked among fields and crosses of 200 advertisements under a cost budget."""
    with (data / "criteo/criteo_sample.txt").open() as file:
        rows = list(csv.DictReader(file))
    names = [f"C{number}" for number in range(1, 27)]
    fields = {name: [row[name] for row in rows] for name in names}
    labels = np.array([int(row["label"]) for row in rows])
    # a field costs more the more values its embedding table has to hold
    costs = {name: float(np.log2(1 + len(set(values)))) for name, values in fields.items()}
    candidates = cross_candidates(fields, num_buckets=16, costs=costs)
    selector = SequentialAttentionSelector(
        groups=candidates.groups, costs=candidates.costs, budget=budget, random_state=0
    ).fit(candidates.inputs, labels)
    order = list(dict.fromkeys(candidates.groups))
    picks = [
        f"{order[number]} ({candidates.costs[order[number]]:.1f})" for number in selector.order_
    ]
    spent = sum(candidates.costs[order[number]] for number in selector.order_)
    return f"{len(order)} candidates, budget {budget:g}, spent {spent:.1f}: " + ", ".join(picks)


def compute(arguments: argparse.Namespace, results: dict[str, dict], path: Path) -> None:
    """Add the rows that are missing, each written as soon as it is there."""
    loaded = {name: read(arguments.data, name) for name in arguments.datasets}
    for seed in range(arguments.seeds):
        for name in arguments.datasets:
            for method in arguments.methods:
                key = f"{name}/{method}/{seed}"
                if key not in results:
                    results[key] = measure(name, method, seed, *loaded[name])
                    save_text(json.dumps(results, indent=0, sort_keys=True) + "\n", path)
                    print(key, results[key], flush=True)


def main() -> None:
    """Compute what is missing, then write the plot and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--report", action="store_true", help="compute nothing, show what is there")
    arguments = parser.parse_args()
    # columns without variance are no news in gene data
    warnings.filterwarnings("ignore", message="Features .* are constant")
    path = arguments.out / "features.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if not arguments.report:
        compute(arguments, results, path)
    print(tables(results, arguments.datasets, arguments.seeds))
    print(differences(results, arguments.datasets, arguments.seeds))
    draw(results, arguments.datasets, arguments.seeds, arguments.out / "features.png")
    print(show_crosses(arguments.data, budget=40.0))


if __name__ == "__main__":
    main()
