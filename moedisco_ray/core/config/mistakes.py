"""Turns pydantic's validation errors into one line per setting: field, value, remedy."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.renamed import remedy_of
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError

_INITS = tuple(init.__name__ for init in LocalInit.__subclasses__())
_MOST_SEEN, _MOST_GROUPED, _MOST_SHOWN = 1000, 200, 20
"""Most mistakes to look at, to compare and to show, so that the time of an answer is bounded."""
_LONGEST_SHOWN, _MOST_ENTRIES_SHOWN = 300, 16
"""Maximum characters of a text, and entries of a list, that a message repeats."""
_FORMS = {
    "corpus.sources": "must be a list, such as [{path: my.txt}]",
    "evaluation.sources": "must be a list, such as [{path: my.txt}]",
    "model.init": "must be random, {checkpoint: MODEL} or {upcycle: MODEL}",
}
"""What is expected where users write a text instead of a list or a section."""
_TAGS = frozenset(
    {"Architecture", "int", "constrained-int", "constrained-str", "literal['random']", "literal['auto']", "[key]"}
)
"""What pydantic adds to the place of a mistake: the member of a union, or that the name of an entry is meant."""


def first_mistake(found: Sequence[Mapping[str, Any]]) -> ConfigError:
    """The mistake to show to a user first, as field, value and remedy; `others` has those of up to 20 other settings.

    Args:
        found: `ValidationError.errors()`, at least one.
    """
    found = found[:_MOST_SEEN]
    first = _meant(found)
    settings: list[list[Mapping[str, Any]]] = []
    for each in found[:_MOST_GROUPED]:
        # The members of a union report mistakes at one setting, and at what is in it.
        same = next((group for group in settings if _is_within(_setting(each), _setting(group[0]))), None)
        settings.append([each]) if same is None else same.append(each)
    shown = _shown(first)
    shown.others = tuple(_shown(_meant(group)) for group in settings[:_MOST_SHOWN] if first not in group)
    return shown


def _meant(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    # A union reports the mistakes of every member. The user most likely meant the member with the fewest
    # mistakes, then the one with the longest path, then one that breaks a rule of ours.
    section = Counter(_section(mistake) for mistake in found)
    fewest = min((count for name, count in section.items() if name is not None), default=0)
    meant = [mistake for mistake in found if _section(mistake) is None or section[_section(mistake)] == fewest]
    unknown = [m for m in meant if m["type"] == "extra_forbidden"]
    return unknown[0] if unknown else max(meant, key=lambda m: (len(m["loc"]), m["type"] == "value_error"))


def _shown(mistake: Mapping[str, Any]) -> ConfigError:
    parts = _parts(mistake["loc"])
    field = ".".join(parts)
    if mistake["type"] == "extra_forbidden":
        hint = remedy_of(field, mistake["input"])  # a name of an earlier version is no slip
        if hint is None:
            close = difflib.get_close_matches(parts[-1], _known_keys(parts[:-1]), n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it; `moedisco schema` lists every setting"
        return ConfigError(field, None, f"no such setting; {hint}")
    if mistake["type"] == "missing":
        return ConfigError(field, None, "is missing; `moedisco init` writes a configuration with every setting")
    message = _FORMS.get(field) if isinstance(mistake["input"], str) else None
    message = message or plain_words(mistake)
    if not field:  # a rule across sections: its message begins with the field
        field, _, message = message.partition(" ")
        return ConfigError(field, None, message)
    if isinstance(mistake["input"], (dict, BaseModel)):
        return ConfigError(field, None, message)
    return ConfigError(field, _shortened(mistake["input"]), message)


def _shortened(value: Any) -> Any:
    """The value as a message shows it; None for a list that is too long to be shown."""
    if isinstance(value, str) and len(value) > _LONGEST_SHOWN:
        return f"{value[:_LONGEST_SHOWN]}..."
    return None if isinstance(value, list | tuple) and len(value) > _MOST_ENTRIES_SHOWN else value


def _parts(place: Sequence[object]) -> list[str]:
    """The keys in a mistake's place, without pydantic's tags."""
    return [
        str(part)
        for part in place
        if str(part) not in _TAGS and not str(part).startswith(("literal[", "tuple[")) and _init_in(part) is None
    ]


def _setting(mistake: Mapping[str, Any]) -> list[str]:
    """The keys of a mistake's setting; whatever is wrong in `model.init` is one setting."""
    place = mistake["loc"]
    return _parts(place[: next((i for i, part in enumerate(place) if _init_in(part) is not None), len(place))])


def _is_within(one: list[str], other: list[str]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _section(mistake: Mapping[str, Any]) -> str | None:
    return next((name for name in map(_init_in, mistake["loc"]) if name is not None), None)


def _init_in(part: object) -> str | None:
    # pydantic tags a section by its name or by `function-after[check(), Name]`.
    return next((name for name in _INITS if name in str(part)), None)


@functools.cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _known_keys(path: list[str]) -> list[str]:
    schema = _schema()
    nodes: list[dict[str, Any]] = [schema]
    for part in path:
        found = [
            node.get("items", {}) if part.isdigit() else node.get("properties", {}).get(part, {}) for node in nodes
        ]
        options = [option for node in found for option in (node, *node.get("anyOf", []))]
        nodes = [schema["$defs"][option["$ref"].rsplit("/", 1)[-1]] for option in options if "$ref" in option] or found
    return [key for node in nodes for key in node.get("properties", {})]
