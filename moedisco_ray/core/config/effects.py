"""Which settings a run's result depends on.

A setting counts as one that changes results unless its declaration has a marker, such as
`keep: Annotated[int, NoEffect("...")]`. A marker on a section applies to every setting in it without a marker of its
own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclasses.dataclass(frozen=True)
class NoEffect:
    """Marks a setting that changes when or where work happens, never the result; no stage's fingerprint includes it.

    Attributes:
        reason: Why results do not depend on the setting.
    """

    reason: str


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Marks a setting that decides another value; fingerprints include that value instead of the setting.

    Attributes:
        decides: Name of the decided value.
    """

    decides: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A setting that is compared as a whole.

    Attributes:
        path: Dotted path. A list of sections and a section that may be absent are one leaf each.
        marker: `NoEffect` or `Resolved` if the declaration of the setting, or of a section around it, says so. None
            means that results depend on the setting's value.
    """

    path: str
    marker: NoEffect | Resolved | None


def leaves(section: type[BaseModel], prefix: str = "", outer: NoEffect | Resolved | None = None) -> Iterator[Leaf]:
    """Every setting of a section, in the order of the schema.

    Args:
        section: The section's class.
        prefix: Dotted path of the section, with a trailing dot.
        outer: `NoEffect` or `Resolved` if the section itself is marked so; it holds for each setting without a marker
            of its own.
    """
    for name, info in section.model_fields.items():
        marker = _marker(info) or outer
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.", marker)
        else:
            yield Leaf(prefix + name, marker)


def _marker(info: FieldInfo) -> NoEffect | Resolved | None:
    return next((mark for mark in info.metadata if isinstance(mark, NoEffect | Resolved)), None)
