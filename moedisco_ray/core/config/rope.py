"""Scaling of rotary positions: the types that transformers computes, and their parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

DEFAULT = "default"
"""`rope_type` of a model without scaling."""

_LISTS = ("short_factor", "long_factor")


@dataclasses.dataclass(frozen=True)
class RopeType:
    """The parameters of one scaling type.

    Attributes:
        needed: Required parameters.
        optional: Optional parameters.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """Required and optional parameters."""
        return self.needed + self.optional


_ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES: Mapping[str, RopeType] = {
    "linear": RopeType(("factor",)),
    "dynamic": RopeType(("factor",)),
    "yarn": RopeType(
        ("factor",), (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": RopeType(_LISTS, (_ORIGINAL, "attention_factor", "factor", "short_mscale", "long_mscale")),
    "llama3": RopeType(("factor", "low_freq_factor", "high_freq_factor"), (_ORIGINAL,)),
    "proportional": RopeType((), ("partial_rotary_factor", "factor")),
}
"""Parameters of each known `rope_type`. If `original_max_position_embeddings` is missing, transformers uses the model's
longest sequence."""


def checked_scaling(raw: Mapping[str, Any], head_size: int | None) -> dict[str, Any] | None:
    """Check a scaling and return it as `rope_type` and its parameters.

    Args:
        raw: The scaling as written; older files have `type` instead of `rope_type`.
        head_size: Size of an attention head; None if unknown.

    Returns:
        The checked scaling; None if the type is `default`, which means no scaling.

    Raises:
        ValueError: The type is missing or unknown, or a parameter is missing, unknown, or has an invalid value.
    """
    values = {key: value for key, value in raw.items() if key != "type"}
    named = values.pop("rope_type", raw.get("type"))
    types = ", ".join(ROPE_TYPES)
    if named is None:
        raise ValueError(f"needs rope_type, one of {types}")
    if raw.get("type", named) != named:
        raise ValueError(f"names two types, rope_type {named!r} and type {raw['type']!r}; leave out type")
    if named == DEFAULT:
        if values:
            raise ValueError(f"{min(values)}: rope_type {DEFAULT!r} has no parameters; name another of {types}")
        return None
    rope = ROPE_TYPES.get(named) if isinstance(named, str) else None
    if rope is None:
        raise ValueError(f"rope_type {named!r} is not known; use one of {types}")
    missing = [key for key in rope.needed if values.get(key) is None]
    if missing:
        raise ValueError(f"rope_type {named!r} also needs {' and '.join(missing)}")
    for key, value in values.items():
        if key not in rope.known:
            raise ValueError(f"{key}: rope_type {named!r} has no such parameter; it has {', '.join(rope.known)}")
        _check_value(key, value, head_size)
    if named == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError("high_freq_factor must be above low_freq_factor")
    return {"rope_type": named, **values}


def read_scaling(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of a `config.json`, reduced to what transformers reads; unknown types are kept, and rejected later.

    Args:
        raw: `rope_scaling` or `rope_parameters` of the `config.json`.
    """
    named = raw.get("rope_type", raw.get("type", DEFAULT))
    if named == DEFAULT:
        return None
    rope = ROPE_TYPES.get(str(named), RopeType(()))
    return {"rope_type": named, **{key: raw[key] for key in raw if key in rope.known and raw[key] is not None}}


def _check_value(key: str, value: object, head_size: int | None) -> None:
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"truncate {value!r} must be true or false")
        return
    if key in _LISTS:
        if not isinstance(value, list | tuple) or not all(map(_is_positive, value)):
            raise ValueError(f"{key} must be a list of positive numbers")
        if head_size is not None and len(value) != head_size // 2:
            raise ValueError(f"{key} has {len(value)} numbers; a head of {head_size} needs {head_size // 2}")
        return
    least = 1.0 if key == "factor" else 0.0
    if not _is_positive(value) or float(value) < least:  # type: ignore[arg-type]
        raise ValueError(f"{key} {value!r} must be a number {'of at least 1' if least else 'above 0'}")
    if key == _ORIGINAL and not isinstance(value, int):
        raise ValueError(f"{key} {value!r} must be a whole number")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
