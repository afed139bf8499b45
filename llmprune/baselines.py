"""Scores that need no gate training: priors of the gates, and baselines to beat.

Every score is one number per unit, higher stays; it is comparable inside a unit group, and across
the groups of one kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.gates import attach_gates
from llmprune.recipe import Method, UnitKind
from llmprune.surgery import expand_units
from llmprune.units import UnitGroup, UnitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ActivationStatistics:
    """What flows through a model on a set of rows, summed over tokens in float64.

    Attributes:
        read: Write projection -> sum of squares of what it reads, shape (in_features,).
        normed: Norm -> sum of squares of its output, shape (hidden_size,).
        similarity: `layers.{i}.{attention|mlp|layer}` -> sum of cosines between the residual
            stream before and after.
        num_tokens: Tokens seen.
    """

    def __init__(self) -> None:
        self.read: dict[str, Tensor] = {}
        self.normed: dict[str, Tensor] = {}
        self.similarity: dict[str, float] = {}
        self.num_tokens = 0


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel, unit_map: UnitMap, batches: Iterable[Tensor]
) -> ActivationStatistics:
    """Run the rows through the model once; its weights and outputs are left alone.

    Args:
        model: The dense model.
        unit_map: Its units.
        batches: Token rows, each of shape (batch, length), int64.
    """
    statistics = ActivationStatistics()
    handles = _watch(model, unit_map, statistics)
    try:
        for rows in batches:
            model(input_ids=rows.to(model.device), use_cache=False, logits_to_keep=1)
            statistics.num_tokens += rows.numel()
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def _watch(model: PreTrainedModel, unit_map: UnitMap, found: ActivationStatistics) -> list[Any]:
    architecture = unit_map.architecture
    handles = []

    def add(table: dict[str, Tensor], name: str, values: Tensor) -> None:
        squares = values.double().square().reshape(-1, values.shape[-1]).sum(0).cpu()
        table[name] = table[name] + squares if name in table else squares

    def compare(name: str, before: Tensor, after: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        found.similarity[name] = found.similarity.get(name, 0.0) + float(cosine.sum())

    def watch_norm(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            add(found.normed, name, output)

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    def watch_layer(index: int) -> None:
        prefix = f"{architecture.layers}.{index}"
        stream: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            stream[:] = [args[0]]

        def after_write(branch: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                add(found.read, f"{prefix}.{getattr(architecture, branch).write}", args[0])
                stream.append(stream[-1] + output)
                compare(f"layers.{index}.{branch}", stream[-2], stream[-1])
                if branch == "mlp":
                    compare(f"layers.{index}.layer", stream[0], stream[-1])

            return hook

        layer = model.get_submodule(prefix)
        handles.append(layer.register_forward_pre_hook(before))
        for branch in ("attention", "mlp"):
            write = model.get_submodule(f"{prefix}.{getattr(architecture, branch).write}")
            handles.append(write.register_forward_hook(after_write(branch)))
            watch_norm(f"{prefix}.{getattr(architecture, branch).norm}")

    for index in range(unit_map.num_layers):
        watch_layer(index)
    watch_norm(architecture.final_norm)
    return handles


def baseline_scores(
    method: Method,
    model: PreTrainedModel,
    unit_map: UnitMap,
    batches: Iterable[Tensor],
    *,
    kinds: Collection[UnitKind],
    seed: int,
) -> dict[str, Tensor]:
    """Scores of a method that trains nothing, for every unit group of the named kinds.

    Args:
        method: Any but `sequential_attention`.
        model: The dense model.
        unit_map: Its units.
        batches: Calibration rows, each of shape (batch, length), int64.
        kinds: Kinds to score.
        seed: Of `random`.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            group.name: torch.rand(group.num_units, generator=generator, dtype=torch.float64)
            for group in unit_map.groups.values()
            if group.kind in kinds
        }
    if method == "magnitude":
        return magnitude_scores(model, unit_map, kinds)
    if method == "taylor":
        return taylor_scores(model, unit_map, batches, kinds)
    assert method == "activation", method
    statistics = collect_statistics(model, unit_map, batches)
    return activation_scores(model, unit_map, statistics, kinds)


