"""Which places a configuration may name: those under the roots that the operator set.

Settings that name places are marked in the configuration model (`ReadsFrom`, `WritesTo`); both functions walk the model.
`sandboxed` decides by the words of the configuration alone, and makes its paths absolute. `check_links` then follows the links on
the way to each place; links in folders are checked when files are opened (`moedisco_ray.core.read_roots`). Both come before
anything else looks at the files, so that an answer never shows what is elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, unquote

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import Place, ReadsFrom, names_a_run, places, with_places, words
from moedisco_ray.core.errors import ConfigError
from service.domain.run_paths import is_id
from service.domain.starts import parse, run_places

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
        storage: Absolute directories without links, and buckets, that may hold checkpoints; none: run directories only.
    """

    inputs: Sequence[str]
    outputs: Sequence[Path]
    storage: Sequence[str] = ()

    @property
    def directories(self) -> list[Path]:
        """The input roots that are directories."""
        return [Path(root) for root in self.inputs if "://" not in root]

    @property
    def buckets(self) -> list[str]:
        """The input roots that are in object stores."""
        return _buckets(self.inputs)


def sandboxed(config: RunConfig, roots: Roots) -> RunConfig:
    """The configuration with absolute paths, all of them under the roots.

    `output` becomes the root, or the directory under one, in which the run's own directory is to be made; it is in no run's
    directory, and no part of it below the root begins with a dot. Its default is the first output root. A relative path starts
    at the first root of its kind. `run://` stays: which runs a caller may read is not decided here.

    Raises:
        ConfigError: A path leads elsewhere or goes through `..`, or a URI is outside of the roots or sets more than a region.
    """
    return with_places(config, lambda place: _resolved(place, roots))


def check_links(config: RunConfig, roots: Roots) -> None:
    """Follow the links on the way to each place of a configuration that `sandboxed` returned, without looking into folders.

    Raises:
        ConfigError: A path is a link that leads out of the roots, or passes through one.
    """
    for place in places(config):
        path = str(place.value)
        if "://" in path or path == EMBEDDED or names_a_run(path):
            continue
        allowed = _directories(place, roots)
        base = _before_wildcard(path)
        real = Path(os.path.realpath(base))
        if not _within(real, allowed):
            raise ConfigError(place.field, path, f"{base} is a link that leads out of {_allowed(place, roots)}; name another place")
        if _holds_runs(place):
            _check_no_run(place.field, path, real, allowed)


def check_parts(config: RunConfig, directory_of: Callable[[str], Path | None]) -> None:
    """See that the parts of finished runs that a configuration names are in those runs' directories: drivers could make links.

    Args:
        config: With ids of runs.
        directory_of: The run directory of a run; None where it is gone.

    Raises:
        ConfigError: A part is a link.
    """
    for place in run_places(config):
        run_id, part = parse(place)
        directory = directory_of(run_id)
        if directory is not None and (directory / part).is_symlink():
            raise ConfigError(place.field, words(place.value), f"the run's {part} directory is a link; name another run")


def _resolved(place: Place, roots: Roots) -> str | Path:
    """Where a place is; an error if that is not allowed."""
    value = str(place.value)
    if names_a_run(place.value):
        parse(place)
        return place.value
    if isinstance(place.marker, ReadsFrom):
        if place.marker.uris and value == EMBEDDED:
            return value
        if place.marker.uris and _SCHEME.match(value):
            return _checked_uri(place, roots.buckets, roots)
    elif place.marker.what == "checkpoints":
        if not roots.storage:
            raise ConfigError(
                place.field, value, "this service keeps checkpoints in run directories; leave the setting out, or ask its operator "
                "for a storage root (`moedisco serve --storage-root`)")
        if _SCHEME.match(value):
            return _checked_uri(place, _buckets(roots.storage), roots)
    elif value == str(_DEFAULT_OUTPUT):
        return roots.outputs[0]
    path = _local(place, roots)
    return path if isinstance(place.value, Path) else str(path)


