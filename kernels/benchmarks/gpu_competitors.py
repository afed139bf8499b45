"""What the kernels are measured against, on the operands of the same trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._triton import has_triton

from llmprune_kernels.densify import densify
from llmprune_kernels.timing import Graph, Launch, copies_needed, interleaved
from llmprune_kernels.trials import Trial

# torch's kernel multiplies at least 16 columns
FEWEST_COLUMNS = 16


def shrunk_launches(trial: Trial) -> list[Launch]:
    """A dense layer with fewer inputs and as many numbers: structured pruning, and the ceiling."""
    problem = trial.problem
    width = max(64, round(problem.density * problem.in_features / 64) * 64)
    copies = copies_needed(problem.stored_bytes)
    weights = [
        torch.randn(problem.out_features, width, device=trial.x.device).to(problem.dtype)
        for _ in range(copies)
    ]
    x = trial.x[:, :width].contiguous()
    return [partial(functional.linear, x, weight) for weight in weights]


def densify_launches(trial: Trial) -> list[Launch]:
    """Write the weight out, then multiply densely."""

    def launch(values: Tensor) -> Tensor:
        return functional.linear(trial.x, densify(values, trial.index))

    return [partial(launch, values) for values in trial.values]


def torch_bsr_launches(trial: Trial, meta: dict[str, int]) -> list[Callable[[], Tensor]]:
    """`torch.sparse`'s kernel; its result is the transposed product.

    Raises:
        ValueError: torch does not have it here.
    """
    if not has_triton():
        raise ValueError("torch finds no GPU that its kernel runs on")
    from torch.sparse._triton_ops import bsr_dense_addmm

    problem, index = trial.problem, trial.index
    columns = max(FEWEST_COLUMNS, problem.tokens)
    x = torch.zeros(columns, problem.in_features, dtype=problem.dtype, device=trial.x.device)
    x[: problem.tokens] = trial.x
    out = torch.empty(problem.out_features, columns, dtype=problem.dtype, device=x.device)
    size = (problem.out_features, problem.in_features)

    weights = [
        torch.sparse_bsr_tensor(
            index.row_ptr, index.col[: index.num_blocks], values, size, check_invariants=False
        )
        for values in trial.values
    ]

    def launch(weight: Tensor) -> Tensor:
        product = bsr_dense_addmm(out, weight, x.T, beta=0, out=out, meta=meta)
        return product.T[: problem.tokens]

    return [partial(launch, weight) for weight in weights]


def torch_bsr_tuned(trial: Trial) -> list[Callable[[], Tensor]]:
    """Its fastest correct setting of a small search.

    Raises:
        ValueError: No setting ran and was correct; the message has the last one's reason.
    """
    wanted = trial.wanted("matmul")
    found: list[tuple[float, list[Callable[[], Tensor]]]] = []
    reason = "no setting divides the tokens"
    for meta in _torch_settings(trial):
        try:
            launches = torch_bsr_launches(trial, meta)
            reason = trial.error("matmul", launches[0](), wanted)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
        if not reason:
            us = interleaved({"bsr": Graph(launches)}, rounds=1, round_ms=3.0)["bsr"].median_us
            found.append((us, launches))
    if not found:
        raise ValueError(reason)
    return min(found, key=lambda pair: pair[0])[1]


def _torch_settings(trial: Trial) -> list[dict[str, int]]:
    columns = max(FEWEST_COLUMNS, trial.problem.tokens)
    # its tiles of columns must be powers of two
    if columns & (columns - 1):
        return []
    widths = [16] if columns < 64 else [width for width in (64, 128, 256) if width <= columns]
    return [
        {"SPLIT_N": columns // width, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": warps}
        for width, stages, warps in itertools.product(widths, (1, 4), (4, 8))
    ]
