"""References to finished runs in configurations: `run://RUN/model` is a run's model, `run://RUN/corpus` its text.

RUN is the id of the run, or its name if the name is unambiguous for the caller. A stored configuration contains the id; it is
replaced by a path each time a driver starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import Place, ReadsFrom, RunPart, names_a_run, places, with_places, words
from moedisco_ray.core.errors import ConfigError

_REFERENCE = re.compile(r"run://([^/?#%\x00-\x1f]{1,128})/([a-z]+)/?")


def run_places(config: RunConfig) -> Iterator[Place]:
    """The path settings of a configuration that refer to another run."""
    return (place for place in places(config) if names_a_run(place.value))


def parse(place: Place) -> tuple[str, RunPart]:
    """Split a setting's run reference into the run (id or name) and its part (`model` or `corpus`).

    Raises:
        ConfigError: The reference is malformed, or the setting cannot refer to that part.
    """
    asked = words(place.value)
    wanted = place.marker.run_part if isinstance(place.marker, ReadsFrom) else None
    if wanted is None:
        raise ConfigError(place.field, asked, "this setting cannot refer to another run; name a path")
    match = _REFERENCE.fullmatch(asked)
    if match is None or match[2] != wanted:
        raise ConfigError(place.field, asked, f"must read run://RUN/{wanted}, with the id or the name of a finished run")
    return match[1], wanted


def with_ids(config: RunConfig, ids: Mapping[str, str]) -> RunConfig:
    """The configuration with run names replaced by run ids.

    Args:
        config: Configuration as requested.
        ids: Ids of the runs, by the dotted path of the setting that refers to each.
    """
    def change(place: Place) -> str | Path:
        if place.field not in ids:
            return place.value
        return type(place.value)(f"run://{ids[place.field]}/{parse(place)[1]}")

    return with_places(config, change)


def located(config: RunConfig, directory_of: Callable[[str], Path | None]) -> tuple[RunConfig, tuple[Path, ...]]:
    """The configuration with run references replaced by paths, and the directories that they point to.

    Args:
        config: Configuration from `with_ids`.
        directory_of: Returns the run directory of a run, or None for a deleted run. References to deleted runs stay, and the
            driver refuses them.
    """
    read: list[Path] = []

    def change(place: Place) -> str | Path:
        if not names_a_run(place.value):
            return place.value
        run_id, part = parse(place)
        directory = directory_of(run_id)
        if directory is None:
            return place.value
        read.append(directory / part)
        # Read only the documents: the corpus directory also contains a tokenizer and packed tokens.
        return type(place.value)(directory / part / "*" / "*.parquet" if part == "corpus" else directory / part)

    return with_places(config, change), tuple(read)
