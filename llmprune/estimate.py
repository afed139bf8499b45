"""Before a run: the shape it will leave, the memory and the time it will need."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llmprune.architectures import architecture_of
from llmprune.cost import Cost, measure_cost
from llmprune.cut_config import check_form
from llmprune.latency import Measure, Promise, table_for
from llmprune.precision import faster_precision
from llmprune.recipe import ModelSource, Recipe
from llmprune.sources import load_config
from llmprune.targets import Targets, target_widths, targets_of
from llmprune.texts import num_self_generated, resolve_text
from llmprune.units import UnitMap, map_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Share of a plain matmul's rate that a forward pass reaches: 512 tokens through SmolLM2-135M on two
# CPU cores took 1.0 to 1.1 s in float32, where the matmul rate (320 GFLOP/s) alone gives 0.5 s.
EFFICIENCY = 0.5
# Training steps in bf16, where that is taken, against float32: 40 gate steps of 512 tokens took
# 47 s on the same two cores, 400 GFLOP/s.
BF16_TRAINING_GAIN = 2.5
# Seconds for imports, reading the model, saving and reloading it, and the latency and memory runs.
FIXED_SECONDS = 90.0
# Activations kept for a backward pass, in numbers a token and layer: multiples of the hidden size
# (norms, projections, attention, residual stream) and of the MLP's width.
KEPT_HIDDEN, KEPT_MLP = 12, 4
# A token decoded among 128 rows, against one in a float32 forward pass: 384 rows of 256 tokens took
# 276 s on the same two cores, in bf16; without bf16 it is more.
DECODE_PENALTY = 1.5


@dataclass(frozen=True)
class Estimate:
    """What a run will need and leave.

    Attributes:
        unit_map: Of the dense model.
        targets: How many units stay.
        dense: Cost before.
        pruned: Cost after.
        peak_bytes: Memory of the largest stage: weights, optimizer, activations.
        seconds: Wall time on this machine, by its measured matmul rate.
        promise: Of a latency budget: what its phase takes, by a table measured here.
    """

    unit_map: UnitMap
    targets: Targets
    dense: Cost
    pruned: Cost
    peak_bytes: int
    seconds: float
    promise: Promise | None = None


def meta_model(source: ModelSource) -> PreTrainedModel:
    """The model's modules without weights, from its config alone.

    Raises:
        InputError: As `load_config`, or an unsupported family.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    architecture_of(config.model_type)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def random_model(source: ModelSource) -> PreTrainedModel:
    """The model with random weights, to time, where a run would have it; errors as `meta_model`."""
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    architecture_of(config.model_type)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, source.dtype))


def estimate_run(recipe: Recipe, *, measure: Measure) -> Estimate:
    """Plan a run without its weights; trains nothing.

    Args:
        recipe: The run's.
        measure: Times models, where the budget is a latency.

    Raises:
        InputError: What `prune` would refuse before training.
    """
    model = meta_model(recipe.model)
    unit_map = map_units(model)
    random = partial(random_model, recipe.model)
    latency = table_for(None, random, unit_map, recipe, measure=measure)
    targets = targets_of(unit_map, recipe, latency=latency)
    widths = target_widths(unit_map, targets.counts)
    check_form(model, unit_map, widths, recipe.export.format)
    dense, pruned = measure_cost(unit_map), measure_cost(unit_map, widths)
    return Estimate(
        unit_map=unit_map,
        targets=targets,
        dense=dense,
        pruned=pruned,
        peak_bytes=_peak_bytes(recipe, unit_map, dense, pruned, model.config.vocab_size),
        seconds=FIXED_SECONDS
        + _flops(recipe, unit_map, dense, pruned) / (EFFICIENCY * matmul_rate()),
        promise=None if latency is None else latency.promise(recipe, widths),
    )


def _flops(recipe: Recipe, unit_map: UnitMap, dense: Cost, pruned: Cost) -> float:
    """FLOPs of the whole run: a backward pass costs one forward, two where weights learn."""
    row = recipe.calibration.row_length
    gates, recovery = recipe.gates, recipe.recovery
    taken = recipe.training.mixed_precision
    taken = faster_precision() if taken == "auto" else taken
    gain = BF16_TRAINING_GAIN if taken == "bf16" else 1.0
    total = 0.0
    own = num_self_generated(resolve_text(recipe.calibration))
    total += own * row * dense.flops * DECODE_PENALTY
    if gates.prior != "none":
        rows = min(gates.prior_rows, recipe.calibration.num_rows)
        # a backward pass to the gates costs about what the forward pass does
        passes = {"fisher": 2, "integrated": 3}
        total += rows * row * dense.flops * passes.get(gates.prior, 1)
    if recipe.compensation == "mean":
        total += min(gates.prior_rows, recipe.calibration.num_rows) * row * dense.flops
    step = 2 + (gates.train != "gates") + (gates.loss == "distillation")
    total += gates.steps * gates.batch_size * row * step * dense.flops / gain
    step_flops = 3 * pruned.flops + (recovery.loss == "distillation") * dense.flops
    total += recovery.steps * recovery.batch_size * row * step_flops / gain
    if recipe.reconstruction is not None:
        rows = min(recipe.reconstruction.num_rows, recipe.calibration.num_rows)
        # one dense pass, about two pruned ones, and the normal equations in float64 (half the rate)
        layer = unit_map.layer(0)
        query = layer.num_attention_heads * unit_map.head_dim
        widths = layer.intermediate_size**2 + query**2
        normal = 2 * 2 * unit_map.num_layers * widths
        total += rows * row * (dense.flops + 2 * pruned.flops + normal)
        if "hidden_channels" in recipe.prune.rules():
            # two more dense passes, and every norm's regression of all channels on those that stay
            regressions = 3 * unit_map.num_layers * unit_map.dense.hidden_size**2
            total += rows * row * (2 * dense.flops + 2 * 2 * 2 * regressions)
    for task in recipe.evaluation.perplexity:
        windows = task.max_windows or 600
        total += windows * task.window * (dense.flops + pruned.flops)
    return total


def _peak_bytes(
    recipe: Recipe, unit_map: UnitMap, dense: Cost, pruned: Cost, vocab_size: int
) -> int:
    wide = torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8
    weights = dense.parameters * wide
    gates = weights + _activation_bytes(recipe, recipe.gates, unit_map, vocab_size)
    if recipe.gates.train == "all":
        gates += weights + dense.parameters * 3 * 4
    recovery = 0
    if recipe.recovery.steps:
        recovery = weights + pruned.parameters * wide
        recovery += _activation_bytes(recipe, recipe.recovery, unit_map, vocab_size)
        if recipe.recovery.train == "all":
            recovery += pruned.parameters * 3 * 4
    return max(gates, recovery)


def _activation_bytes(recipe: Recipe, settings: Any, unit_map: UnitMap, vocab_size: int) -> int:
    rows = settings.micro_batch_size or settings.batch_size
    tokens = rows * recipe.calibration.row_length
    layer = unit_map.layer(0)
    width = KEPT_HIDDEN * unit_map.dense.hidden_size + KEPT_MLP * layer.intermediate_size
    layers = 1 if recipe.training.activation_checkpointing else unit_map.num_layers
    # logits of student and teacher, their logarithms and gradients
    return tokens * 4 * (layers * width + 5 * vocab_size)


def matmul_rate(*, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOPs a second of a float32 matmul of (size, size) matrices here, measured for a moment."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        float((a @ a)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)
