"""From configured sources to concrete inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moedisco_ray.core.config import LocalInit, RunConfig, Source, tokenizer_directory, tokenizer_files
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.read_roots import opened
from moedisco_ray.stages.corpus import embedded, files
from moedisco_ray.stages.corpus.documents import DOCUMENTS
from moedisco_ray.stages.text.cutting import Limits


@dataclasses.dataclass(frozen=True)
class Input:
    """One named source of documents, as the readers see it.

    Attributes:
        order: Its place among all inputs; of equal documents, the one with the lowest order stays.
        field: The configuration path of the source it comes from; errors name it.
        name: Its domain in reports.
        settings: The source, as configured; of embedded text, a source that reads the file it was written to.
        limits: How long its documents are.
        own: Whether its files are the run's own, which may be read wherever they are.
    """

    order: int
    field: str
    name: str
    settings: Source
    limits: Limits
    own: bool = False

    def sized(self, size: int) -> Input:
        """The same, of which it is known how many bytes of text it has."""
        return dataclasses.replace(self, limits=dataclasses.replace(self.limits, source_bytes=size))


def expand_sources(
    sources: Sequence[Source], scratch: Path, limits: Limits, setting: str = "corpus.sources", unnamed: str = "source",
) -> tuple[Input, ...]:
    """Name every source, and replace the embedded one by its domains.

    A source without a name is called `<unnamed>-<i>`. `{path: embedded}` becomes one source per domain of the text that
    the installed packages carry (`python`, `cpp`, `licences`, ...), each with the weight of the embedded source, under
    the domain's name, or `<name>-<domain>` where the embedded source has a name. Their text is written to `scratch` as
    JSON Lines, and is then read like any other.

    Args:
        sources: As configured.
        scratch: Where embedded text goes; made when absent.
        limits: How long documents are.
        setting: Where they are configured; errors name it.
        unnamed: What a source without a name is called.

    Raises:
        ConfigError: Two inputs have the same name.
    """
    inputs: list[Input] = []
    for i, source in enumerate(sources):
        field = f"{setting}.{i}"
        if source.path == "embedded":
            prefix = "" if source.name is None else f"{source.name}-"
            for domain, path in embedded.write_embedded(scratch).items():
                name = prefix + domain
                written = Source(path=str(path), format="jsonl", weight=source.weight)
                inputs.append(Input(len(inputs), field, name, written, limits, own=True))
        else:
            inputs.append(Input(len(inputs), field, source.name or f"{unnamed}-{i}", source, limits))
    names = [item.name for item in inputs]
    for item in inputs:
        if names.count(item.name) > 1:
            raise ConfigError(setting, item.name, "two sources have this name; name each once")
    return tuple(inputs)


def input_identity(config: RunConfig) -> dict[str, str]:
    """Per stage that reads the user's files, a digest that changes when their text may have changed, or how it is stored.

    Of files it holds names, sizes and times of writing; of the embedded text, the versions of the packages that carry
    it; of the evaluation's task files, what is in them; of a model to start from, names, sizes and times of its files; of a
    tokenizer, what is in its files.

    Raises:
        CorpusError: A source cannot be listed.
        ConfigError: The run starts from a model without a tokenizer, and names none either.
    """
    evaluation = config.evaluation
    read = [*_identities("evaluation.sources", evaluation.sources), *(_contents(path) for path in evaluation.lm_eval)]
    directory = tokenizer_directory(config)
    tokenizer = [] if directory is None else [path.name + _contents(path) for path in tokenizer_files(directory)]
    text = [*map(str, DOCUMENTS), *_identities("corpus.sources", config.corpus.sources), *tokenizer]
    found = {"corpus": _digest(text), "evaluate": _digest(read)}
    if isinstance(config.model.init, LocalInit):
        found["seed"] = _digest(_listing(config.model.init.directory))
    return found


def _identities(setting: str, sources: Sequence[Source]) -> Iterator[str]:
    for i, source in enumerate(sources):
        if source.path == "embedded":
            yield embedded.identity()
        else:
            yield files.digest(files.list_files(f"{setting}.{i}", source).files)


def _listing(directory: Path) -> Iterator[str]:
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        found = path.stat()
        yield json.dumps([path.name, found.st_size, found.st_mtime_ns])


def _contents(path: Path) -> str:
    with opened(path) as found:
        return hashlib.sha256(found.read_bytes()).hexdigest()


def _digest(identities: Iterable[str]) -> str:
    return hashlib.sha256("".join(identities).encode()).hexdigest()
