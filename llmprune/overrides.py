"""Overriding keys of a recipe: dotted.key=value."""

from __future__ import annotations

from typing import Any

import yaml

from llmprune.errors import InputError


def apply_override(data: dict[str, Any], override: str, *, option: str = "--set") -> None:
    """Set the key that `dotted.key=value` names, in place; the value is read as YAML.

    Args:
        data: The mapping to change.
        override: The pair.
        option: What begins an error message.

    Raises:
        InputError: It is no such pair, or the mapping has no such place.
    """
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise InputError(f"{option} takes dotted.key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{option} {key}: the value must be YAML, got {text!r}") from error
    *parents, last = key.split(".")
    place: Any = data
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = _inside(place, parent, f"{option} {key}")
    if isinstance(place, list):
        _inside(place, last, f"{option} {key}")
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"{option} {key}: the recipe holds {kind_of(place)} there, not a mapping")


def _inside(place: Any, name: str, where: str) -> Any:
    """What a mapping holds under a key, or a list at a position."""
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    raise InputError(f"{where}: there is no {name} in {kind_of(place)}")


def kind_of(value: Any) -> str:
    """What a YAML value is, in words."""
    return "nothing" if value is None else f"a {type(value).__name__}"
