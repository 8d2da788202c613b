"""Restricts the paths and functions of a configuration to those that the operator allows.

Settings that are paths or URIs are marked in the configuration model (`ReadsFrom`, `WritesTo`). `sandboxed` checks the
text of these settings and makes paths absolute. `check_links` then follows the symbolic links in each path; links
inside folders are checked when files are opened (`moedisco_ray.core.store.read_roots`). Both checks come before any
other access to the files, so that no response reveals what exists outside of the roots.

Some places are denied below every root: the service's own files, the roots that runs write to, hidden files and
folders. Files of finished runs are read by `run://` references alone, because these are checked against their owners.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, unquote

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import Place, ReadsFrom, WritesTo, is_reference, places, with_places, words
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.hub import HUB, is_hub
from moedisco_ray.core.store.locations import Location, is_uri
from moedisco_ray.core.store.read_roots import KERNEL, ReadRoots, hidden_part, is_within, uri_is_within
from service.domain.run_paths import is_id
from service.domain.starts import DATASET, parse, references

EMBEDDED = "embedded"
HARMLESS_OPTIONS = frozenset({"region", "anonymous"})
"""Query options that a bucket's URI may have, because they change neither the server nor the credentials."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_PLAIN = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")
"""Matches a folder name that needs no encoding in a URI and contains no wildcard."""
_WILDCARD = re.compile(r"[*?\[]")
_DEFAULT_OUTPUT = RunConfig.model_fields["output"].default


@dataclasses.dataclass(frozen=True)
class Roots:
    """Directories and buckets that runs may read and write.

    Attributes:
        inputs: Absolute directories without symbolic links, and URIs such as `s3://BUCKET/PREFIX`. Relative paths start
            at the first directory.
        outputs: Absolute directories without symbolic links, and URIs; the first is the default.
        storage: Absolute directories without symbolic links, and buckets, for checkpoints; empty allows run directories
            only.
        homes: Directories in which the service creates the folders of its own files of each run, the homes. The first
            directory has the homes of runs at URIs; runs may write to it only if it is an output too.
        private: Absolute files and directories of the service, such as its state directory, that no run reads or
            writes.
        functions: Functions that runs may call (`corpus.sources.*.map`), as MODULE:FUNCTION.
    """

    inputs: Sequence[str]
    outputs: Sequence[Location]
    storage: Sequence[str] = ()
    homes: Sequence[Path] = ()
    private: Sequence[Path] = ()
    functions: Sequence[str] = ()

    @property
    def directories(self) -> list[Path]:
        """Input roots that are directories."""
        return [Path(root) for root in self.inputs if "://" not in root]

    @property
    def buckets(self) -> list[str]:
        """Input roots that are buckets."""
        return _buckets(self.inputs)

    @property
    def denied(self) -> list[Location]:
        """Places that no run reads by a path or URI, also below an input root."""
        return [
            *self.private,
            *self.homes,
            *self.outputs,
            *(root if is_uri(root) else Path(root) for root in self.storage),
        ]

    def readable(self, *own: Location) -> ReadRoots:
        """What a run may read, with the places of its own, such as its home."""
        return ReadRoots(self.directories, own, self.denied)

    @property
    def output_buckets(self) -> list[str]:
        return [str(root) for root in self.outputs if is_uri(root)]


def sandboxed(config: RunConfig, roots: Roots) -> RunConfig:
    """The configuration with absolute paths, all of them under the roots.

    A relative path starts at the first root of its kind: input, output or storage. `output` becomes the directory in
    which the run's home is created. This directory is not inside a run's home, no part of its path below the root
    begins with a dot, and the default is the first output root. References to runs and data sets stay, because this
    function does not know which ones a caller may read.

    Raises:
        ConfigError: A path is outside of the roots or contains `..`, or a URI is outside of the roots or has
            query options other than `HARMLESS_OPTIONS`. Or a source's `map` is not among the allowed functions.
    """
    _check_functions(config, roots.functions)
    return with_places(config, lambda place: _resolved(place, roots))


