"""Which files a configuration may name: those under the roots that the operator set.

`confined` decides by the words of the configuration alone, and makes its paths absolute. `check_links` then asks the
disk whether a link leads out of the roots. Both come before anything else looks at the files, so that an answer never
tells what lies elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote

from moedisco_ray.config import LocalInit, RunConfig, Source
from moedisco_ray.errors import ConfigError

EMBEDDED = "embedded"
HARMLESS_OPTIONS = frozenset({"region", "anonymous"})
"""Options of a bucket's URI that change neither the server asked nor the secrets used."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_WILDCARD = re.compile(r"[*?\[]")
_DEFAULT_OUTPUT = RunConfig.model_fields["output"].default


@dataclasses.dataclass(frozen=True)
class Roots:
    """Where runs may read and write.

    Attributes:
        inputs: Absolute directories without links, and `s3://BUCKET/PREFIX` and the like. Relative paths start at the
            first directory.
        outputs: Absolute directories without links; the first is the default.
    """

    inputs: Sequence[str]
    outputs: Sequence[Path]

    @property
    def directories(self) -> list[Path]:
        """The input roots that are directories."""
        return [Path(root) for root in self.inputs if "://" not in root]

    @property
    def buckets(self) -> list[str]:
        """The input roots that are in object stores."""
        return [root for root in self.inputs if "://" in root]


def confined(config: RunConfig, roots: Roots) -> RunConfig:
    """The configuration with absolute paths, all of them under the roots.

    `output` becomes the root, or the directory under one, that the run's own directory is to be made in: the default is
    the first output root, and a relative path lies under it.

    Raises:
        ConfigError: A path leads elsewhere, goes through `..`, or is a URI that nobody configured.
    """
    changes: dict[str, Any] = {
        "corpus": config.corpus.model_copy(update={"sources": _sources("corpus.sources", config.corpus.sources, roots)}),
        "evaluation": config.evaluation.model_copy(update={
            "sources": _sources("evaluation.sources", config.evaluation.sources, roots),
            "lm_eval": tuple(
                _local(f"evaluation.lm_eval.{i}", str(path), roots) for i, path in enumerate(config.evaluation.lm_eval))}),
        "output": _output(config.output, roots)}
    if config.tokenizer.path is not None:
        path = _local("tokenizer.path", str(config.tokenizer.path), roots)
        changes["tokenizer"] = config.tokenizer.model_copy(update={"path": path})
    init = config.model.init
    if isinstance(init, LocalInit):
        path = _local(init.setting, str(init.directory), roots)
        changes["model"] = config.model.model_copy(update={"init": init.moved(path)})
    return config.model_copy(update=changes)


def check_links(config: RunConfig, roots: Roots) -> None:
    """Follow the links of a configuration that `confined` returned.

    Raises:
        ConfigError: A path, or a link in a folder that would be read, leads out of the roots.
    """
    for setting, sources in (("corpus.sources", config.corpus.sources), ("evaluation.sources", config.evaluation.sources)):
        for i, source in enumerate(sources):
            if source.path != EMBEDDED and "://" not in source.path:
                _check_tree(f"{setting}.{i}.path", source.path, roots.directories)
    for i, path in enumerate(config.evaluation.lm_eval):
        _check_tree(f"evaluation.lm_eval.{i}", str(path), roots.directories)
    if config.tokenizer.path is not None:
        _check_tree("tokenizer.path", str(config.tokenizer.path), roots.directories)
    if isinstance(config.model.init, LocalInit):
        _check_tree(config.model.init.setting, str(config.model.init.directory), roots.directories)
    if not _within(config.output.resolve(), roots.outputs):
        raise _outside("output", str(config.output), roots.outputs)


def _sources(setting: str, sources: Sequence[Source], roots: Roots) -> tuple[Source, ...]:
    return tuple(_source(f"{setting}.{i}.path", source, roots) for i, source in enumerate(sources))


def _source(field: str, source: Source, roots: Roots) -> Source:
    if source.path == EMBEDDED:
        return source
    if _SCHEME.match(source.path):
        _check_uri(field, source.path, roots)
        return source
    return source.model_copy(update={"path": str(_local(field, source.path, roots))})


def _local(field: str, path: str, roots: Roots) -> Path:
    _check_words(field, path)
    if _SCHEME.match(path):
        raise ConfigError(field, path, "must be a plain path, without a scheme")
    if not roots.directories:
        raise ConfigError(field, path, "this service reads from buckets only; name one of its input roots")
    absolute = roots.directories[0] / path      # an absolute path replaces what it is joined to
    if not _within(absolute, roots.directories):
        raise _outside(field, path, roots.directories)
    return absolute


def _output(output: Path, roots: Roots) -> Path:
    if output == _DEFAULT_OUTPUT:
        return roots.outputs[0]
    _check_words("output", str(output))
    absolute = roots.outputs[0] / output
    if not _within(absolute, roots.outputs):
        raise _outside("output", str(output), roots.outputs)
    return absolute


def _check_words(field: str, path: str) -> None:
    if not path or "\0" in path or "\n" in path:
        raise ConfigError(field, path, "is no path")
    if path.startswith("~"):
        raise ConfigError(field, path, "write the directory out; the service has another home")
    if ".." in PurePosixPath(path.replace("\\", "/")).parts:
        raise ConfigError(field, path, "must not go up with '..'")


def _check_uri(field: str, uri: str, roots: Roots) -> None:
    scheme, sign, rest = uri.partition("://")
    place, _, options = rest.partition("?")
    plain = unquote(place)
    if not sign or scheme not in {root.partition("://")[0] for root in roots.buckets}:
        allowed = ", ".join(roots.buckets) or "none"
        raise ConfigError(field, uri, f"no input root has this scheme; buckets that may be read: {allowed}")
    if {"..", "."} & set(plain.split("/")) or "#" in plain or "\0" in plain or "\\" in plain:
        raise ConfigError(field, uri, "must name its objects plainly, without '..' or '#'")
    if not all(any(_under(f"{scheme}://{form}", root) for root in roots.buckets) for form in (place, plain)):
        raise ConfigError(field, uri, f"lies outside of the input roots; allowed: {', '.join(roots.buckets)}")
    for option, _ in parse_qsl(options, keep_blank_values=True):
        if option not in HARMLESS_OPTIONS:
            raise ConfigError(field, uri, f"the option {option!r} may not be set here; leave it out")


def _under(uri: str, root: str) -> bool:
    return uri == root or uri.startswith(root + "/")


def _check_tree(field: str, path: str, directories: Sequence[Path]) -> None:
    wildcard = _WILDCARD.search(path)
    base = Path(path) if wildcard is None else Path(path[:wildcard.start()] + "_").parent
    for place in itertools.chain((base,), _links(base)):
        if not _within(place.resolve(), directories):
            raise ConfigError(field, path, f"{place} is a link that leads out of the input roots")


def _links(base: Path) -> Iterator[Path]:
    """Links below a folder, without those that no reader of the corpus follows: what begins with a dot is passed over."""
    for folder, folders, files in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in itertools.chain(folders, files):
            place = Path(folder, name)
            if not name.startswith(".") and place.is_symlink():
                yield place


def _within(path: Path, directories: Sequence[Path]) -> bool:
    return any(path.is_relative_to(directory) for directory in directories)


def _outside(field: str, path: str, directories: Sequence[Path]) -> ConfigError:
    return ConfigError(field, path, f"lies outside of what this service may use: {', '.join(map(str, directories))}")
