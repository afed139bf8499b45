"""Who takes which share of a budget: least importance lost at a given cost, by integer programming.

Nothing of models is in here. A layer has two branches (attention and MLP), a branch has options
(ways in which it may stay), an option has a loss and a cost, and a branch or a whole layer may be
allowed to go at a loss of its own. The sum of losses is minimised with the sum of costs between two
limits: a multiple-choice knapsack, solved by HiGHS (`scipy.optimize.milp`). Its size is kept
moderate: of long rows of MLP options about `MOST_LEVELS` enter, and what the coarse grid left of
the budget is then filled step by step, best loss per cost first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Floats = NDArray[np.float64]
# Option of the attention and of the MLP; None where it goes. A layer that goes: None.
Choice = tuple[int | None, int | None] | None

# MLP options a layer in the integer program: a step is then about a hundredth of the MLP.
MOST_LEVELS = 96
# Where the search may stop: loss above the proven least, as a share of it.
GAP = 1e-6
# Nodes of the search tree at most (a number, not seconds: the same choice on every machine). Where
# little is lost the last half percent of the gap can take forever; 2,000 nodes took 2 s.
MOST_NODES = 2000
# Largest coefficient of a row: with HiGHS's absolute tolerance of 1e-6 costs are exact to 1e-10.
SCALE = 1e4


@dataclass(frozen=True)
class Branch:
    """The ways in which a sublayer may stay.

    Attributes:
        losses: Importance lost with each option, float64, shape (n,).
        costs: Its cost, float64, shape (n,).
        gone: Importance lost where the sublayer goes and its layer stays; None: it may not.
    """

    losses: Floats
    costs: Floats
    gone: float | None = None


@dataclass(frozen=True)
class LayerOptions:
    """The options of one layer; those of the MLP ascend in size.

    Attributes:
        attention: Its attention.
        mlp: Its MLP.
        gone: Importance lost where the layer goes, instead of that of what it holds; None: it
            may not.
    """

    attention: Branch
    mlp: Branch
    gone: float | None = None

    @property
    def branches(self) -> tuple[Branch, Branch]:
        """Attention, MLP."""
        return self.attention, self.mlp


@dataclass(frozen=True)
class Stay:
    """How many of the layers, attentions or MLPs may stay.

    Attributes:
        counts: The numbers that are allowed.
        most_alone: Sublayers that may go from layers that stay, at most.
    """

    counts: tuple[int, ...]
    most_alone: int = 0


@dataclass(frozen=True)
class Problem:
    """What to choose from, and what the choice is held to.

    Attributes:
        layers: The options of every layer.
        stay: For layers, attentions, MLPs.
        tied: Whether all layers that stay take the same option.
    """

    layers: tuple[LayerOptions, ...]
    stay: tuple[Stay, Stay, Stay]
    tied: bool

    def loss(self, choices: Sequence[Choice]) -> float:
        """Importance lost in all."""
        return math.fsum(_terms(self.layers, choices, of="losses"))

    def cost(self, choices: Sequence[Choice]) -> float:
        """Cost of what stays."""
        return math.fsum(_terms(self.layers, choices, of="costs"))


def _terms(layers: Sequence[LayerOptions], choices: Sequence[Choice], *, of: str) -> list[float]:
    found = []
    for layer, choice in zip(layers, choices, strict=True):
        if choice is None:
            found.append((layer.gone or 0.0) if of == "losses" else 0.0)
            continue
        for branch, option in zip(layer.branches, choice, strict=True):
            if option is not None:
                found.append(float(getattr(branch, of)[option]))
            elif of == "losses":
                found.append(branch.gone or 0.0)
    return found


def allocate(problem: Problem, wanted: float, tolerance: float) -> list[Choice] | None:
    """The choice that loses the least importance for a cost of `wanted`.

    The cost is at most `wanted` and at least `tolerance` below it; where no choice is, it may be
    `tolerance` above. None where no choice is in that range, either.
    """
    coarse, levels = _thinned(problem)
    # a coarse step of room may be left, which is then filled
    step = max((_largest_step(layer.mlp) for layer in coarse.layers), default=0.0)
    step *= len(problem.layers) if problem.tied else 1
    slack = step if levels is not None else 0.0
    for highest in (wanted, wanted + tolerance):
        found = _solve(coarse, lowest=wanted - tolerance - slack, highest=highest)
        if found is None:
            continue
        filled = _filled(problem, _fine(found, levels), highest)
        if problem.cost(filled) >= wanted - tolerance - SCALE**-2 * abs(wanted):
            return filled
    return None


def nearest_cost(problem: Problem, wanted: float) -> float | None:
    """The reachable cost that is nearest to `wanted`; None where nothing is allowed at all."""
    coarse, levels = _thinned(problem)
    reached = []
    below = _solve(coarse, lowest=-math.inf, highest=wanted, minimise="-cost")
    if below is not None:
        reached.append(problem.cost(_filled(problem, _fine(below, levels), wanted)))
    above = _solve(coarse, lowest=wanted, highest=math.inf, minimise="cost")
    if above is not None:
        reached.append(problem.cost(_fine(above, levels)))
    return min(reached, key=lambda cost: abs(cost - wanted), default=None)


def _thinned(problem: Problem) -> tuple[Problem, NDArray[np.int64] | None]:
    """The problem with fewer MLP options, and which they are; None where all of them are."""
    longest = max(len(layer.mlp.costs) for layer in problem.layers)
    if longest <= MOST_LEVELS:
        return problem, None
    # differing layers have one option each (the kind is not pruned) or equally many
    levels = np.unique(np.linspace(0, longest - 1, MOST_LEVELS).round().astype(np.int64))
    layers = []
    for layer in problem.layers:
        mlp = replace(layer.mlp, losses=layer.mlp.losses[levels], costs=layer.mlp.costs[levels])
        layers.append(replace(layer, mlp=mlp))
    return replace(problem, layers=tuple(layers)), levels


def _fine(choices: list[Choice], levels: NDArray[np.int64] | None) -> list[Choice]:
    """Choices among thinned options as choices among all."""
    if levels is None:
        return choices
    fine: list[Choice] = []
    for choice in choices:
        if choice is None or choice[1] is None:
            fine.append(choice)
        else:
            fine.append((choice[0], int(levels[choice[1]])))
    return fine


def _largest_step(branch: Branch) -> float:
    return float(np.diff(branch.costs).max(initial=0.0))


def _filled(problem: Problem, choices: list[Choice], highest: float) -> list[Choice]:
    """Let MLPs grow an option at a time while it fits, best loss per cost first."""
    having = [i for i, choice in enumerate(choices) if choice is not None and choice[1] is not None]
    movers = [having] if problem.tied else [[index] for index in having]
    chosen = list(choices)
    room = highest - problem.cost(choices)
    heap: list[tuple[float, int]] = []

    def step_of(mover: int) -> tuple[float, float] | None:
        """Loss spared and cost added by the next step of a mover."""
        spared = added = 0.0
        for index in movers[mover]:
            choice, branch = chosen[index], problem.layers[index].mlp
            assert choice is not None
            assert choice[1] is not None
            if choice[1] + 1 == len(branch.costs):
                return None
            spared += float(branch.losses[choice[1]] - branch.losses[choice[1] + 1])
            added += float(branch.costs[choice[1] + 1] - branch.costs[choice[1]])
        return spared, added

    def offer(mover: int) -> None:
        step = step_of(mover) if movers[mover] else None
        if step is not None and step[1] <= room:
            heapq.heappush(heap, (-step[0] / max(step[1], math.ulp(1.0)), mover))

    for mover in range(len(movers)):
        offer(mover)
    while heap:
        _, mover = heapq.heappop(heap)
        step = step_of(mover)
        assert step is not None
        if step[1] > room:
            continue
        room -= step[1]
        for index in movers[mover]:
            choice = chosen[index]
            assert choice is not None
            assert choice[1] is not None
            chosen[index] = (choice[0], choice[1] + 1)
        offer(mover)
    return chosen


class _Program:
    """Columns (binaries with loss and cost) and rows (bounded sums of columns)."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.costs: list[float] = []
        self.whole: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.bounds: list[tuple[float, float]] = []

    def add(self, losses: Sequence[float], costs: Sequence[float], *, whole: bool) -> range:
        """New columns in [0, 1]; `whole`: 0 or 1."""
        first = len(self.losses)
        self.losses += losses
        self.costs += costs
        self.whole += [int(whole)] * len(losses)
        return range(first, len(self.losses))

    def hold(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """A new row: low <= sum of value times column <= high."""
        row = len(self.bounds)
        for column, value in terms:
            self.rows.append(row)
            self.columns.append(column)
            self.values.append(value)
        self.bounds.append((low, high))

    def solve(self, objective: Sequence[float]) -> NDArray[np.int64] | None:
        """The columns that are 1, or None where nothing fits."""
        shape = (len(self.bounds), len(self.losses))
        matrix = coo_array((self.values, (self.rows, self.columns)), shape=shape).tocsc()
        low, high = np.array(self.bounds).T
        result = milp(
            np.array(objective),
            integrality=np.array(self.whole),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": GAP, "node_limit": MOST_NODES},
        )
        # at the node limit the best choice so far; HiGHS finds one before it branches
        return None if result.x is None else np.flatnonzero(result.x > 0.5)


def _solve(
    problem: Problem, *, lowest: float, highest: float, minimise: str = "loss"
) -> list[Choice] | None:
    program = _Program()
    layer_goes: list[list[int]] = []
    goes: tuple[list[int], list[int]] = ([], [])
    options: list[tuple[range, range]] = []
    for layer in problem.layers:
        layer_goes.append(_leaving(program, layer.gone))
        own = []
        for branch, alone in zip(layer.branches, goes, strict=True):
            leaves = _leaving(program, branch.gone)
            alone += leaves
            # tied options follow from the shared ones, which are whole
            stays = program.add(
                branch.losses.tolist(), branch.costs.tolist(), whole=not problem.tied
            )
            program.hold([(c, 1.0) for c in (*layer_goes[-1], *leaves, *stays)], 1, 1)
            own.append(stays)
        options.append((own[0], own[1]))
    if problem.tied:
        _tie(program, options)
    going = [column for columns in layer_goes for column in columns]
    for stay, alone in zip(problem.stay, ([], *goes), strict=True):
        _hold_counts(program, stay, [*going, *alone], alone, len(problem.layers))
    # as much as nothing where no option costs anything
    scale = SCALE / max(max(program.costs), math.ulp(0.0) * SCALE * 2)
    paid = [(column, cost * scale) for column, cost in enumerate(program.costs) if cost]
    program.hold(paid, lowest * scale, highest * scale)
    found = program.solve(_objective(program, minimise))
    if found is None:
        return None
    taken = set(found.tolist())
    return [
        None if taken.intersection(gone) else (_taken(own[0], taken), _taken(own[1], taken))
        for gone, own in zip(layer_goes, options, strict=True)
    ]


def _leaving(program: _Program, loss: float | None) -> list[int]:
    """A column for something that may go; none where it may not."""
    return [] if loss is None else list(program.add([loss], [0.0], whole=True))


def _tie(program: _Program, options: list[tuple[range, range]]) -> None:
    """An option is open to a layer only where it is the one that all layers take."""
    for branch in (0, 1):
        size = len(options[0][branch])
        shared = program.add([0.0] * size, [0.0] * size, whole=True)
        program.hold([(column, 1.0) for column in shared], 1, 1)
        for own in options:
            for mine, all_take in zip(own[branch], shared, strict=True):
                program.hold([(mine, 1.0), (all_take, -1.0)], -1, 0)


def _hold_counts(
    program: _Program, stay: Stay, going: Sequence[int], alone: Sequence[int], count: int
) -> None:
    """The number that stays (`count` less those going) is one of `stay.counts`."""
    size = len(stay.counts)
    chosen = program.add([0.0] * size, [0.0] * size, whole=True)
    program.hold([(column, 1.0) for column in chosen], 1, 1)
    numbers = [(column, float(n)) for column, n in zip(chosen, stay.counts, strict=True)]
    program.hold([*numbers, *((column, 1.0) for column in going)], count, count)
    if alone:
        program.hold([(column, 1.0) for column in alone], 0, stay.most_alone)


def _objective(program: _Program, minimise: str) -> list[float]:
    if minimise == "loss":
        largest = max(program.losses, default=0.0)
        return [loss * SCALE / largest if largest else 0.0 for loss in program.losses]
    sign = 1.0 if minimise == "cost" else -1.0
    largest = max(max(program.costs, default=0.0), 1e-300)
    return [sign * cost * SCALE / largest for cost in program.costs]


def _taken(columns: range, taken: set[int]) -> int | None:
    """Which of a branch's options is taken."""
    return next((column - columns.start for column in columns if column in taken), None)
