"""One-pass training of small networks whose input gates choose the columns of a table.

The paper's feature selection (Yasuda et al. 2023, arXiv 2209.14881): a warm-up with every gate
open, then one phase per pick, each trained before its pick is made; weights are carried over from
phase to phase and only the logits begin anew. Networks have one hidden layer, and all of them
share the gates. Torch alone: `llmprune.features` has the scikit-learn side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.forward_selection import ForwardAttention

LEARNING_RATE = 1e-2
# logits must part within one phase, weights need not; wide tables have a range instead
LOGIT_LEARNING_RATE = 5e-2
# In wide tables: about as far as the logit with the largest gradient moves in a phase.
LOGIT_RANGE = 10.0
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
# With two the hidden layer of 67, dealt out to 32, would have next to nothing to combine.
MIN_UNITS_PER_NETWORK = 4
# More candidates than this per row, and chance alone makes some of them fit: the table is wide.
# Then so many per row compete.
CANDIDATES_PER_ROW, COMPETING_PER_ROW = 8, 2
# Of steps and networks, where a phase has several picks.
MAX_EFFORT = 4


@dataclass(frozen=True)
class Effort:
    """What a fit spends on a table.

    Attributes:
        picks: Picks that share a phase.
        steps: A phase is so many times as long as one of a single pick in a table with more rows.
        networks: How many share the gates.
    """

    picks: int
    steps: int
    networks: int


def effort_for(num_candidates: int, num_rows: int) -> Effort:
    """One pick a phase, and a network from 512 rows on, two at 256, eight up to 64.

    A small table is fitted at once from many sets of columns, so a single network's logits depend
    on its start; the mean gradient over several starts (and bootstrap samples) does so less.

    With more than 8 candidates per row there is a pick a phase for every 2 of them per row: for
    thousands of columns in tens of rows all picks in one phase. The rows are fitted after a few
    picks, and what is left for the next to explain is noise; copies of a good column are then
    the better choice, since each averages the noise of the others. What is saved in phases goes
    into steps and networks, up to four times as many.
    """
    picks = 1
    if num_candidates > CANDIDATES_PER_ROW * num_rows:
        picks = math.ceil(num_candidates / (COMPETING_PER_ROW * num_rows))
    more = min(MAX_EFFORT, picks)
    networks = min(MAX_NETWORKS * more, max(1, ROWS_PER_NETWORK * more // num_rows))
    return Effort(picks, more, networks)


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

    @staticmethod
    def of(inputs: Tensor, targets: Tensor, groups: Sequence[Tensor]) -> Table:
        """The table of these groups' columns; what is in no group is left out."""
        sizes = torch.tensor([len(group) for group in groups])
        owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)
        return Table(inputs[:, torch.cat(list(groups))], targets, owner)

    @property
    def num_outputs(self) -> int:
        """Classes, or 1 for a real target."""
        return 1 if self.targets.is_floating_point() else int(self.targets.max()) + 1


def screen(table: Table, costs: Tensor, budget: float, num_kept: int) -> Tensor:
    """Candidates that may compete, ascending: all, unless there are more than 8 per row.

    Then the 2 per row (twice `num_kept`, if that is more) with the largest linear effect per cost
    that the budget can pay for: squared norm of their columns' products with the targets (sure
    independence screening, Fan and Lv 2008, arXiv math/0612857).
    """
    num_rows = len(table.inputs)
    num_left = max(COMPETING_PER_ROW * num_rows, 2 * num_kept)
    if len(costs) <= max(CANDIDATES_PER_ROW * num_rows, num_left):
        return torch.arange(len(costs))
    targets = table.targets[:, None]
    if not targets.is_floating_point():
        targets = functional.one_hot(table.targets).float()
    products = table.inputs.T @ (targets - targets.mean(0))
    effects = torch.zeros(len(costs)).index_add(0, table.owner, products.square().sum(1))
    effects = (effects / costs).masked_fill(costs > budget, -1.0)
    return effects.sort(descending=True, stable=True).indices[:num_left].sort().values


