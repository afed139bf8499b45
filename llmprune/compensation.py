"""Mean compensation: what a removed unit added on average stays, as a bias.

A gate that closes on a compensated unit leaves the unit's mean contribution in place, and the cut
puts the same constant into the bias of the projection that writes to the residual stream: the
channel means of what the projection read, times its removed weights (the bias compensation of
FLAP, arXiv 2312.11983, for every kind of unit inside a sublayer, and for sublayers and layers). A
removed sublayer's mean goes into the last kept projection before it; where there is none, at the
very beginning of the model, it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.files import save_tensors
from llmprune.plan import PrunePlan
from llmprune.units import Branch, UnitMap, query_heads_per_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BRANCHES: tuple[Branch, ...] = get_args(Branch)
# A sublayer: layer and branch.
Place = tuple[int, Branch]


@dataclass(frozen=True)
class UnitMeans:
    """Mean activations of the dense model over the calibration tokens.

    Attributes:
        read: What each write projection reads on average, shape (in_features,), float64.
    """

    read: Mapping[Place, Tensor]

    def save(self, file: Path) -> None:
        """Write the means as safetensors."""
        tensors = {f"{layer}.{branch}": mean for (layer, branch), mean in self.read.items()}
        save_tensors(tensors, file, {"of": "mean activations"})

    def to(self, device: torch.device) -> UnitMeans:
        """The same on a device."""
        return UnitMeans({place: mean.to(device) for place, mean in self.read.items()})

    @staticmethod
    def load(file: Path) -> UnitMeans:
        """Read what `save` wrote.

        Raises:
            InputError: The file is damaged.
        """
        from safetensors.torch import load_file

        read: dict[Place, Tensor] = {}
        try:
            for name, mean in load_file(file).items():
                layer, _, branch = name.partition(".")
                read[int(layer), "attention" if branch == "attention" else "mlp"] = mean
        except (SafetensorError, ValueError) as error:
            raise InputError(
                f"{file.name}: must hold mean activations ({error}); delete it, then --resume"
            ) from error
        return UnitMeans(read)


def left_without(unit_map: UnitMap, plan: PrunePlan) -> set[Place]:
    """Removed sublayers that no kept write projection comes before: nothing can hold their mean."""
    found: set[Place] = set()
    for place, is_kept in _sublayers(unit_map, plan):
        if is_kept:
            break
        found.add(place)
    return found


@torch.no_grad()
def compensated_biases(
    model: PreTrainedModel, unit_map: UnitMap, plan: PrunePlan, means: UnitMeans
) -> dict[Place, Tensor]:
    """The bias of every kept write projection, shape (dense hidden_size,), float64.

    It holds the projection's own bias, the means of the units removed from what it reads, scaled as
    the plan scales them, and the means of the removed sublayers that come right after it. Gates on
    hidden channels are not applied.
    """
    biases: dict[Place, Tensor] = {}
    last: Place | None = None
    for place, is_kept in _sublayers(unit_map, plan):
        write, mean = write_of(model, unit_map, place), means.read[place]
        mean_written = written(write, mean)
        if is_kept:
            gate = _outer_gate(plan, place)
            closed = 1 - gates_of_reads(unit_map, plan, place)
            bias = gate * written(write, closed * mean)
            biases[place] = bias + (1 - gate) * mean_written
            last = place
        elif last is not None:
            biases[last] = biases[last] + mean_written
    return biases


def _sublayers(unit_map: UnitMap, plan: PrunePlan) -> Iterator[tuple[Place, bool]]:
    """Every sublayer of the dense model in order, and whether it stays."""
    widths = plan.widths(unit_map)
    for index, layer in enumerate(widths.layers):
        for branch in BRANCHES:
            yield (index, branch), layer is not None and bool(getattr(layer, branch))


def _outer_gate(plan: PrunePlan, place: Place) -> float:
    """What the plan scales a kept sublayer's output by."""
    layer, branch = place
    gate = 1.0
    for kind in (f"{branch}_sublayers", "layers"):
        if kind in plan.scale and layer in plan.kept[kind]:
            gate *= plan.scale[kind][plan.kept[kind].index(layer)]
    return gate


def write_of(model: PreTrainedModel, unit_map: UnitMap, place: Place) -> nn.Module:
    """The projection through which a sublayer writes to the residual stream."""
    layer, branch = place
    architecture = unit_map.architecture
    name = f"{architecture.layers}.{layer}.{getattr(architecture, branch).write}"
    return model.get_submodule(name)


def written(write: Any, mean: Tensor) -> Tensor:
    """What a write projection adds for a constant input, without its hooks; float64.

    Args:
        write: An `nn.Linear`, or a Conv1D, whose weight is (inputs, outputs).
        mean: Shape (in_features,).
    """
    weight = write.weight if isinstance(write, nn.Linear) else write.weight.T
    value = weight.double() @ mean.to(weight.device, torch.float64)
    return value if write.bias is None else value + write.bias.double()


def gates_of_reads(unit_map: UnitMap, plan: PrunePlan, place: Place) -> Tensor:
    """What the plan multiplies each position that a write projection reads by, float64."""
    layer, branch = place
    widths = {"mlp_channels": 1}
    if branch == "attention":
        per_group = query_heads_per_group(unit_map.layer(layer))
        widths = {"kv_groups": per_group * unit_map.head_dim, "heads": unit_map.head_dim}
    gate: Tensor | None = None
    for kind, width in widths.items():
        group = unit_map.groups[f"layers.{layer}.{kind}"]
        value = torch.zeros(group.num_units, dtype=torch.float64)
        scale = plan.scale.get(group.name)
        kept = torch.tensor(plan.kept_in(group))
        value[kept] = 1.0 if scale is None else torch.tensor(scale, dtype=torch.float64)
        value = value.repeat_interleave(width)
        gate = value if gate is None else gate * value
    assert gate is not None
    return gate
