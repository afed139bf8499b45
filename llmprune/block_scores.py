"""Scores of weight blocks that take no gate training: priors of the gates, and baselines to beat.

One importance per block, float64, not negative, higher stays, comparable inside a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.baselines import gate_slopes
from llmprune.block_gates import BlockGates, block_norms, block_sums
from llmprune.recipe import Method
from llmprune.recipe_training import Prior
from llmprune.scoring import FORWARD_BATCH
from llmprune.weight_blocks import BlockMap, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Over = Callable[[str, Sequence[Tensor]], Iterable[Tensor]]


def score_blocks(
    name: Method | Prior,
    model: PreTrainedModel,
    block_map: BlockMap,
    rows: Tensor,
    *,
    seed: int = 0,
    over: Over = lambda task, items: items,
) -> dict[str, Tensor]:
    """Importance of every block.

    Args:
        name: `random`, `magnitude` (Frobenius norm), `wanda` or `activation` (sum of |weight| times
            the norm of its input, arXiv 2306.11695, over the block), `taylor`, `taylor_squared` or
            `fisher` (gradients of the block's gate, as for units).
        model: The dense model; left as it is.
        block_map: Its blocks.
        rows: Token rows, shape (num_rows, length), int64.
        seed: Of `random`, and of the labels that `fisher` draws.
        over: Progress.
    """
    projections = block_map.projections
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            one: torch.rand(projection.num_blocks, generator=generator, dtype=torch.float64)
            for one, projection in projections.items()
        }
    if name == "magnitude":
        return {
            one: block_norms(weight_of(model, one), projection)
            for one, projection in projections.items()
        }
    task = f"{name} scores"
    if name in ("wanda", "activation"):
        return _wanda(model, block_map, over(task, rows.split(FORWARD_BATCH)))
    gates = BlockGates(model, block_map)
    try:
        return gate_slopes(
            model,
            gates,
            {one: projection.num_blocks for one, projection in projections.items()},
            over(task, rows.split(FORWARD_BATCH if name == "taylor" else 1)),
            order=1 if name == "taylor" else 2,
            labels="model" if name == "fisher" else "text",
            seed=seed,
        )
    finally:
        gates.detach()


@torch.no_grad()
def _wanda(
    model: PreTrainedModel, block_map: BlockMap, batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].double().square().flatten(0, -2).sum(0)
            squares[name] = squares[name] + found if name in squares else found

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in block_map.projections]
    try:
        for rows in batches:
            model(input_ids=rows.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: block_sums(
            weight_of(model, name).double().abs() * squares[name].sqrt(), projection
        ).cpu()
        for name, projection in block_map.projections.items()
    }
