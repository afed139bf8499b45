"""Scores that need no gate training: priors of the gates, and baselines to beat.

Every score is an importance: one number per unit, not negative, higher stays, comparable inside a
unit group and across the groups of one kind; how far across kinds, each function says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llmprune.compensation import BRANCHES, Place, UnitMeans, write_of
from llmprune.gates import attach_gates
from llmprune.matching import backward_matching
from llmprune.recipe import UnitKind
from llmprune.statistics import ActivationStatistics
from llmprune.units import UnitGroup, UnitMap, query_heads_per_group, unit_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Scores that come from one forward pass over the rows.
Metric = Literal["activation", "wanda", "flap", "block_influence", "omp"]
# Whose labels the gradients of gates come from: the text's, or drawn from the model itself.
Labels = Literal["text", "model"]
# Per kind of whole sublayers, the branches that go.
PARTS: Mapping[UnitKind, tuple[str, ...]] = {
    "attention_sublayers": ("attention",),
    "mlp_sublayers": ("mlp",),
    "layers": ("attention", "mlp"),
}
# Share of a sublayer's units that the matching removes before it ranks the rest anew.
STEP_SHARE = 1 / 64


def random_scores(unit_map: UnitMap, kinds: Collection[UnitKind], seed: int) -> dict[str, Tensor]:
    """Uniform in [0, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.rand(group.num_units, generator=generator, dtype=torch.float64)
        for group in unit_map.groups.values()
        if group.kind in kinds
    }


def magnitude_scores(
    model: PreTrainedModel, unit_map: UnitMap, kinds: Collection[UnitKind]
) -> dict[str, Tensor]:
    """Root of the summed squares of every weight that goes with a unit, float64."""
    parameters = dict(model.named_parameters())

    def square(name: str) -> Tensor:
        # where the weights are: they are many, the sums few
        return parameters[name].detach().double().square()

    scores = {}
    for group in unit_map.groups.values():
        if group.kind not in kinds:
            continue
        total = torch.zeros(group.num_units, dtype=torch.float64)
        for unit, names in enumerate(group.whole):
            total[unit] = sum(float(square(name).sum()) for name in names)
        for piece in group.slices:
            values = square(piece.parameter)
            others = [dim for dim in range(values.dim()) if dim != piece.dim]
            line = (values.sum(others) if others else values).cpu()
            end = piece.offset + group.num_units * piece.width
            total += line[piece.offset : end].reshape(group.num_units, piece.width).sum(1)
        scores[group.name] = total.sqrt()
    return scores


