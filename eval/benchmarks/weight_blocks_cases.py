"""What weight_blocks.py compares: block shapes, sparsities and methods, and how each trains."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

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


def file_of(case: Case, stage: str, arguments: argparse.Namespace) -> Path:
    """Where a figure is kept."""
    return Path(arguments.out) / f"{case.key}-{stage}.json"


def all_cases() -> list[Case]:
    """What is to be computed, most telling first."""
    return [Case(b, s, m) for s in SPARSITIES for b in BLOCKS for m in METHODS]
