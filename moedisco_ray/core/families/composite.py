"""Models of several kinds of data, which hold a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Composite:
    """Models of several kinds of data that hold a model of a family or a dense relative.

    Its configuration is their `text_config`.

    Attributes:
        kinds: Their `model_type`, each with that of the model that it holds.
        prefix: What the names of the held model's tensors begin with there, instead of `model.`.
        others: What the names of all other tensors begin with, which are left out.
        ignored: Parameters of the rotary positions that change nothing in a text, and which the held model has not.
        values: Configuration values that the held model has there, whatever `text_config` says.
    """

    kinds: Mapping[str, str]
    prefix: str
    others: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def held(self, kind: str, text: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the held model's `config.json`.

        Args:
            kind: The `model_type` of the composite model.
            text: Its `text_config`.
        """
        values = {**text, **self.values, "model_type": self.kinds[kind]}
        for field in ("rope_scaling", "rope_parameters"):
            if isinstance(rope := values.get(field), Mapping):
                values[field] = {name: value for name, value in rope.items() if name not in self.ignored}
        return values

    def own_name(self, stored: str) -> str | None:
        """Name of a stored tensor in a model of the family alone; None: the tensor is not part of it."""
        if stored.startswith(self.others):
            return None
        return f"model.{stored.removeprefix(self.prefix)}" if stored.startswith(self.prefix) else stored
