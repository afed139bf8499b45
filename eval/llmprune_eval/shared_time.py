"""Whether a measured time is a model's own, or other programs had the processor meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

# A time of which the processor was away for more than this share decides nothing: what is left is
# decided by other programs, and they do not share themselves out evenly over two models.
MOST_WAITED = 0.10
QUIETER = "take a quieter machine"


def is_shared(waited: float) -> bool:
    """Whether a time is too much that of others; `waited` is the share without the processor."""
    return waited > MOST_WAITED


def whose_time(waited: Mapping[str, float]) -> str:
    """Who lost how much of its time, by label."""
    shares = " and ".join(
        f"{share:.0%} of {label}'s{'' if index else ' time'}"
        for index, (label, share) in enumerate(waited.items())
    )
    return f"other programs had the processor for {shares}"
