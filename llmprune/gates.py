"""Gates on activations: attach_gates(model, unit_map, kinds), and taking them off again.

A gate multiplies what a unit contributes, never a weight: heads and MLP channels at the input of
the projection that writes to the residual stream, sublayers and layers at its output, hidden
channels at every write into the stream. Nested kinds multiply. The gated model is the function of
the cut model: RMS norms keep the dense scale (the cut folds the ratio into weight and eps), and a
LayerNorm takes its statistics over the channels whose gate is not zero. With mean compensation a
closed gate leaves the unit's mean behind instead of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.compensation import Place, UnitMeans, left_without, written
from llmprune.errors import InputError
from llmprune.plan import PrunePlan
from llmprune.recipe import UnitKind
from llmprune.units import BRANCH_KINDS, Branch, UnitMap, query_heads_per_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """The gate values of a model, by unit group, and the hooks that apply them.

    Attributes:
        values: Group name -> gate values, shape (num_units,), any float dtype; may carry a
            gradient. A group that is not there is open.
    """

    def __init__(
        self, unit_map: UnitMap, group_names: Iterable[str], means: UnitMeans | None = None
    ) -> None:
        self.unit_map = unit_map
        self.group_names = tuple(group_names)
        self.means = means
        # removed sublayers whose mean has no place to go
        self.uncompensated: set[Place] = set()
        self.values: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._are_open = False

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Take new values for some or all groups; the others keep theirs.

        Raises:
            InputError: A group that was not attached, or a wrong number of values.
        """
        for name, value in values.items():
            if name not in self.group_names:
                raise InputError(f"gates: {name} was not attached, only {list(self.group_names)}")
            expected = (self.unit_map.groups[name].num_units,)
            if tuple(value.shape) != expected:
                raise InputError(f"gates: {name} takes shape {expected}, got {tuple(value.shape)}")
        self.values.update(values)

    def set_plan(self, plan: PrunePlan) -> None:
        """Close what the plan removes: gates 0 there, the plan's scale (or 1) elsewhere.

        Raises:
            InputError: The plan is not for this model.
        """
        plan.validate(self.unit_map)
        values = {}
        for name in self.group_names:
            group = self.unit_map.groups[name]
            value = torch.zeros(group.num_units, dtype=torch.float64)
            kept = torch.tensor(plan.kept_in(group))
            scale = plan.scale.get(name)
            value[kept] = 1.0 if scale is None else torch.tensor(scale, dtype=torch.float64)
            values[name] = value
        self.set(values)
        self.uncompensated = left_without(self.unit_map, plan)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The dense model inside the block: every gate is left out of the computation."""
        were_open, self._are_open = self._are_open, True
        try:
            yield
        finally:
            self._are_open = were_open

    def magnitudes(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The weight norm of every unit that has a gate, by group."""
        # baselines import gates
        from llmprune.baselines import magnitude_scores

        kinds = {self.unit_map.groups[name].kind for name in self.group_names}
        return magnitude_scores(model, self.unit_map, kinds)

    def detach(self) -> None:
        """Take every hook off; the model is what it was before `attach_gates`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def value(self, name: str) -> Tensor | None:
        """The values of a group, or None where it is open."""
        return None if self._are_open else self.values.get(name)

    def keep_handle(self, handle: Any) -> None:
        """Remember a hook for `detach`."""
        self._handles.append(handle)


def attach_gates(
    model: PreTrainedModel,
    unit_map: UnitMap,
    kinds: Iterable[UnitKind],
    means: UnitMeans | None = None,
) -> Gates:
    """Put open gates on every unit of the named kinds, in place.

    The model's outputs are bit-equal until values are set, and with all values 1.

    Args:
        model: The model that `unit_map` was made from.
        unit_map: Its units.
        kinds: Kinds to gate.
        means: Mean activations that closed gates leave in place (mean compensation; hidden channels
            have none), or None for zeros.
    """
    kinds = tuple(kinds)
    names = [group.name for group in unit_map.groups.values() if group.kind in kinds]
    # moved here once, not in every forward pass
    gates = Gates(unit_map, names, None if means is None else means.to(model.device))
    architecture = unit_map.architecture
    for index in range(unit_map.num_layers):
        for branch in ("attention", "mlp"):
            sublayer = getattr(architecture, branch)
            write = model.get_submodule(f"{architecture.layers}.{index}.{sublayer.write}")
            read_hook = write.register_forward_pre_hook(_gate_read(gates, index, branch))
            gates.keep_handle(read_hook)
            gates.keep_handle(write.register_forward_hook(_gate_write(gates, index, branch)))
    if "hidden_channels" in kinds:
        _gate_stream(model, gates)
    return gates


def _gate_stream(model: PreTrainedModel, gates: Gates) -> None:
    architecture = gates.unit_map.architecture
    for name in architecture.embeddings:
        hook = model.get_submodule(name).register_forward_hook(_gate_embedding(gates))
        gates.keep_handle(hook)
    if architecture.norm_kind == "rms":
        return
    norms = [architecture.final_norm]
    for index in range(gates.unit_map.num_layers):
        prefix = f"{architecture.layers}.{index}"
        norms += [f"{prefix}.{architecture.attention.norm}", f"{prefix}.{architecture.mlp.norm}"]
    for name in norms:
        hook = model.get_submodule(name).register_forward_hook(_norm_over_kept(gates))
        gates.keep_handle(hook)


def _gate_read(gates: Gates, index: int, branch: Branch) -> Callable[..., Any]:
    """Multiply what a write projection reads: (..., heads * head_dim) or (..., channels)."""
    layer = gates.unit_map.layer(index)
    head_dim = gates.unit_map.head_dim
    widths = {"mlp_channels": 1}
    if branch == "attention":
        widths = {"kv_groups": query_heads_per_group(layer) * head_dim, "heads": head_dim}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        gate: Tensor | None = None
        for kind, width in widths.items():
            value = gates.value(f"layers.{index}.{kind}")
            if value is not None:
                value = value.repeat_interleave(width)
                gate = value if gate is None else gate * value
        if gate is None:
            return None
        value = args[0] * gate.to(args[0])
        if gates.means is not None:
            mean = gates.means.read[index, branch]
            value = value + ((1 - gate.double()).to(mean) * mean).to(value)
        return (value, *args[1:])

    return hook


def _gate_write(gates: Gates, index: int, branch: Branch) -> Callable[..., Any]:
    """Multiply what a write projection adds to the residual stream: (..., hidden_size)."""
    kinds = [kind for kind, own in BRANCH_KINDS.items() if own == branch]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        gate: Tensor | None = None
        for kind in (*kinds, "layers"):
            value = gates.value(kind)
            if value is not None:
                gate = value[index] if gate is None else gate * value[index]
        if gate is not None:
            output = output * gate.to(output)
            if gates.means is not None and (index, branch) not in gates.uncompensated:
                mean = written(module, gates.means.read[index, branch])
                output = output + ((1 - gate.double()) * mean).to(output)
        hidden = gates.value("hidden_channels")
        return output if hidden is None else output * hidden.to(output)

    return hook


def _gate_embedding(gates: Gates) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        hidden = gates.value("hidden_channels")
        return output if hidden is None else output * hidden.to(output)

    return hook


def _norm_over_kept(gates: Gates) -> Callable[..., Any]:
    """LayerNorm with mean and variance over the kept channels, zero elsewhere."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = gates.value("hidden_channels")
        if hidden is None or bool((hidden != 0).all()):
            return output
        assert isinstance(module, nn.LayerNorm)
        keep_mask = (hidden != 0).to(args[0])
        count = keep_mask.sum()
        centred = (args[0] - (args[0] * keep_mask).sum(-1, keepdim=True) / count) * keep_mask
        variance = centred.square().sum(-1, keepdim=True) / count
        normed = centred * torch.rsqrt(variance + module.eps) * module.weight
        return (normed + module.bias) * keep_mask

    return hook
