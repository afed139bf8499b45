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
# In wide tables: about as far as the logit with the largest gradient moves in a phase. The best
# and the last of those that compete there start about 1 apart; at 10 the start counts for nothing.
LOGIT_RANGE = 1.0
# In wide tables a phase is so many times shorter: training corrects the prior, and longer phases
# (50 steps for 10) choose no better.
PHASES_FOR_ONE = 5
# In wide tables: of the squared weights that are behind gates, half of it added to the loss. A few
# columns fit every row of such a table, and then nothing is left for the next to explain.
GATED_DECAY = 0.05
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
# More candidates than this per row, and chance alone makes some of them fit: the table is wide.
# Then so many per row compete.
CANDIDATES_PER_ROW, COMPETING_PER_ROW = 8, 2
# Of the ridge on a column's weight where it is fitted alone: a standard normal prior.
LONE_RIDGE, NEWTON_STEPS, LARGEST_STEP = 1.0, 8, 2.0
# A column that explains nothing starts so far below one that explains all, not infinitely far.
LEAST_SHARE = 1e-4


def networks_for(num_rows: int) -> int:
    """How many networks share the gates: one from 512 rows on, two at 256, eight up to 64.

    A small table is fitted at once from many sets of columns, so a single network's logits depend
    on its start; the mean gradient over several starts (and bootstrap samples) does so less.
    """
    return min(MAX_NETWORKS, max(1, ROWS_PER_NETWORK // num_rows))


def is_wide(num_candidates: int, num_rows: int) -> bool:
    """Whether there are more than 8 candidates per row, so that some fit by chance."""
    return num_candidates > CANDIDATES_PER_ROW * num_rows


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

    @property
    def indicators(self) -> Tensor:
        """The targets as columns, float32: real ones as they are, 0 and 1 for each class."""
        if self.targets.is_floating_point():
            return self.targets[:, None]
        return functional.one_hot(self.targets).float()


def screen(table: Table, costs: Tensor, budget: float, num_kept: int) -> Tensor:
    """Candidates that may compete, ascending: all, unless there are more than 8 per row.

    Then the 2 per row (twice `num_kept`, if that is more) with the largest linear effect per cost
    that the budget can pay for: squared norm of their columns' products with the targets (sure
    independence screening, Fan and Lv 2008, arXiv math/0612857).
    """
    num_rows = len(table.inputs)
    num_left = max(COMPETING_PER_ROW * num_rows, 2 * num_kept)
    if not is_wide(len(costs), num_rows) or len(costs) <= num_left:
        return torch.arange(len(costs))
    targets = table.indicators
    products = table.inputs.T @ (targets - targets.mean(0))
    effects = torch.zeros(len(costs)).index_add(0, table.owner, products.square().sum(1))
    effects = (effects / costs).masked_fill(costs > budget, -1.0)
    return effects.sort(descending=True, stable=True).indices[:num_left].sort().values


def explained_alone(table: Table) -> Tensor:
    """How much of the targets each column explains by itself, between 0 and 1, shape (columns,).

    Real targets: the squared correlation. Classes: Cox and Snell's equivalent of it,
    1 - exp(-2 gain), with the gain in mean log-likelihood of a logistic regression of each class
    against the others, averaged over the classes. Unlike the linear effect, it does not take it as
    noise that one class has its values far out, and apart from each other.
    """
    inputs, targets = table.inputs, table.indicators
    if table.targets.is_floating_point():
        moments = inputs.square().sum(0) * (targets - targets.mean()).square().sum()
        products = (inputs.T @ (targets - targets.mean()))[:, 0]
        return products.square() / moments.clamp_min(torch.finfo(torch.float32).tiny)
    shares = torch.stack([logistic_gain(inputs, target) for target in targets.T])
    return (1 - (-2 * shares).exp()).mean(0)


def logistic_gain(inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean log-likelihood that each column gains over none, in nats, shape (columns,).

    Newton's steps on weight and offset of every column at once, with a standard normal prior on
    the weight, so that a column which separates the rows has a finite one.

    Args:
        inputs: Standardised columns, shape (rows, columns).
        targets: 0 or 1, float, shape (rows,).
    """
    # of a single class nothing is to be explained, and no offset is finite
    share = targets.mean().clamp(0.5 / len(targets), 1 - 0.5 / len(targets))
    weights = torch.zeros(inputs.shape[1])
    offsets = torch.full_like(weights, float(torch.logit(share)))
    for _ in range(NEWTON_STEPS):
        guesses = torch.sigmoid(inputs * weights + offsets)
        errors = targets[:, None] - guesses
        # where all guesses are certain there is no curvature left
        curvature = guesses * (1 - guesses) + 1e-6
        pull = (errors * inputs).sum(0) - LONE_RIDGE * weights
        plain, mixed = curvature.sum(0), (curvature * inputs).sum(0)
        steep = (curvature * inputs.square()).sum(0) + LONE_RIDGE
        area = plain * steep - mixed.square()
        # far from the optimum a full step can overshoot
        shift = (steep * errors.sum(0) - mixed * pull) / area
        turn = (plain * pull - mixed * errors.sum(0)) / area
        offsets = offsets + shift.clamp(-LARGEST_STEP, LARGEST_STEP)
        weights = weights + turn.clamp(-LARGEST_STEP, LARGEST_STEP)
    margins = inputs * weights + offsets
    likelihood = (targets[:, None] * margins - functional.softplus(margins)).mean(0)
    alone = share * share.log() + (1 - share) * (1 - share).log()
    gain = likelihood - LONE_RIDGE / 2 * weights.square() / len(inputs) - alone
    return gain.clamp_min(0)


def prior_logits(table: Table, costs: Tensor) -> Tensor:
    """Where logits start in a wide table: log of what a candidate explains alone, per cost.

    Largest 0, shape (candidates,). On tens of rows the network's own evidence is weak, and it moves
    the logits by about 1 only; in tables with more rows it has to find everything by itself.
    """
    shares = torch.zeros(len(costs)).index_add(0, table.owner, explained_alone(table))
    values = (shares.clamp_min(LEAST_SHARE) / costs).log().float()
    return values - values.max()


class SharedScaleAdam:
    """Adam for one tensor whose entries share a second moment: that of the largest gradient.

    With one each, as in Adam, every entry moves as far as its gradient is consistent, however
    small; one that helps a little, always, then overtakes one that helps a lot. Here the steps keep
    the gradients' proportions, as in gradient descent, and are as free of scale as Adam's. That is
    for wide tables, where logits start from a prior that must not be drowned.
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
        wide: bool,
        hidden_size: int,
        generator: torch.Generator,
    ) -> None:
        """Random weights; nothing is trained.

        Args:
            table: The rows.
            engine: Holds the logits and makes the picks, one unit per candidate.
            wide: Whether the table was, before `screen`.
            hidden_size: ReLU units of all networks together, dealt out evenly.
            generator: Of the weights and the batches.
        """
        self.table, self.engine, self.generator = table, engine, generator
        self.num_networks = networks_for(len(table.inputs))
        # by softmax gates; linear ones have a penalty of their own
        self.from_prior = wide and engine.gate == "softmax"
        num_columns = table.inputs.shape[1]

        def normal(*shape: int, fan_in: int) -> Tensor:
            draw = torch.randn(*shape, generator=generator)
            return (draw / math.sqrt(fan_in)).requires_grad_()

        hidden_size = max(1, hidden_size // self.num_networks)
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
        if not self.from_prior:
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
        if self.from_prior:
            loss = loss + GATED_DECAY / 2 * reader.square().sum()
        if strength:
            loss = loss + self.engine.penalty(self.squares(self.reader), strength)
        loss.backward()
        self.optimizer.step()
        if gates is not None and self.from_prior:
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
    wide: bool,
    hidden_size: int,
    num_steps: int,
    generator: torch.Generator,
) -> None:
    """Warm up, then train and pick until the engine is done; `engine.order` has the picks.

    Args:
        table: The rows.
        engine: Nothing selected yet.
        wide: Whether the whole table was (`is_wide`), before `screen`.
        hidden_size: ReLU units of all networks together.
        num_steps: Optimizer steps of a phase; from a prior, a fifth of them are done.
        generator: Of the weights and the batches.
    """
    networks = GatedNetworks(table, engine, wide=wide, hidden_size=hidden_size, generator=generator)
    if networks.from_prior:
        num_steps = max(1, num_steps // PHASES_FOR_ONE)
    for _ in range(round(WARM_UP_SHARE * num_steps * engine.num_phases)):
        networks.step(None, 0.0)
    while not engine.is_done:
        linear = engine.gate == "linear"
        strength = PENALTY_SHARE * networks.threshold() if linear else 0.0
        networks.begin_phase(num_steps)
        for _ in range(num_steps):
            networks.step(engine.gates(), strength)
        engine.select()
