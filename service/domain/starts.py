"""A finished run as the start of another: `run://RUN/model` is its model, `run://RUN/corpus` its text.

RUN is the run's id, or its name where that is unambiguous for the caller. A stored configuration has the id; where that is on disk
is found again whenever a driver is started.
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
    """The places of a configuration that name a run."""
    return (place for place in places(config) if names_a_run(place.value))


def parse(place: Place) -> tuple[str, RunPart]:
    """The run, by id or name, and the part of it that a place names.

    Raises:
        ConfigError: It reads otherwise, or the setting takes no such part.
    """
    asked = words(place.value)
    wanted = place.marker.run_part if isinstance(place.marker, ReadsFrom) else None
    if wanted is None:
        raise ConfigError(place.field, asked, "no part of another run can stand here; name a path")
    match = _REFERENCE.fullmatch(asked)
    if match is None or match[2] != wanted:
        raise ConfigError(place.field, asked, f"must read run://RUN/{wanted}, with the id or the name of a finished run")
    return match[1], wanted


def with_ids(config: RunConfig, ids: Mapping[str, str]) -> RunConfig:
    """The configuration with ids in place of names of runs.

    Args:
        config: As asked for.
        ids: The run's id, by the field that names it.
    """
    def change(place: Place) -> str | Path:
        if place.field not in ids:
            return place.value
        return type(place.value)(f"run://{ids[place.field]}/{parse(place)[1]}")

    return with_places(config, change)


def located(config: RunConfig, directory_of: Callable[[str], Path | None]) -> tuple[RunConfig, tuple[Path, ...]]:
    """The configuration with paths in place of runs, and the directories that it thereby reads.

    Args:
        config: As `with_ids` returned it.
        directory_of: The run directory of a run; None where it is gone. Its words then stay, and the driver refuses them.
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
        # The corpus artifact's documents, training and validation text alike; it holds a tokenizer and packed tokens too.
        return type(place.value)(directory / part / "*" / "*.parquet" if part == "corpus" else directory / part)

    return with_places(config, change), tuple(read)