def check_links(config: RunConfig, roots: Roots) -> None:
    """Check that no path in a configuration from `sandboxed` leads out of the roots through a symbolic link.

    Raises:
        ConfigError: A path leads out of the roots. Links inside folders are not checked here.
    """
    for place in places(config):
        path = str(place.value)
        if "://" in path or path == EMBEDDED or is_reference(path):
            continue
        allowed = _directories(place, roots)
        base = before_wildcard(path) if isinstance(place.marker, ReadsFrom) else path  # nothing is written to a glob
        real = Path(os.path.realpath(base))
        if not is_within(real, allowed):
            raise ConfigError(
                place.field, path, f"{base} is a link out of {_allowed(place, roots)}; choose another path"
            )
        _check_below(place, real, roots)


def check_parts(config: RunConfig, location_of: Callable[[str], Location | None]) -> None:
    """Check that no model or text of a finished run that a configuration uses is a symbolic link planted by a driver.

    Raises:
        ConfigError: A model or text is a symbolic link.
    """
    for place in references(config):
        run_id, part = parse(place)
        location = None if part == DATASET else location_of(run_id)
        if location is not None and not is_uri(location) and Path(location, part).is_symlink():
            raise ConfigError(
                place.field, words(place.value), f"the run's {part} directory is a link; name another run"
            )


def before_wildcard(path: str) -> str:
    """The folder above the first wildcard of an absolute path or a URI; without wildcards, the path itself."""
    wildcard = _WILDCARD.search(path)
    return path if wildcard is None else path[: wildcard.start()].rpartition("/")[0] or "/"


def check_roots(roots: Roots) -> None:
    """Refuse an input root below which nothing may be read, and a storage root with other files than checkpoints.

    Raises:
        ConfigError: An input root is inside a denied place, or a storage root is or contains a place of runs.
    """
    for storage in roots.storage:
        # STORAGE/RUN_ID is deleted when the run succeeds, and searched for after it was deleted, also with its files
        # kept.
        inside = next((place for place in (*roots.outputs, *roots.homes) if _contains(storage, str(place))), None)
        if inside is not None:
            raise ConfigError(
                "--storage-root",
                storage,
                f"contains the runs in {inside}, which would be deleted like checkpoints; name a place "
                "that holds checkpoints only",
            )
    denied = [*KERNEL, *(Path(each) for each in roots.denied if not is_uri(each))]
    for root in roots.inputs:
        if uri_is_within(root, _denied_uris(roots)) if is_uri(root) else is_within(Path(root), denied):
            raise ConfigError(
                "--input-root",
                root,
                "is in a directory of the service or its runs, which runs do not read by paths; "
                "name another directory, and finished runs as run://RUN/corpus or run://RUN/model",
            )


def _check_functions(config: RunConfig, allowed: Sequence[str]) -> None:
    """Refuse functions that the operator does not name.

    Even a function that a named module merely imports could run commands that are in a text's rows.
    """
    for section, sources in (("corpus", config.corpus.sources), ("evaluation", config.evaluation.sources)):
        for i, source in enumerate(sources):
            if source.map is not None and source.map not in allowed:
                raise ConfigError(
                    f"{section}.sources.{i}.map",
                    source.map,
                    f"is not among the functions that this service allows ({', '.join(allowed) or 'none'}); remove it, "
                    "or ask the operator to add it (`moedisco serve --map-function`)",
                )


def _resolved(place: Place, roots: Roots) -> str | Path:
    """The checked value of one setting, with paths made absolute."""
    value = str(place.value)
    if is_reference(place.value):
        parse(place)
        return place.value
    if isinstance(place.marker, ReadsFrom):
        if place.marker.uris and value == EMBEDDED:
            return value
        if (place.marker.uris and _SCHEME.match(value)) or (place.marker.hub and is_hub(value)):
            return _checked_uri(place, roots.buckets, roots)
    else:
        return _written(place, roots)
    path = _local(place, roots)
    return path if isinstance(place.value, Path) else str(path)


