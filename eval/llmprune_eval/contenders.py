"""CONTENDERS: every method and control of a comparison, and what of a recipe each changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from llmprune.errors import InputError
from llmprune.recipe import Method, Recipe

SEQUENTIAL: Method = "sequential_attention"
# Of the logits in controls and ablations: the default when they were measured; and the other end of
# what `learning_rate: auto` gives (decision 0017).
RATE, SLOWER_RATE = 0.05, 0.02


@dataclass(frozen=True)
class Contender:
    """One method of a comparison: what it is called, and what of a recipe it changes.

    Attributes:
        label: For tables.
        changes: The recipe as a mapping -> the same with the method in it.
        is_control: A form of SequentialAttention++ with a part taken out, no method of its own.
        is_ablation: A control that is compared only where it is named.
    """

    label: str
    changes: Callable[[dict[str, Any]], dict[str, Any]]
    is_control: bool = False
    is_ablation: bool = False


def _named(method: Method) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda recipe: recipe | {"method": method}


def _gates(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda recipe: recipe | {"method": SEQUENTIAL, "gates": recipe["gates"] | changes}


def _ablation(label: str, **changes: Any) -> Contender:
    """A change to gates whose logits learn at RATE: to be held against `faster_gates`."""
    settings = {"learning_rate": RATE, **changes}
    return Contender(f"SA++: {label}", _gates(**settings), is_control=True, is_ablation=True)


def _whole_layers(recipe: dict[str, Any]) -> dict[str, Any]:
    """ShortGPT removes layers, so it meets the budget as nearly as whole layers can."""
    budget = {key: recipe["budget"][key] for key in ("sparsity", "of")}
    return recipe | {
        "method": "block_influence",
        "prune": {"layers": {}},
        "budget": budget | {"tolerance": 0.02},
        "export": recipe["export"] | {"format": "uniform"},
    }


CONTENDERS: Mapping[str, Contender] = {
    "sequential_attention": Contender("SequentialAttention++", _named(SEQUENTIAL)),
    "random": Contender("random", _named("random")),
    "magnitude": Contender("magnitude", _named("magnitude")),
    "wanda": Contender("Wanda, structured", _named("wanda")),
    "flap": Contender("FLAP", _named("flap")),
    "taylor": Contender("Taylor (LLM-Pruner)", _named("taylor")),
    "taylor_squared": Contender("squared Taylor", _named("taylor_squared")),
    "block_influence": Contender("block influence (ShortGPT), whole layers", _whole_layers),
    "omp": Contender("group OMP, backward", _named("omp")),
    "gradual_magnitude": Contender(
        "control: gradual magnitude, weights train",
        _gates(variant="magnitude", train="all", prior="none", curve="gradual", learning_rate=RATE),
        is_control=True,
    ),
    "gradual": Contender(
        f"control: SA++ with the gradual phase, logits at {RATE}",
        _gates(curve="gradual", learning_rate=RATE),
        is_control=True,
    ),
    "prior_alone": Contender(
        "control: SA++'s prior, no training",
        _gates(steps=0, learning_rate=RATE),
        is_control=True,
    ),
    "as_published": Contender(
        "control: SA++ as published, gates only",
        _gates(
            variant="plus_plus",
            curve="gradual",
            prior="none",
            loss="next_token",
            learning_rate=RATE,
            dense=0.3,
            sparsify=0.4,
            sparse=0.3,
        ),
        is_control=True,
    ),
    "next_token": _ablation("trained on the next tokens, no teacher", loss="next_token"),
    "soft": _ablation("temperature up to 4, gates still soft at the end", temperature=(1.0, 4.0)),
    "larger_batches": _ablation("half the steps, twice the rows in each", steps=20, batch_size=4),
    "no_prior": _ablation("no prior", prior="none"),
    "faster_gates": _ablation(f"logits at {RATE}"),
    "slower_gates": _ablation(f"logits at {SLOWER_RATE}", learning_rate=SLOWER_RATE),
    "lora_along": _ablation("weights learn along by LoRA", train="lora"),
    "activation_prior": _ablation("prior from activations", prior="activation"),
    "integrated_prior": _ablation("prior from integrated gradients", prior="integrated"),
    "integrated_alone": _ablation(
        "prior from integrated gradients, no training", prior="integrated", steps=0
    ),
}
assert set(get_args(Method)) <= set(CONTENDERS)


def check_methods(methods: Iterable[str] | None) -> tuple[str, ...]:
    """The methods in the order of `CONTENDERS`; without names all but the ablations.

    Raises:
        InputError: There is no method of that name, or none at all.
    """
    wanted = [name for name, one in CONTENDERS.items() if not one.is_ablation]
    wanted = wanted if methods is None else list(methods)
    for name in wanted:
        if name not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise InputError(f"--methods must be all or some of {known}, got {name!r}")
    if not wanted:
        raise InputError("--methods must name at least one method")
    return tuple(name for name in CONTENDERS if name in wanted)


def variant(recipe: Recipe, method: str) -> Recipe:
    """The recipe with a method in it."""
    return Recipe.parse(CONTENDERS[method].changes(recipe.model_dump(mode="json")), name=method)
