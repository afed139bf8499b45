"""What a method of a comparison removed and what it used; what tells models and rows apart."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from llmprune.cost import measure_cost
from llmprune.plan import PrunePlan
from llmprune.recipe import Recipe
from llmprune.units import UnitMap
from llmprune_eval.stored_results import Stage, hash_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Values of each parameter that tell a model from another of the same name.
SAMPLED = 16


def removed_share(unit_map: UnitMap, plan: PrunePlan) -> float:
    """The share of the decoder's parameters that a plan removes, biases added by a cut aside."""
    dense = measure_cost(unit_map).decoder_parameters
    return 1 - measure_cost(unit_map, plan.widths(unit_map)).decoder_parameters / dense


def units_removed(unit_map: UnitMap, plan: PrunePlan) -> dict[str, tuple[int, int]]:
    """Kind -> units that a plan removes, of how many; what goes with its layer counts as gone."""
    found = {}
    for kind in dict.fromkeys(group.kind for group in unit_map.groups.values()):
        groups = unit_map.of_kind(kind)
        if any(group.name in plan.kept for group in groups):
            total = sum(group.num_units for group in groups)
            found[kind] = (total - sum(len(plan.kept.get(g.name, ())) for g in groups), total)
    return {str(kind): counts for kind, counts in found.items()}


def tokens_of(recipe: Recipe, stage: Stage) -> dict[str, int]:
    """Calibration tokens that each step up to a stage goes through."""
    length, gates = recipe.calibration.row_length, recipe.gates
    trains = recipe.method == "sequential_attention"
    reads = recipe.method not in ("random", "magnitude", "sequential_attention")
    reads |= trains and reads_priors(recipe)
    rows = min(gates.prior_rows, recipe.calibration.num_rows) if reads else 0
    found = {"scores": rows * length}
    found["gates"] = gates.seeds * gates.steps * gates.batch_size * length if trains else 0
    if stage != "compensated" and recipe.reconstruction is not None:
        rows = min(recipe.reconstruction.num_rows, recipe.calibration.num_rows)
        found["refit"] = rows * length
    if stage == "recovered":
        found["recovery"] = recipe.recovery.steps * recipe.recovery.batch_size * length
    return found


def reads_priors(recipe: Recipe) -> bool:
    """Whether the logits of gates start from importances."""
    return recipe.gates.prior != "none" and recipe.gates.variant != "magnitude"


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def sample_of(model: PreTrainedModel) -> str:
    """A hash of a few values of every parameter: another model of the same name differs in it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        stride = max(1, len(values) // SAMPLED)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values[::stride].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:20]


def sources_of(recipe: Recipe, *, with_seed: bool = True) -> str:
    """A hash of where the model and the rows come from."""
    training = recipe.training.mixed_precision
    parts = [recipe.model.model_dump(mode="json"), recipe.calibration.model_dump(mode="json")]
    return hash_of([parts, training, recipe.seed if with_seed else None])
