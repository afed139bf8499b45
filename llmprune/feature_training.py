"""One-pass training of small networks whose input gates choose the columns of a table.

The paper's feature selection (Yasuda et al. 2023, arXiv 2209.14881): a warm-up with every gate
open, then one phase per pick, each trained before its pick is made; weights are carried over from
phase to phase and only the logits begin anew. Networks have one hidden layer. They share the gates,
or, in wide tables, have gates and a bootstrap sample of the rows each, and vote. Torch alone:
`llmprune.features` has the scikit-learn side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.feature_table import Table
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


def networks_for(num_rows: int) -> int:
    """How many networks share the gates: one from 512 rows on, two at 256, eight up to 64.

    A small table is fitted at once from many sets of columns, so a single network's logits depend
    on its start; the mean gradient over several starts (and bootstrap samples) does so less.
    """
    return min(MAX_NETWORKS, max(1, ROWS_PER_NETWORK // num_rows))


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
        engines: Sequence[ForwardAttention],
        *,
        hidden_size: int,
        generator: torch.Generator,
    ) -> None:
        """Random weights; nothing is trained.

        Args:
            table: The rows.
            engines: Hold the logits and make the picks, one unit per candidate: a single one that
                all networks share; or several, whose logits start from a prior, with a network and
                a bootstrap sample for each.
            hidden_size: ReLU units of all networks together, dealt out evenly.
            generator: Of the weights, the samples and the batches.
        """
        self.table, self.engines, self.generator = table, engines, generator
        self.have_own_gates = len(engines) > 1
        num_rows, num_columns = table.inputs.shape
        self.num_networks = len(engines) if self.have_own_gates else networks_for(num_rows)
        if self.have_own_gates:
            drawn = (num_rows, self.num_networks)
            self.samples = torch.randint(num_rows, drawn, generator=generator)

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
        decay = 0.0 if engines[0].gate == "linear" else WEIGHT_DECAY
        parameters: list[dict[str, Any]] = [
            {"params": [self.reader], "weight_decay": decay},
            {"params": [self.writer], "weight_decay": WEIGHT_DECAY},
            {"params": self.biases},
        ]
        if not self.have_own_gates:
            parameters.append({"params": [engines[0].logits], "lr": LOGIT_LEARNING_RATE})
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
        if self.have_own_gates:
            drawn = self.samples.gather(0, drawn)
            rows, places = drawn.unique(return_inverse=True)
            counts = torch.zeros(len(rows), self.num_networks)
            # the loss is a mean over rows
            return rows, counts.scatter_add(0, places, torch.full(size, len(rows) / size[0]))
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
        rate = LOGIT_RANGE / num_steps
        self.logit_optimizers = [SharedScaleAdam(engine.logits, rate) for engine in self.engines]
        self.optimizer.state.pop(self.engines[0].logits, None)

    def step(self, strength: float | None) -> None:
        """One step on weights and logits.

        Args:
            strength: Of the penalty of linear gates, 0 for none; None leaves all gates open.
        """
        self.optimizer.zero_grad()
        reader = self.reader
        if strength is not None:
            gates = torch.stack([engine.gates() for engine in self.engines], 1)[self.table.owner]
            reader = (reader.unflatten(1, (len(self.engines), -1)) * gates[..., None]).flatten(1)
        loss = self.loss(reader, *self.draw())
        if self.have_own_gates:
            loss = loss + GATED_DECAY / 2 * reader.square().sum()
        if strength:
            loss = loss + self.engines[0].penalty(self.squares(self.reader), strength)
        loss.backward()
        self.optimizer.step()
        if strength is not None and self.have_own_gates:
            for optimizer in self.logit_optimizers:
                optimizer.step()

    def squares(self, values: Tensor) -> Tensor:
        """Squared norm of every candidate's part of `values`, shaped as the reading weights."""
        sums = torch.zeros(self.engines[0].num_units)
        return sums.index_add(0, self.table.owner, values.square().sum(1))

    def threshold(self) -> float:
        """The penalty from which on linear gates give the unselected nothing, at these weights.

        The largest gradient norm, per square root of cost, among the unselected candidates, of the
        weights that read them (their products with the gates at 0).
        """
        engine = self.engines[0]
        selected = engine.selected[self.table.owner, None]
        reader = (self.reader.detach() * selected).requires_grad_()
        every = torch.arange(len(self.table.inputs))
        loss = self.loss(reader, every, torch.ones(len(every), self.num_networks))
        (gradient,) = torch.autograd.grad(loss, reader)
        pulls = self.squares(gradient).sqrt() / engine.costs.sqrt()
        return float(pulls[~engine.selected].max())


def train_selection(
    table: Table,
    engines: Sequence[ForwardAttention],
    *,
    hidden_size: int,
    num_steps: int,
    generator: torch.Generator,
) -> None:
    """Warm up, then train and pick until every engine is done; `order` of each has its picks.

    Args:
        table: The rows.
        engines: Nothing selected yet; one for all networks, or one for each.
        hidden_size: ReLU units of all networks together.
        num_steps: Optimizer steps of a phase; with several engines a fifth of them are done.
        generator: Of the weights, the samples and the batches.
    """
    networks = GatedNetworks(table, engines, hidden_size=hidden_size, generator=generator)
    if networks.have_own_gates:
        num_steps = max(1, num_steps // PHASES_FOR_ONE)
    for _ in range(round(WARM_UP_SHARE * num_steps * engines[0].num_phases)):
        networks.step(None)
    while any(not engine.is_done for engine in engines):
        linear = engines[0].gate == "linear"
        strength = PENALTY_SHARE * networks.threshold() if linear else 0.0
        networks.begin_phase(num_steps)
        for _ in range(num_steps):
            networks.step(strength)
        for engine in engines:
            if not engine.is_done:
                engine.select()


def elect(orders: Sequence[Sequence[int]], prior: Tensor) -> Tensor:
    """A score for each candidate from several selections, shape (candidates,).

    How many of them have it; where these are equal, how early on average; where none has it, the
    prior (logits, at most 0).
    """
    scores = torch.zeros(len(prior))
    for order in orders:
        late = torch.arange(len(order)) / max(1, len(order))
        scores[list(order)] += 1 - late / (len(orders) + 1)
    return torch.where(scores > 0, scores, prior)
