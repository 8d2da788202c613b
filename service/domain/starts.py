"""References to finished runs in configurations: `run://RUN/model` is a run's model, `run://RUN/corpus` is its text.

RUN is the id of the run, or its name if the name is unambiguous for the caller. A stored configuration contains the id.
Each time a driver starts, the references are replaced by paths or URIs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import Place, ReadsFrom, RunPart, names_a_run, places, with_places, words
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.hub import is_hub
from moedisco_ray.core.store.locations import Location, is_uri, joined, parent

_REFERENCE = re.compile(r"run://([^/?#%\x00-\x1f]{1,128})/([a-z]+)/?")


def run_places(config: RunConfig) -> Iterator[Place]:
    """The path settings whose value refers to another run."""
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
        raise ConfigError(
            place.field, asked, f"must read run://RUN/{wanted}, with the id or the name of a finished run"
        )
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


def located(
    config: RunConfig,
    location_of: Callable[[str], Location | None],
    documents_at: Callable[[Location], str],
    model_at: Callable[[Location], Location] = lambda location: joined(location, "model"),
) -> tuple[RunConfig, tuple[Location, ...]]:
    """The configuration with run references replaced by paths or URIs, and the places that the driver may then read.

    These places include a model of the Hugging Face hub, which the driver downloads.

    Args:
        config: Configuration from `with_ids`.
        location_of: Returns the path or URI of a run directory, or None for a deleted run. References to deleted runs
            stay, and the driver refuses them.
        documents_at: Returns the glob of the documents of a run at a URI.
        model_at: Returns where the model of a run at a URI is read.
    """
    read: list[Location] = []

    def change(place: Place) -> str | Path:
        if isinstance(place.marker, ReadsFrom) and place.marker.hub and is_hub(place.value):
            read.append(place.value)
        if not names_a_run(place.value):
            return place.value
        run_id, part = parse(place)
        location = location_of(run_id)
        if location is None:
            return place.value
        if is_uri(location):
            if part == "corpus":
                documents = documents_at(location)
                read.append(parent(parent(documents)[0])[0])
                return documents
            read.append(model_at(location))
            return read[-1]
        directory = Path(location)
        read.append(directory / part)
        # Read only the documents: the corpus directory also contains a tokenizer and packed tokens.
        return str(directory / part / "*" / "*.parquet") if part == "corpus" else directory / part

    return with_places(config, change), tuple(read)