def taylor_scores(
    model: PreTrainedModel,
    unit_map: UnitMap,
    rows: Iterable[Tensor],
    kinds: Collection[UnitKind],
    *,
    order: Literal[1, 2] = 1,
    labels: Labels = "text",
    means: UnitMeans | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What the gradients of the gates say a closing gate costs; comparable across all kinds.

    The gradient of a gate at 1 is the sum of weight times gradient over what the unit reads.

    * order 1: |sum over rows of dL/dg|, the first-order change of the next-token loss (LLM-Pruner's
      criterion, arXiv 2305.11627, taken per unit).
    * order 2: half the mean over rows of (dL/dg)^2. With `labels="model"` that is, to second order
      and without interactions, the Kullback-Leibler divergence of a row from the dense model's
      prediction that closing the gate causes (the diagonal of the Fisher information); with
      `labels="text"` its usual stand-in (squared Taylor).

    Args:
        model: The dense model.
        unit_map: Its units.
        rows: Token rows, each of shape (1, length) for order 2, or (batch, length), int64.
        kinds: Kinds to score.
        order: See above.
        labels: Whose next tokens the loss asks for.
        means: Mean activations that closed gates leave behind, or None for zeros.
        seed: Of the drawn labels.

    Raises:
        ValueError: Several rows at a time for order 2: their gradients would be summed before they
            are squared.
    """
    gates = attach_gates(model, unit_map, kinds, means)
    sizes = {name: unit_map.groups[name].num_units for name in gates.group_names}
    try:
        return gate_slopes(model, gates, sizes, rows, order=order, labels=labels, seed=seed)
    finally:
        gates.detach()


@contextmanager
def fixed_weights(model: PreTrainedModel) -> Iterator[None]:
    """No weight takes a gradient inside the block."""
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trainable[name])


class SettableGates(Protocol):
    """Gates of any kind: values by group name."""

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take new values."""


def gate_slopes(
    model: PreTrainedModel,
    gates: SettableGates,
    sizes: Mapping[str, int],
    rows: Iterable[Tensor],
    *,
    order: Literal[1, 2],
    labels: Labels,
    seed: int,
) -> dict[str, Tensor]:
    """What the gradients of open gates say, by group, float64; see `taylor_scores`.

    Args:
        model: What the gates are on; its weights stay.
        gates: They are left at 1.
        sizes: Group -> gates in it.
        rows: Token rows.
        order: 1 or 2.
        labels: Whose next tokens the loss asks for.
        seed: Of the drawn labels.
    """
    device = model.device
    values = {n: torch.ones(size, device=device, requires_grad=True) for n, size in sizes.items()}
    gates.set(values)
    generator = torch.Generator(device).manual_seed(seed)
    found = {n: torch.zeros(len(v), dtype=torch.float64) for n, v in values.items()}
    num_rows = 0
    try:
        with fixed_weights(model):
            for row in rows:
                if order == 2 and len(row) != 1:
                    raise ValueError(f"order 2 takes one row at a time, got {len(row)}")
                row = row.to(device)
                logits = model(input_ids=row, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                wanted = row[:, 1:].reshape(-1)
                if labels == "model":
                    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                    wanted = drawn.flatten()
                loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
                slopes = torch.autograd.grad(loss, list(values.values()))
                for name, slope in zip(values, slopes, strict=True):
                    exact = slope.double().cpu()
                    found[name] += exact.square() / 2 if order == 2 else exact
                num_rows += len(row)
    finally:
        gates.set({name: value.detach() for name, value in values.items()})
    return {name: value.abs() / max(1, num_rows) for name, value in found.items()}


def metric_scores(
    metric: Metric,
    model: PreTrainedModel,
    unit_map: UnitMap,
    statistics: ActivationStatistics,
    kinds: Collection[UnitKind],
) -> dict[str, Tensor]:
    """Importance of every unit of the named kinds from one forward pass; float64, not negative.

    Heads, KV groups and MLP channels, per position of what the write projection reads, summed over
    a unit's positions:

    * `activation`, `wanda` - mean square times the squared norm of the weights that read it (Wanda,
      arXiv 2306.11695).
    * `flap` - variance times the same norm, standardised over the positions of its sublayer, mean
      over a unit (FLAP's WIFV and AL-AM, arXiv 2312.11983); what is returned ranks by that across
      the model once it is divided by a unit's parameters, as a budget of parameters does.
    * `block_influence` - the sublayer's (below), shared out among its units by `wanda`.
    * `omp` - the squared error of the sublayer's output that leaving the unit out adds, the weights
      of those that stay refitted (`llmprune.matching`); needs Gram matrices.

    Hidden channels: `wanda` at every norm's output, each site's sum normalised to 1. Sublayers and
    layers: 1 - cosine between the residual stream before and after (block influence, ShortGPT,
    arXiv 2403.03853) for `activation`, `flap` and `block_influence`, else the sum over what is
    inside.
    """
    per_position: dict[tuple[int, str], Tensor] = {
        (layer, branch): _per_position(metric, model, unit_map, statistics, (layer, branch))
        for layer in range(unit_map.num_layers)
        for branch in BRANCHES
    }
    wanted = [group for group in unit_map.groups.values() if group.kind in kinds]
    scores = {}
    for group in wanted:
        if group.kind == "hidden_channels":
            scores[group.name] = _hidden_scores(model, unit_map, statistics)
        elif group.layer is None and metric in ("activation", "flap", "block_influence"):
            scores[group.name] = _influences(unit_map, statistics, group.kind)
        elif group.layer is None:
            scores[group.name] = torch.stack(
                [
                    sum((per_position[layer, part].sum() for part in PARTS[group.kind]), start=ZERO)
                    for layer in range(unit_map.num_layers)
                ]
            )
        elif metric == "omp":
            scores[group.name] = _matching_scores(model, unit_map, statistics, group)
        else:
            scores[group.name] = _of_units(per_position[_place_of(group)], group)
    return _ranked_by_z(scores, unit_map) if metric == "flap" else scores


ZERO = torch.zeros((), dtype=torch.float64)


def _place_of(group: UnitGroup) -> Place:
    assert group.layer is not None, group.name
    return group.layer, "mlp" if group.kind == "mlp_channels" else "attention"


def _of_units(per_position: Tensor, group: UnitGroup) -> Tensor:
    return per_position.reshape(group.num_units, -1).sum(1)


def _per_position(
    metric: Metric,
    model: PreTrainedModel,
    unit_map: UnitMap,
    statistics: ActivationStatistics,
    place: Place,
) -> Tensor:
    """The metric of every position that a write projection reads, shape (in_features,)."""
    write: Any = write_of(model, unit_map, place)
    weight = write.weight.detach().double().cpu()
    # Conv1D stores (inputs, outputs), Linear (outputs, inputs)
    norms = weight.square().sum(0 if isinstance(write, nn.Linear) else 1)
    if metric == "flap":
        values = norms * statistics.variances(place)
        return (values - values.mean()) / values.std().clamp(min=torch.finfo(torch.float64).tiny)
    values = norms * statistics.mean_squares(place)
    if metric == "block_influence":
        layer, branch = place
        influence = _influence(statistics, f"layers.{layer}.{branch}")
        return values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) * influence
    return values


def _ranked_by_z(scores: dict[str, Tensor], unit_map: UnitMap) -> dict[str, Tensor]:
    """FLAP's mean z of every unit, moved above 0 and weighted by the unit's parameters.

    FLAP ranks units by z whatever they cost. Ranked by what is returned per parameter, they come in
    the same order.
    """
    inner = [name for name in scores if unit_map.groups[name].layer is not None]
    means = {n: scores[n] / _positions(unit_map, unit_map.groups[n]) for n in inner}
    least = min((float(value.min()) for value in means.values()), default=0.0)
    return scores | {
        name: (value - least) * unit_parameters(unit_map, unit_map.groups[name])
        for name, value in means.items()
    }


def _positions(unit_map: UnitMap, group: UnitGroup) -> int:
    """How many positions of a write projection's input a unit spans."""
    assert group.layer is not None, group.name
    per_group = query_heads_per_group(unit_map.layer(group.layer))
    head_dim = unit_map.head_dim
    widths = {"heads": head_dim, "kv_groups": per_group * head_dim, "mlp_channels": 1}
    return widths[group.kind]


def _influence(statistics: ActivationStatistics, name: str) -> float:
    return max(0.0, 1 - statistics.similarity[name] / statistics.num_tokens)


def _influences(unit_map: UnitMap, statistics: ActivationStatistics, kind: UnitKind) -> Tensor:
    part = "layer" if kind == "layers" else PARTS[kind][0]
    names = [f"layers.{index}.{part}" for index in range(unit_map.num_layers)]
    return torch.tensor([_influence(statistics, name) for name in names], dtype=torch.float64)


def _matching_scores(
    model: PreTrainedModel, unit_map: UnitMap, statistics: ActivationStatistics, group: UnitGroup
) -> Tensor:
    """Units removed one after the other down to the last, the rest refitted after each.

    A unit's score is the error at which it left, per token; the last one scores the whole output.
    """
    place = _place_of(group)
    write: Any = write_of(model, unit_map, place)
    weight = write.weight.detach()
    inputs_first = weight.T if isinstance(write, nn.Linear) else weight
    width = len(inputs_first) // group.num_units
    path = backward_matching(
        statistics.grams[place],
        inputs_first,
        width,
        1,
        num_per_step=max(1, int(group.num_units * STEP_SHARE)),
    )
    return path.scores.cpu() / statistics.num_tokens


def _hidden_scores(
    model: PreTrainedModel, unit_map: UnitMap, statistics: ActivationStatistics
) -> Tensor:
    architecture = unit_map.architecture
    weights = dict(model.named_parameters())
    total = torch.zeros(unit_map.dense.hidden_size, dtype=torch.float64)
    for parameter in unit_map.parameters:
        if len(parameter.axes) < 2 or ("hidden",) not in parameter.axes:
            continue
        module = parameter.name.rpartition(".")[0]
        if parameter.layer is None:
            reads_final = module == architecture.head
            reads_final |= unit_map.tied_head and module == architecture.embeddings[0]
            if not reads_final:
                continue
            site = architecture.final_norm
        else:
            sublayer = (
                architecture.attention if parameter.branch == "attention" else architecture.mlp
            )
            if module.endswith(sublayer.write):
                continue
            site = f"{architecture.layers}.{parameter.layer}.{sublayer.norm}"
        dim = parameter.axes.index(("hidden",))
        weight = weights[parameter.name].detach().double().cpu()
        values = weight.square().sum(1 - dim) * statistics.normed[site]
        total += values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return total
