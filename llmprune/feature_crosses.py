"""Categorical columns and their crosses as groups of 0/1 columns that compete for selection."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmprune.errors import InputError


@dataclass(frozen=True)
class Candidates:
    """Groups of columns, in the form that `SequentialAttentionSelector` takes.

    Attributes:
        inputs: Shape (rows, columns), float32.
        groups: The label of each column's group: a field's name, or `first x second`.
        costs: Cost per label.
    """

    inputs: NDArray[np.float32]
    groups: tuple[str, ...]
    costs: dict[Hashable, float]


def cross_candidates(
    fields: Mapping[str, Sequence[object]],
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    num_buckets: int = 32,
    costs: Mapping[str, float] | None = None,
) -> Candidates:
    """Every field and every pair of fields, hashed to buckets and one-hot.

    Hashes do not depend on the data or the process, so that training and test rows, each put
    through this function, get the same columns. Values are told apart by their text.

    Args:
        fields: Values of each categorical field, one per row; a missing one is a value too.
        pairs: The crosses that compete. Default: all.
        num_buckets: 0/1 columns of each field and of each cross.
        costs: What each field costs to have; a cross costs what its two do. Default: 1 each.

    Raises:
        InputError: Fields of unequal length, a name that is no field, or a number out of range.
    """
    lengths = {name: len(values) for name, values in fields.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"fields must have one value per row each, got lengths {lengths}")
    if num_buckets < 1:
        raise InputError(f"num_buckets must be at least 1, got {num_buckets}")
    pairs = list(itertools.combinations(fields, 2)) if pairs is None else list(pairs)
    prices = dict.fromkeys(fields, 1.0) if costs is None else dict(costs)
    unknown = sorted({name for pair in pairs for name in pair} - set(fields))
    unpriced = sorted(set(fields) - set(prices))
    if unknown or unpriced:
        raise InputError(
            f"pairs must name fields and costs must give each field's, got pairs with {unknown} "
            f"and no cost for {unpriced}; fields are {list(fields)}"
        )
    names = [(name,) for name in fields] + pairs
    blocks = [_one_hot([fields[name] for name in group], num_buckets) for group in names]
    labels = [" x ".join(group) for group in names]
    return Candidates(
        np.concatenate(blocks, axis=1),
        tuple(np.repeat(labels, num_buckets).tolist()),
        {
            label: sum(prices[name] for name in group)
            for label, group in zip(labels, names, strict=True)
        },
    )


def _one_hot(columns: Sequence[Sequence[object]], num_buckets: int) -> NDArray[np.float32]:
    """Shape (rows, num_buckets): 1 in the bucket of the row's values."""
    # the separator keeps ("ab", "c") and ("a", "bc") apart
    texts = ["\x1f".join(map(str, values)) for values in zip(*columns, strict=True)]
    buckets = [zlib.crc32(text.encode()) % num_buckets for text in texts]
    return np.eye(num_buckets, dtype=np.float32)[buckets]