def _local(place: Place, roots: Roots) -> Path:
    field, path, directories = place.field, str(place.value), _directories(place, roots)
    _check_words(field, path)
    if _SCHEME.match(path):
        raise ConfigError(field, path, "must be a plain path, without a scheme")
    if not directories:
        raise ConfigError(field, path, f"this service has no directory for it, only buckets; it allows {_allowed(place, roots)}")
    absolute = directories[0] / path      # an absolute path replaces what it is joined to
    if not _within(absolute, directories):
        raise ConfigError(field, path, f"is outside of {_allowed(place, roots)}; {_remedy(place)}")
    if _holds_runs(place):
        _check_no_run(field, path, absolute, directories)
    return absolute


def _holds_runs(place: Place) -> bool:
    return not isinstance(place.marker, ReadsFrom) and place.marker.what == "runs"


def _check_no_run(field: str, path: str, directory: Path, roots: Sequence[Path]) -> None:
    """Refuse a directory that a run's driver may own or that housekeeping uses, whichever of the roots it is seen from."""
    for root in roots:
        for part in directory.relative_to(root).parts if directory.is_relative_to(root) else ():
            if part.startswith(".") or is_id(part.upper()):
                what = "begins with a dot" if part.startswith(".") else "is the name of a run's directory"
                raise ConfigError(field, path, f"{part!r} {what}; name another directory under an output root")


def _check_words(field: str, path: str) -> None:
    if not path or re.search(r"[\0\r\n]", path):
        raise ConfigError(field, path, "is no path; name a file or a folder without control characters")
    if path.startswith("~"):
        raise ConfigError(field, path, "the service has another home; write the directory out")
    if any(".." in PurePosixPath(form.replace("\\", "/")).parts for form in (path, unquote(path))):
        raise ConfigError(field, path, "must not go up with '..'; write the path out")


def _checked_uri(place: Place, buckets: Sequence[str], roots: Roots) -> str:
    field, uri = place.field, str(place.value)
    scheme, sign, rest = uri.partition("://")
    location, _, options = rest.partition("?")
    plain = unquote(location)
    if not sign or scheme not in {root.partition("://")[0] for root in buckets}:
        raise ConfigError(field, uri, f"has a scheme of none of {_allowed(place, roots)}; {_remedy(place)}")
    if {"..", "."} & set(plain.split("/")) or re.search(r"[#\\\0\r\n]", plain):
        raise ConfigError(field, uri, "must name its objects plainly, without '..', '#' or control characters")
    if not all(any(_under(f"{scheme}://{form}", root) for root in buckets) for form in (location, plain)):
        raise ConfigError(field, uri, f"is outside of {_allowed(place, roots)}; {_remedy(place)}")
    for option, _ in parse_qsl(options, keep_blank_values=True):
        if option not in HARMLESS_OPTIONS:
            raise ConfigError(field, uri, f"the option {option!r} may not be set here; leave it out")
    return uri


def _directories(place: Place, roots: Roots) -> Sequence[Path]:
    if isinstance(place.marker, ReadsFrom):
        return roots.directories
    return roots.outputs if place.marker.what == "runs" else [Path(root) for root in roots.storage if "://" not in root]


def _allowed(place: Place, roots: Roots) -> str:
    kind: str
    allowed: Sequence[str | Path]
    if not isinstance(place.marker, ReadsFrom):
        kind, allowed = ("output", roots.outputs) if place.marker.what == "runs" else ("storage", roots.storage)
    else:
        kind, allowed = "input", roots.inputs if place.marker.uris else roots.directories
    return f"the {kind} roots ({', '.join(map(str, allowed)) or 'none'})"


def _remedy(place: Place) -> str:
    kind = "input" if isinstance(place.marker, ReadsFrom) else {"runs": "output", "checkpoints": "storage"}[place.marker.what]
    return f"name a place in one of them, or have the operator add one (`moedisco serve --{kind}-root`)"


def _buckets(roots: Sequence[str]) -> list[str]:
    return [root for root in roots if "://" in root]


def _before_wildcard(path: str) -> Path:
    wildcard = _WILDCARD.search(path)
    return Path(path) if wildcard is None else Path(path[:wildcard.start()] + "_").parent


def _under(uri: str, root: str) -> bool:
    return uri == root or uri.startswith(root + "/")


def _within(path: Path, directories: Sequence[Path]) -> bool:
    return any(path.is_relative_to(directory) for directory in directories)
