"""Where the gates of a step stand, kind by kind: a few numbers for the log and for trackers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A gate this near to 1 or to 0 is called open or closed.
OPEN, CLOSED = 0.99, 0.01
HALF = 0.5


@torch.no_grad()
def gate_figures(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Shares of the gates of every kind that are open, open by half, and closed, and their mean.

    The numbers of all kinds come from the device at once, so that a step waits one time.

    Args:
        values: Group name -> gate values, shape (num_units,). What follows the last dot of a name
            is the kind: `layers.3.mlp_channels`, `layers`, `model.layers.3.mlp.up_proj`.

    Returns:
        `KIND_open`, `KIND_half_open`, `KIND_closed` in [0, 1] and `KIND_mean`, five digits each.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(value.detach())
    if not kinds:
        return {}
    rows = []
    for parts in kinds.values():
        gates = torch.cat(parts).float()
        shares = [(gates >= OPEN), (gates >= HALF), (gates <= CLOSED), gates]
        rows.append(torch.stack([share.float().mean() for share in shares]))
    found = torch.stack(rows).tolist()
    names = ("open", "half_open", "closed", "mean")
    return {
        f"{kind}_{name}": round(figure, 5)
        for kind, row in zip(kinds, found, strict=True)
        for name, figure in zip(names, row, strict=True)
    }
