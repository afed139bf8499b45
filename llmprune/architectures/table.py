"""The form of a family's table: for every weight axis, the space that it lives in.

An axis is written as the spaces it runs through, joined by `+` where a projection is fused:
`"query+key_value+key_value hidden"` is a fused qkv weight of shape
(query + key_value + key_value, hidden). Axes that share a space are cut together; `vocab`,
`position` and `head_dim` are never cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

Space = Literal["hidden", "query", "key_value", "mlp", "vocab", "position", "head_dim"]
Axis = tuple[Space, ...]


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a decoder layer; names are relative to the layer.

    Attributes:
        module: The branch itself.
        norm: The norm that reads the residual stream before it.
        write: The projection whose output is added to the residual stream; what it reads is the
            axis that heads or MLP channels live on.
    """

    module: str
    norm: str
    write: str


@dataclass(frozen=True)
class Architecture:
    """One family as data.

    Attributes:
        family: The transformers `model_type` whose class is written.
        layers: Path of the list of decoder layers.
        embeddings: Modules whose output starts the residual stream.
        attention: The attention sublayer.
        mlp: The MLP sublayer.
        final_norm: The norm before the head.
        head: The projection onto the vocabulary.
        model_weights: Full parameter name -> axes, for weights outside the layers.
        layer_weights: Parameter name relative to its layer -> axes. A parameter named here may be
            absent (biases); one that is not named is an error.
        norm_kind: `rms` (scale over all channels) or `layer` (mean and variance).
        config_names: Our name of a number -> the family's key in its config.
        qk_normed: Projections followed by an RMS norm of their own that shares the config's eps.
        head_dim_free: Whether the stock class takes a head_dim other than hidden_size / heads.
        stands_in: A family whose class computes the same function and accepts shapes that this
            family's config refuses, with the config keys that must be falsy for it.
        biased_as: A family whose stock class computes the same function with a bias on every
            projection that writes to the residual stream, with the config keys that must be falsy
            for it; None where no stock class does.
        bias_keys: The config keys of that family that switch its biases on.
    """

    family: str
    layers: str
    embeddings: tuple[str, ...]
    attention: Sublayer
    mlp: Sublayer
    final_norm: str
    head: str
    model_weights: Mapping[str, str]
    layer_weights: Mapping[str, str]
    norm_kind: Literal["rms", "layer"]
    config_names: Mapping[str, str]
    qk_normed: tuple[str, ...] = ()
    head_dim_free: bool = True
    stands_in: tuple[str, tuple[str, ...]] | None = None
    biased_as: tuple[str, tuple[str, ...]] | None = None
    bias_keys: tuple[str, ...] = ()
    norm_eps: str = field(default="rms_norm_eps")

    def config_key(self, name: str) -> str:
        """The family's config key for one of our numbers (itself where they agree)."""
        return self.config_names.get(name, name)


def parse_axes(axes: str) -> tuple[Axis, ...]:
    """Read `"query+key_value hidden"` as one tuple of spaces per dimension."""
    return tuple(cast(Axis, tuple(axis.split("+"))) for axis in axes.split())