class SharedScaleAdam:
    """Adam for one tensor whose entries share a second moment: that of the largest gradient.

    With one each, as in Adam, every entry moves as far as its gradient is consistent, however
    small; one that helps a little, always, then overtakes one that helps a lot. Here the steps keep
    the gradients' proportions, as in gradient descent, and are as free of scale as Adam's. That is
    for phases of several picks, all from one ranking; with one pick a phase Adam was better.
    """

    def __init__(self, values: Tensor, rate: float) -> None:
        """For `values`, whose entry of the largest gradient moves about `rate` in a step."""
        self.values, self.rate = values, rate
        self.num_steps, self.square = 0, 0.0
        self.mean = torch.zeros_like(values)

    @torch.no_grad()
    def step(self) -> None:
        """Move by the gradient that is there, and drop it."""
        gradient = self.values.grad
        assert gradient is not None
        self.num_steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square += (1 - 0.99) * (float(gradient.abs().max()) ** 2 - self.square)
        scale = math.sqrt(self.square / (1 - 0.99**self.num_steps))
        # a table of constants has no gradient
        if scale > 0:
            self.values.sub_(self.mean, alpha=self.rate / (1 - 0.9**self.num_steps) / scale)
        self.values.grad = None


class GatedNetworks:
    """Networks of one hidden layer behind the same gates, and the steps that train them."""

    def __init__(
        self,
        table: Table,
        engine: ForwardAttention,
        *,
        effort: Effort,
        hidden_size: int,
        generator: torch.Generator,
    ) -> None:
        """Random weights; nothing is trained.

        Args:
            table: The rows.
            engine: Holds the logits and makes the picks, one unit per candidate.
            effort: How many networks, and whether the table is wide.
            hidden_size: ReLU units of all networks together, dealt out evenly; 4 each where that
                would be fewer.
            generator: Of the weights and the batches.
        """
        self.table, self.engine, self.generator = table, engine, generator
        self.num_networks = effort.networks
        # by softmax gates; linear ones were tried with Adam alone
        self.shares_scale = effort.picks > 1 and engine.gate == "softmax"
        num_columns = table.inputs.shape[1]

        def normal(*shape: int, fan_in: int) -> Tensor:
            draw = torch.randn(*shape, generator=generator)
            return (draw / math.sqrt(fan_in)).requires_grad_()

        hidden_size = min(hidden_size, max(MIN_UNITS_PER_NETWORK, hidden_size // effort.networks))
        size = self.num_networks * hidden_size
        self.reader = normal(num_columns, size, fan_in=num_columns)
        self.writer = normal(self.num_networks, hidden_size, table.num_outputs, fan_in=hidden_size)
        self.biases = [
            torch.zeros(size, requires_grad=True),
            torch.zeros(self.num_networks, table.num_outputs, requires_grad=True),
        ]
        # linear gates pay a penalty instead, on the unselected alone: with decay on top, what is
        # selected stays too small, and a copy of it still seems of use
        decay = 0.0 if engine.gate == "linear" else WEIGHT_DECAY
        parameters: list[dict[str, Any]] = [
            {"params": [self.reader], "weight_decay": decay},
            {"params": [self.writer], "weight_decay": WEIGHT_DECAY},
            {"params": self.biases},
        ]
        if not self.shares_scale:
            parameters.append({"params": [engine.logits], "lr": LOGIT_LEARNING_RATE})
        self.optimizer = torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def draw(self) -> tuple[Tensor, Tensor]:
        """Rows of a step, int64, and how often each network has each, shape (rows, networks).

        Drawn with replacement even where all rows would fit: Adam divides by the size of what it
        gets, so that without noise between steps every logit would move as fast as every other;
        with it, they move by how consistent their gradients are.
        """
        num_rows = len(self.table.inputs)
        size = (min(num_rows, BATCH_SIZE), self.num_networks)
        drawn = torch.randint(num_rows, size, generator=self.generator)
        if num_rows > BATCH_SIZE:
            return drawn[:, 0], torch.ones(size)
        return torch.arange(num_rows), torch.zeros(size).scatter_add(0, drawn, torch.ones(size))

    def loss(self, reader: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        """Sum over the networks of their mean loss on rows as `draw` gives them; a scalar."""
        hidden = torch.relu(self.table.inputs[rows] @ reader + self.biases[0])
        hidden = hidden.unflatten(1, (self.num_networks, -1))
        outputs = torch.einsum("rnh,nho->rno", hidden, self.writer) + self.biases[1]
        targets = self.table.targets[rows][:, None].expand(-1, self.num_networks)
        if targets.is_floating_point():
            each = (outputs[..., 0] - targets).square()
        else:
            each = functional.cross_entropy(outputs.mT, targets, reduction="none")
        return (each * counts).mean(0).sum()

    def begin_phase(self, num_steps: int) -> None:
        """Logits have begun anew: so does what their optimizer knows of them."""
        self.optimizer.state.pop(self.engine.logits, None)
        self.logit_optimizer = SharedScaleAdam(self.engine.logits, LOGIT_RANGE / num_steps)

    def step(self, gates: Tensor | None, strength: float) -> None:
        """One step on weights and logits; `gates` None leaves all open."""
        self.optimizer.zero_grad()
        reader = self.reader
        if gates is not None:
            reader = reader * gates[self.table.owner, None]
        loss = self.loss(reader, *self.draw())
        if strength:
            loss = loss + self.engine.penalty(self.squares(self.reader), strength)
        loss.backward()
        self.optimizer.step()
        if gates is not None and self.shares_scale:
            self.logit_optimizer.step()

    def squares(self, values: Tensor) -> Tensor:
        """Squared norm of every candidate's part of `values`, shaped as the reading weights."""
        sums = torch.zeros(self.engine.num_units)
        return sums.index_add(0, self.table.owner, values.square().sum(1))

    def threshold(self) -> float:
        """The penalty from which on linear gates give the unselected nothing, at these weights.

        The largest gradient norm, per square root of cost, among the unselected candidates, of the
        weights that read them (their products with the gates at 0).
        """
        selected = self.engine.selected[self.table.owner, None]
        reader = (self.reader.detach() * selected).requires_grad_()
        every = torch.arange(len(self.table.inputs))
        loss = self.loss(reader, every, torch.ones(len(every), self.num_networks))
        (gradient,) = torch.autograd.grad(loss, reader)
        pulls = self.squares(gradient).sqrt() / self.engine.costs.sqrt()
        return float(pulls[~self.engine.selected].max())


def train_selection(
    table: Table,
    engine: ForwardAttention,
    *,
    effort: Effort,
    hidden_size: int,
    num_steps: int,
    generator: torch.Generator,
) -> None:
    """Warm up, then train and pick until the engine is done; `engine.order` has the picks.

    Args:
        table: The rows.
        engine: Nothing selected yet.
        effort: As `effort_for` has it for the whole table, before `screen`.
        hidden_size: ReLU units of all networks together.
        num_steps: Optimizer steps of a phase, before `effort` makes them more.
        generator: Of the weights and the batches.
    """
    num_steps *= effort.steps
    networks = GatedNetworks(
        table, engine, effort=effort, hidden_size=hidden_size, generator=generator
    )
    for _ in range(round(WARM_UP_SHARE * num_steps * engine.num_phases)):
        networks.step(None, 0.0)
    while not engine.is_done:
        linear = engine.gate == "linear"
        strength = PENALTY_SHARE * networks.threshold() if linear else 0.0
        networks.begin_phase(num_steps)
        for _ in range(num_steps):
            networks.step(engine.gates(), strength)
        engine.select()
