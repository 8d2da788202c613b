"""Expand the configured sources into named inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moedisco_ray.core.config import CorpusSource, LocalInit, RunConfig, Source, tokenizer_directory, tokenizer_files
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.locations import is_uri
from moedisco_ray.core.store.read_roots import opened
from moedisco_ray.core.store.run_models import model_identity
from moedisco_ray.stages.corpus import embedded, files
from moedisco_ray.stages.corpus.documents import DOCUMENTS
from moedisco_ray.stages.corpus.row_map import RowMap
from moedisco_ray.stages.text.cutting import Limits


@dataclasses.dataclass(frozen=True)
class Input:
    """One named input of documents.

    Attributes:
        order: Position among all inputs. Among equal documents the one with the lowest order stays.
        field: Configuration path of the source; errors name it.
        name: Name in reports.
        settings: The configured source; for embedded text, a source that reads the file of one domain.
        limits: Limits on the length of documents.
        own: Whether the run itself wrote the files. Such files may be outside of the read roots.
        tokenizer: Directory of the tokenizer, if the source needs it (`Source.has_given_tokens`); else None.
    """

    order: int
    field: str
    name: str
    settings: Source
    limits: Limits
    own: bool = False
    tokenizer: Path | None = None

    def sized(self, size: int) -> Input:
        """A copy of the input, with the size of its text in bytes set in `limits.source_bytes`."""
        return dataclasses.replace(self, limits=dataclasses.replace(self.limits, source_bytes=size))


def expand_sources(
    sources: Sequence[Source],
    scratch: Path,
    limits: Limits,
    setting: str = "corpus.sources",
    unnamed: str = "source",
    *,
    owner: str | None = None,
    tokenizer: Path | None = None,
) -> tuple[Input, ...]:
    """Name every source, and replace the embedded source by one input per domain.

    A source without a name is called `<unnamed>-<i>`. `{path: embedded}` becomes one input per domain of text in the
    installed packages (`python`, `cpp`, `licences`, ...). An input has the weight of the embedded source and the
    domain's name, or `<name>-<domain>` if the embedded source has a name. Its text is written to `scratch` as JSON
    Lines and read like any other.

    Args:
        sources: Configured sources.
        scratch: Directory for embedded text; made when absent.
        limits: Limits on the length of documents.
        setting: Setting that lists the sources; errors name it.
        unnamed: Prefix of the names of sources without a name.
        owner: The data owner whose sources to expand; None: those without an owner.
        tokenizer: Directory of the tokenizer, for the sources that need it (`Source.has_given_tokens`).

    Raises:
        ConfigError: Two inputs have the same name.
    """
    inputs: list[Input] = []
    for i, source in enumerate(sources):
        if source.data_owner != owner:
            continue
        field = f"{setting}.{i}"
        if source.path == "embedded":
            prefix = "" if source.name is None else f"{source.name}-"
            for domain, path in embedded.write_embedded(scratch).items():
                name = prefix + domain
                written = CorpusSource(path=str(path), format="jsonl", weight=source.copies, map=source.map)
                inputs.append(Input(len(inputs), field, name, written, limits, own=True))
        else:
            needed = tokenizer if source.has_given_tokens else None
            inputs.append(Input(len(inputs), field, source.name or f"{unnamed}-{i}", source, limits, tokenizer=needed))
    names = [item.name for item in inputs]
    for item in inputs:
        if names.count(item.name) > 1:
            raise ConfigError(setting, item.name, "two sources have this name; name each once")
    return tuple(inputs)


def input_identity(config: RunConfig) -> dict[str, str]:
    """For each stage that reads files of the user, a digest of these files.

    It changes when their text may have changed.

    What a digest covers:

    - text files and the model to start from: names, sizes and modification times
    - embedded text: versions of the packages that contain it
    - functions that change or drop rows: contents of the files that define them
    - task files of the evaluation, and the tokenizer: contents of the files
    - in the corpus stage: also the schema in which the corpus is stored

    It does not cover the files of data owners, which only their nodes may see.

    Raises:
        CorpusError: A source cannot be listed.
        ConfigError: The run starts from a model without a tokenizer, and no tokenizer is configured; or a source's
            `map` cannot be imported.
    """
    evaluation = config.evaluation
    read = [*_identities("evaluation.sources", evaluation.sources), *(_contents(path) for path in evaluation.lm_eval)]
    directory = tokenizer_directory(config)
    tokenizer = [] if directory is None else [path.name + _contents(path) for path in tokenizer_files(directory)]
    text = [*map(str, DOCUMENTS), *_identities("corpus.sources", config.corpus.sources), *tokenizer]
    found = {"corpus": _digest(text), "evaluate": _digest(read)}
    if isinstance(config.model.init, LocalInit):
        init = config.model.init
        found["seed"] = _digest(
            [model_identity(init.setting, init.place)] if is_uri(init.place) else _listing(Path(init.place))
        )
    return found


def _identities(setting: str, sources: Sequence[Source]) -> Iterator[str]:
    for i, source in enumerate(sources):
        if source.data_owner is not None:
            continue
        if source.path == "embedded":
            yield embedded.identity()
        else:
            yield files.digest(files.list_files(f"{setting}.{i}", source).files)
        if source.map is not None:
            yield RowMap(f"{setting}.{i}", source.map).identity()


def _listing(place: Path) -> Iterator[str]:
    """Names, sizes and modification times of the files in a directory, or of one file."""
    for path in sorted(path for path in ([place] if place.is_file() else place.iterdir()) if path.is_file()):
        found = path.stat()
        yield json.dumps([path.name, found.st_size, found.st_mtime_ns])


def _contents(path: Path) -> str:
    with opened(path) as found:
        return hashlib.sha256(found.read_bytes()).hexdigest()


def _digest(identities: Iterable[str]) -> str:
    return hashlib.sha256("".join(identities).encode()).hexdigest()