def magnitude_scores(
    model: PreTrainedModel, unit_map: UnitMap, kinds: Collection[UnitKind]
) -> dict[str, Tensor]:
    """Root of the summed squares of every weight that goes with a unit, float64."""
    squares = {n: p.detach().double().square().cpu() for n, p in model.named_parameters()}
    scores = {}
    for group in unit_map.groups.values():
        if group.kind not in kinds:
            continue
        total = torch.zeros(group.num_units, dtype=torch.float64)
        for unit, names in enumerate(group.whole):
            total[unit] = sum(float(squares[name].sum()) for name in names)
        for piece in group.slices:
            square = squares[piece.parameter]
            others = [dim for dim in range(square.dim()) if dim != piece.dim]
            line = square.sum(others) if others else square
            end = piece.offset + group.num_units * piece.width
            total += line[piece.offset : end].reshape(group.num_units, piece.width).sum(1)
        scores[group.name] = total.sqrt()
    return scores


def taylor_scores(
    model: PreTrainedModel,
    unit_map: UnitMap,
    batches: Iterable[Tensor],
    kinds: Collection[UnitKind],
) -> dict[str, Tensor]:
    """First-order change of the next-token loss when a gate closes: |sum over rows of dL/dg|.

    The gradient of a gate at 1 is the sum of weight times gradient over what the unit reads
    (LLM-Pruner's first-order criterion, arXiv 2305.11627, taken per unit).
    """
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    gates = attach_gates(model, unit_map, kinds)
    values = {
        name: torch.ones(unit_map.groups[name].num_units, device=model.device, requires_grad=True)
        for name in gates.group_names
    }
    gates.set(values)
    try:
        for rows in batches:
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), rows[:, 1:].reshape(-1), reduction="sum"
            )
            loss.backward()
    finally:
        gates.detach()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trainable[name])
    found = {}
    for name, value in values.items():
        assert value.grad is not None, name
        found[name] = value.grad.double().abs().cpu()
    return found


def activation_scores(
    model: PreTrainedModel,
    unit_map: UnitMap,
    statistics: ActivationStatistics,
    kinds: Iterable[UnitKind],
) -> dict[str, Tensor]:
    """Activation-aware importance of every unit of the named kinds, float64, non-negative.

    Heads, KV groups and MLP channels: mean square of the activation times the squared norm of the
    weights that read it (Wanda, arXiv 2306.11695, summed over a unit). Hidden channels: the same at
    every norm's output, each site's sum normalised to 1. Sublayers and layers: 1 - cosine between
    the residual stream before and after (block influence, ShortGPT, arXiv 2403.03853).
    """
    wanted = set(kinds)
    weights = dict(model.named_parameters())
    scores = {}
    for group in unit_map.groups.values():
        if group.kind not in wanted:
            continue
        if group.kind == "hidden_channels":
            scores[group.name] = _hidden_scores(unit_map, weights, statistics)
        elif group.layer is None:
            part = {"attention_sublayers": "attention", "mlp_sublayers": "mlp", "layers": "layer"}
            names = [f"layers.{i}.{part[group.kind]}" for i in range(group.num_units)]
            sums = torch.tensor([statistics.similarity[name] for name in names]).double()
            scores[group.name] = (1 - sums / statistics.num_tokens).clamp(min=0)
        else:
            scores[group.name] = _read_scores(unit_map, weights, statistics, group)
    return scores


def _read_scores(
    unit_map: UnitMap,
    weights: Mapping[str, Tensor],
    statistics: ActivationStatistics,
    group: UnitGroup,
) -> Tensor:
    architecture = unit_map.architecture
    branch = architecture.mlp if group.kind == "mlp_channels" else architecture.attention
    name = f"{architecture.layers}.{group.layer}.{branch.write}"
    read = next(s for s in group.slices if s.parameter == f"{name}.weight")
    weight = weights[read.parameter].detach().double().cpu()
    norms = weight.square().sum(1 - read.dim)
    per_position = norms * statistics.read[name] / statistics.num_tokens
    index = expand_units(torch.arange(group.num_units), read.width)
    return per_position[index].reshape(group.num_units, read.width).sum(1)


def _hidden_scores(
    unit_map: UnitMap, weights: Mapping[str, Tensor], statistics: ActivationStatistics
) -> Tensor:
    architecture = unit_map.architecture
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
