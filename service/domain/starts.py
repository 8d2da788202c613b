"""References in configurations to what a service knows by name: finished runs and data sets.

`run://RUN/model` is a run's model, `run://RUN/corpus` is its text. RUN is the id of the run, or its name if the name is
unambiguous for the caller. `dataset://NAME` is the newest data set of this name, and `dataset://NAME@sha256:HASH` the
one with this content. A stored configuration contains the id or the hash. Each time a driver starts, the references are
replaced by paths or URIs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import (
    Place,
    ReadsFrom,
    RunPart,
    is_reference,
    names_a_dataset,
    places,
    with_places,
    words,
)
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.hub import is_hub
from moedisco_ray.core.store.locations import Location, is_uri, joined, parent
from service.domain.datasets import HASH_PATTERN, NAME_PATTERN, hash_in, reference

DATASET: Literal["dataset"] = "dataset"
_RUN = re.compile(r"run://([^/?#%\x00-\x1f]{1,128})/([a-z]+)/?")
_DATASET = re.compile(rf"dataset://({NAME_PATTERN}(?:@sha256:{HASH_PATTERN})?)/?")


def references(config: RunConfig) -> Iterator[Place]:
    """The settings whose value refers to another run or to a data set."""
    return (place for place in places(config) if is_reference(place.value))


def parse(place: Place) -> tuple[str, RunPart | Literal["dataset"]]:
    """Split a setting's reference into the run (id or name) and its part (`model` or `corpus`).

    Of a data set, the first is its name with the hash if that is given (`NAME@sha256:HASH`), the second is `dataset`.

    Raises:
        ConfigError: The reference is malformed, or the setting cannot refer to that part.
    """
    asked = words(place.value)
    wanted = place.marker.run_part if isinstance(place.marker, ReadsFrom) else None
    if names_a_dataset(asked):
        match = _DATASET.fullmatch(asked)
        if wanted != "corpus":
            raise ConfigError(place.field, asked, "this setting cannot refer to a data set; name a path")
        if match is None:
            raise ConfigError(place.field, asked, "must read dataset://NAME or dataset://NAME@sha256:HASH")
        return match[1], DATASET
    if wanted is None:
        raise ConfigError(place.field, asked, "this setting cannot refer to another run; name a path")
    match = _RUN.fullmatch(asked)
    if match is None or match[2] != wanted:
        raise ConfigError(
            place.field, asked, f"must read run://RUN/{wanted}, with the id or the name of a finished run"
        )
    return match[1], wanted


def with_ids(config: RunConfig, ids: Mapping[str, str]) -> RunConfig:
    """The configuration with run names replaced by run ids, and data sets by their names and hashes.

    Args:
        config: Configuration as requested.
        ids: Ids of the runs, and `NAME@sha256:HASH` of the data sets, by the dotted path of the setting that refers to
            each.
    """

    def change(place: Place) -> str | Path:
        if place.field not in ids:
            return place.value
        part = parse(place)[1]
        found = ids[place.field]
        return type(place.value)(f"dataset://{found}" if part == DATASET else f"run://{found}/{part}")

    return with_places(config, change)


def by_content(config: RunConfig) -> RunConfig:
    """The configuration with data sets by their hashes alone: two names of the same text mean the same."""

    def change(place: Place) -> str | Path:
        digest = hash_in(str(place.value)) if names_a_dataset(place.value) else None
        return place.value if digest is None else f"dataset://{reference('text', digest)}"

    return with_places(config, change)


def located(
    config: RunConfig,
    location_of: Callable[[str], Location | None],
    documents_at: Callable[[Location], str],
    model_at: Callable[[Location], Location] = lambda location: joined(location, "model"),
) -> tuple[RunConfig, tuple[Location, ...]]:
    """The configuration with references replaced by paths or URIs, and the places that the driver may then read.

    These places include a model of the Hugging Face hub, which the driver downloads.

    Args:
        config: Configuration from `with_ids`.
        location_of: Returns the path or URI of a run directory by the run's id, or the folder of a data set by
            `NAME@sha256:HASH`; None for one that was deleted. References to those stay, and the driver refuses them.
        documents_at: Returns the glob of the documents of a run at a URI.
        model_at: Returns where the model of a run at a URI is read.
    """
    read: list[Location] = []

    def change(place: Place) -> str | Path:
        if isinstance(place.marker, ReadsFrom) and place.marker.hub and is_hub(place.value):
            read.append(place.value)
        if not is_reference(place.value):
            return place.value
        key, part = parse(place)
        location = location_of(key)
        if location is None:
            return place.value
        if part == DATASET:
            read.append(location)
            return str(location)
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