def _written(place: Place, roots: Roots) -> str | Path:
    value, runs = str(place.value), place.marker == WritesTo("runs")
    if runs and value == str(_DEFAULT_OUTPUT):
        return roots.outputs[0]
    if not runs and not roots.storage:
        raise ConfigError(
            place.field,
            value,
            "is not allowed: this service keeps checkpoints in run directories; remove the setting, "
            "or ask the operator for a storage root (`moedisco serve --storage-root`)",
        )
    if is_uri(value) or (not runs and _SCHEME.match(value)):
        return _checked_home(place, roots)
    path = _local(place, roots)
    return path if isinstance(place.value, Path) else str(path)


def _local(place: Place, roots: Roots) -> Path:
    field, path, directories = place.field, str(place.value), _directories(place, roots)
    _check_words(field, path)
    if _SCHEME.match(path):
        raise ConfigError(field, path, "must be a plain path, without a scheme")
    if not directories:
        raise ConfigError(field, path, _no_directory(place, roots))
    absolute = directories[0] / path  # if `path` is absolute, the result is `path`
    if not is_within(absolute, directories):
        raise ConfigError(field, path, f"is outside of {_allowed(place, roots)}; {_remedy(place, roots)}")
    _check_below(place, absolute, roots)
    return absolute


def _no_directory(place: Place, roots: Roots) -> str:
    if isinstance(place.marker, ReadsFrom) and not roots.inputs:
        embedded = f"use the built-in text ({EMBEDDED}), or " if place.marker.uris else ""
        return (
            f"cannot be read: this service reads no files of its machine; {embedded}ask the operator to allow a "
            "directory (`moedisco serve --input-root DIR`)"
        )
    return f"cannot be a directory, because this service allows only {_allowed(place, roots)}; {_remedy(place, roots)}"


def _check_below(place: Place, path: Path, roots: Roots) -> None:
    """Refuse a path below a root that is hidden, or denied whatever the roots are."""
    field, value = place.field, words(place.value)
    reads = isinstance(place.marker, ReadsFrom)
    above = sorted(
        (root for root in _directories(place, roots) if path.is_relative_to(root)), key=lambda root: -len(root.parts)
    )
    parts = [hidden_part(path, root) for root in above]
    if None not in parts:
        raise ConfigError(
            field,
            value,
            f"{parts[0]!r} is hidden, and runs use no hidden files or folders below a root; choose another path, or "
            f"ask the operator to name this folder itself (`{_option(place)}`)",
        )
    denied = [*KERNEL, *(Path(os.path.realpath(each)) for each in roots.denied if not is_uri(each))]
    if not reads:
        root = above[0]
        run = next((part for part in path.relative_to(root).parts if is_id(part.upper())), None)
        if run is not None:
            raise ConfigError(field, value, f"{run!r} is the name of a run's directory; name another directory")
        # A root may be a denied place itself, as each output root is.
        denied = [each for each in denied if each != root and each.is_relative_to(root)]
    if is_within(path, denied):
        runs = "name a finished run as run://RUN/corpus or run://RUN/model, or " if reads else ""
        raise ConfigError(field, value, f"is in a directory of the service or its runs; {runs}choose another path")


def _check_words(field: str, path: str) -> None:
    if not path or re.search(r"[\0\r\n]", path):
        raise ConfigError(field, path, "is not a path; name a file or a folder without control characters")
    if path.startswith("~"):
        raise ConfigError(field, path, "must not start with '~'; write the whole path")
    if any(".." in PurePosixPath(form.replace("\\", "/")).parts for form in (path, unquote(path))):
        raise ConfigError(field, path, "must not contain '..'; write the whole path")


