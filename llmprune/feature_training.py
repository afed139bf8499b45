"""One-pass training of small networks whose input gates choose the columns of a table.

The paper's feature selection (Yasuda et al. 2023, arXiv 2209.14881): a warm-up with every gate
open, then one phase per pick, each trained before its pick is made; weights are carried over from
phase to phase and only the logits begin anew. Networks have one hidden layer, and all of them
share the gates. Torch alone: `llmprune.features` has the scikit-learn side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.forward_selection import ForwardAttention

LEARNING_RATE = 1e-2
# logits must part within one phase, weights need not
LOGIT_LEARNING_RATE = 5e-2
# AdamW's: with the rate above a weight that nothing feeds fades in a hundred steps, two phases.
# On spoken letters (ISOLET) accuracy rises by one to two points over no decay; at 3 it falls again.
WEIGHT_DECAY = 1.0
WARM_UP_SHARE = 0.1
BATCH_SIZE = 256
# Of the threshold above which linear gates select nothing; nearer to 1 needs longer phases.
PENALTY_SHARE = 0.5
# With fewer rows than this per network, the picks of a single one are a matter of its random start.
ROWS_PER_NETWORK = 512
MAX_NETWORKS = 8


def networks_for(num_rows: int) -> int:
    """How many networks share the gates: 1 from 512 rows on, 8 up to 64 rows.

    A small table is fitted at once from many sets of columns, so a single network's logits depend
    on its start; the mean gradient over several starts (and bootstrap samples) does so less.
    """
    return min(MAX_NETWORKS, max(1, ROWS_PER_NETWORK // num_rows))


@dataclass(frozen=True)
class Table:
    """What the networks learn from.

    Attributes:
        inputs: Standardised columns, shape (rows, columns), float32.
        targets: Class numbers, shape (rows,), int64; or real targets, shape (rows,), float32.
        owner: The candidate that each column belongs to, shape (columns,), int64.
    """

    inputs: Tensor
    targets: Tensor
    owner: Tensor

    @property
    def num_outputs(self) -> int:
        """Classes, or 1 for a real target."""
        return 1 if self.targets.is_floating_point() else int(self.targets.max()) + 1


class GatedNetworks:
    """Networks of one hidden layer behind the same gates, and the steps that train them."""

    def __init__(
        self, table: Table, engine: ForwardAttention, hidden_size: int, generator: torch.Generator
    ) -> None:
        """Random weights; nothing is trained.

        Args:
            table: The rows; full batches where there are at most 256.
            engine: Holds the logits and makes the picks, one unit per candidate.
            hidden_size: ReLU units of each network.
            generator: Of the weights and the batches.
        """
        self.table, self.engine, self.generator = table, engine, generator
        num_rows, num_columns = table.inputs.shape
        self.num_networks = networks_for(num_rows)

        def normal(*shape: int) -> Tensor:
            draw = torch.randn(self.num_networks, *shape, generator=generator)
            return (draw / math.sqrt(shape[0])).requires_grad_()

        self.reader = normal(num_columns, hidden_size)
        self.writer = normal(hidden_size, table.num_outputs)
        self.biases = [
            torch.zeros(self.num_networks, 1, size, requires_grad=True)
            for size in (hidden_size, table.num_outputs)
        ]
        # a network of several has a bootstrap sample of its own
        self.rows = torch.arange(num_rows).expand(self.num_networks, -1)
        if self.num_networks > 1:
            self.rows = torch.randint(num_rows, self.rows.shape, generator=generator)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.reader, self.writer], "weight_decay": WEIGHT_DECAY},
                {"params": self.biases},
                {"params": [engine.logits], "lr": LOGIT_LEARNING_RATE},
            ],
            lr=LEARNING_RATE,
            weight_decay=0.0,
        )

    def loss(self, reader: Tensor, rows: Tensor) -> Tensor:
        """Sum over the networks of the mean loss on their rows, (networks, batch); a scalar."""
        hidden = torch.relu(self.table.inputs[rows] @ reader + self.biases[0])
        outputs = (hidden @ self.writer + self.biases[1]).flatten(0, 1)
        targets = self.table.targets[rows].flatten()
        if targets.is_floating_point():
            return self.num_networks * functional.mse_loss(outputs[:, 0], targets)
        return self.num_networks * functional.cross_entropy(outputs, targets)

    def step(self, gates: Tensor | None, strength: float) -> None:
        """One step of AdamW on weights and logits; `gates` None leaves all open."""
        rows = self.rows
        if rows.shape[1] > BATCH_SIZE:
            size = (self.num_networks, BATCH_SIZE)
            rows = rows.gather(1, torch.randint(rows.shape[1], size, generator=self.generator))
        self.optimizer.zero_grad()
        reader = self.reader
        if gates is not None:
            reader = reader * gates[self.table.owner, None]
        loss = self.loss(reader, rows)
        if strength:
            loss = loss + self.engine.penalty(self.squares(self.reader), strength)
        loss.backward()
        self.optimizer.step()

    def squares(self, values: Tensor) -> Tensor:
        """Squared norm of every candidate's part of `values`, shaped as the reading weights."""
        sums = torch.zeros(self.engine.num_units)
        return sums.index_add(0, self.table.owner, values.square().sum((0, 2)))

    def threshold(self) -> float:
        """The penalty from which on linear gates give the unselected nothing, at these weights.

        The largest gradient norm, per square root of cost, among the unselected candidates, of the
        weights that read them (their products with the gates at 0).
        """
        selected = self.engine.selected[self.table.owner, None]
        reader = (self.reader.detach() * selected).requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(reader, self.rows), reader)
        pulls = self.squares(gradient).sqrt() / self.engine.costs.sqrt()
        return float(pulls[~self.engine.selected].max())


def train_selection(
    table: Table,
    engine: ForwardAttention,
    *,
    hidden_size: int,
    num_steps: int,
    generator: torch.Generator,
) -> None:
    """Warm up, then train and pick until the engine is done; `engine.order` has the picks.

    Args:
        table: The rows.
        engine: Nothing selected yet.
        hidden_size: ReLU units of each network.
        num_steps: Optimizer steps of a phase.
        generator: Of the weights and the batches.
    """
    networks = GatedNetworks(table, engine, hidden_size, generator)
    for _ in range(round(WARM_UP_SHARE * num_steps * engine.num_phases)):
        networks.step(None, 0.0)
    while not engine.is_done:
        linear = engine.gate == "linear"
        strength = PENALTY_SHARE * networks.threshold() if linear else 0.0
        for _ in range(num_steps):
            networks.step(engine.gates(), strength)
        engine.select()
        # logits begin anew, and so does what the optimizer knows of them
        networks.optimizer.state.pop(engine.logits, None)
