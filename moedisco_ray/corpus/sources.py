"""From configured sources to concrete inputs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moedisco_ray.config import RunConfig, Source
from moedisco_ray.corpus import embedded, files
from moedisco_ray.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Input:
    """One named source of documents, as the readers see it.

    Attributes:
        order: Its place among all inputs; of equal documents, the one with the lowest order stays.
        field: The configuration path of the source it comes from; errors name it.
        name: Its domain in reports.
        path: A file, folder, glob or URI.
        format: As `Source.format`.
        text_column: As `Source.text_column`.
        documents: As `Source.documents`.
        weight: As `Source.weight`.
    """

    order: int
    field: str
    name: str
    path: str
    format: str
    text_column: str
    documents: Literal["file", "paragraph", "line"]
    weight: float


def expand_sources(sources: Sequence[Source], scratch: Path) -> tuple[Input, ...]:
    """Name every source, and replace the embedded one by its domains.

    A source without a name is called `source-<i>`. `{path: embedded}` becomes one source per domain of the text that
    the installed packages carry (`python`, `cpp`, `licences`, ...), each with the weight of the embedded source, under
    the domain's name, or `<name>-<domain>` where the embedded source has a name. Their text is written to `scratch` as
    JSON Lines, and is then read like any other.

    Raises:
        ConfigError: Two inputs have the same name.
    """
    inputs: list[Input] = []
    for i, source in enumerate(sources):
        field = f"corpus.sources.{i}"
        if source.path == "embedded":
            prefix = "" if source.name is None else f"{source.name}-"
            for domain, path in embedded.write_embedded(scratch).items():
                name = prefix + domain
                inputs.append(Input(len(inputs), field, name, str(path), "jsonl", "text", "line", source.weight))
        else:
            inputs.append(Input(
                len(inputs), field, source.name or f"source-{i}", source.path, source.format, source.text_column,
                source.documents, source.weight))
    names = [item.name for item in inputs]
    for item in inputs:
        if names.count(item.name) > 1:
            raise ConfigError("corpus.sources", item.name, "two sources have this name; name each once")
    return tuple(inputs)


def input_identity(config: RunConfig) -> str:
    """A digest that changes when the text of a source may have changed.

    Of files it holds names, sizes and times of writing; of the embedded text, the versions of the packages that carry
    it.

    Raises:
        CorpusError: A source cannot be listed.
    """
    hashed = hashlib.sha256()
    for i, source in enumerate(config.corpus.sources):
        identity = (
            embedded.identity() if source.path == "embedded"
            else files.digest(files.list_files(f"corpus.sources.{i}", source.path, source.format)))
        hashed.update(identity.encode())
    return hashed.hexdigest()