def _checked_uri(place: Place, buckets: Sequence[str], roots: Roots) -> str:
    field, uri = place.field, str(place.value)
    scheme, sign, rest = uri.partition("://")
    location, _, options = rest.partition("?")
    plain = unquote(location)
    if not sign or scheme not in {root.partition("://")[0] for root in buckets}:
        raise ConfigError(
            field, uri, f"has a scheme that is not among {_allowed(place, roots)}; {_remedy(place, roots)}"
        )
    if {"..", "."} & set(plain.split("/")) or re.search(r"[#\\\0\r\n]", plain):
        raise ConfigError(field, uri, "must not contain '.' or '..' as a part, '#', '\\' or control characters")
    if not all(_under_any(f"{scheme}://{form}", buckets) for form in (location, plain)):
        raise ConfigError(field, uri, f"is outside of {_allowed(place, roots)}; {_remedy(place, roots)}")
    if isinstance(place.marker, ReadsFrom) and uri_is_within(uri, _denied_uris(roots)):
        raise ConfigError(
            field,
            uri,
            "is in a folder of the service's runs; name a finished run as run://RUN/corpus or run://RUN/model",
        )
    for option, _ in parse_qsl(options, keep_blank_values=True):
        if option not in HARMLESS_OPTIONS:
            raise ConfigError(field, uri, f"the option {option!r} is not allowed; remove it")
    return uri


def _checked_home(place: Place, roots: Roots) -> str:
    """Check the URI of a folder that runs write to: plain names as parts, and outside of other runs' folders."""
    buckets = roots.output_buckets if place.marker == WritesTo("runs") else _buckets(roots.storage)
    uri = _checked_uri(place, buckets, roots)
    location, _, options = uri.partition("?")
    if options and place.marker == WritesTo("runs"):
        raise ConfigError(place.field, uri, "must have no options; remove what follows '?'")
    root = max((root for root in buckets if _under(location, root)), key=len)
    below = location.removeprefix(root).rstrip("/").removeprefix("/")
    for part in below.split("/") if below else ():
        if _PLAIN.fullmatch(part) is None or is_id(part.upper()):
            what = "is the name of a run's folder" if is_id(part.upper()) else "is not of letters, digits and . _ = -"
            raise ConfigError(place.field, uri, f"{part!r} {what}; name another folder under {_allowed(place, roots)}")
    inner = [each for each in _denied_uris(roots) if _under(each, root) and each != root]
    if uri_is_within(uri, inner):
        raise ConfigError(place.field, uri, "is in a folder of the service or its runs; name another folder")
    return location.rstrip("/") + ("?" + options if options else "")


def _directories(place: Place, roots: Roots) -> Sequence[Path]:
    if isinstance(place.marker, ReadsFrom):
        return roots.directories
    return [
        Path(root) for root in (roots.outputs if place.marker.what == "runs" else roots.storage) if not is_uri(root)
    ]


def _allowed(place: Place, roots: Roots) -> str:
    return f"the {_kind(place)} roots ({', '.join(map(str, _allowed_roots(place, roots))) or 'none'})"


def _allowed_roots(place: Place, roots: Roots) -> Sequence[str | Path]:
    if not isinstance(place.marker, ReadsFrom):
        return roots.outputs if place.marker.what == "runs" else roots.storage
    return (
        roots.inputs
        if place.marker.uris
        else [root for root in roots.inputs if "://" not in root or (place.marker.hub and root.startswith(HUB))]
    )


def _remedy(place: Place, roots: Roots) -> str:
    other = "choose a path in one of them, or " if _allowed_roots(place, roots) else ""
    return f"{other}ask the operator to add one (`{_option(place)}`)"


def _option(place: Place) -> str:
    return f"moedisco serve --{_kind(place)}-root"


def _kind(place: Place) -> str:
    if isinstance(place.marker, ReadsFrom):
        return "input"
    return "output" if place.marker.what == "runs" else "storage"


def _contains(root: str, place: str) -> bool:
    if is_uri(root) or is_uri(place):
        return is_uri(root) and is_uri(place) and uri_is_within(place, [root])
    return Path(place).is_relative_to(root)


def _denied_uris(roots: Roots) -> list[str]:
    return [str(place) for place in roots.denied if is_uri(place)]


def _buckets(roots: Sequence[str]) -> list[str]:
    return [root for root in roots if "://" in root]


def _under_any(uri: str, roots: Sequence[str]) -> bool:
    return any(_under(uri, root) for root in roots)


def _under(uri: str, root: str) -> bool:
    return uri == root or uri.startswith(root + "/")
