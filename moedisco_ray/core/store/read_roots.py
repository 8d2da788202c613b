"""Confines the files that this process opens for a configuration to directories that an operator allows.

The control service checks the paths of a configuration when it is submitted. Files and symbolic links may change
afterwards, so the opened file is checked again: `opened` opens a path, asks the kernel which file that is, and yields a
path to exactly this file. Without roots, as on a user's own machine, everything may be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import unquote

from moedisco_ray.core.store.hub import private_places
from moedisco_ray.core.store.locations import Location, cache_directory, is_uri, local_copies, settings_directory

ENVIRONMENT = "MOEDISCO_READ_ROOTS"
"""Environment variable: the JSON of `ReadRoots`. The control service sets it for a driver, and Ray passes it to the
workers."""

KERNEL = (Path("/proc"), Path("/sys"))
"""Directories in which the kernel shows processes and devices as files: their environment holds tokens."""
_MOUNTED_SECRETS = (Path("/dev"), Path("/run"))
"""Directories with devices, sockets, shared memory and the secrets of containers. They are read only if a root is
inside them."""
_RAY = Path("/tmp/ray")  # noqa: S108  # the constant of Ray
"""Default directory of Ray's logs, which quote the output of all drivers."""
_SAME_SCHEME = {"gcs": "gs", "abfss": "abfs"}
_OPENED = Path("/proc/self/fd")
_DELETED = " (deleted)"


@dataclasses.dataclass(frozen=True)
class ReadRoots:
    """Places that a run may read, and places below them that it may not.

    Attributes:
        roots: Directories that the operator allows. Below them, hidden files and `denied` places are not read.
        own: Places that belong to the run, also if they are hidden or denied for others: its home, and the models and
            texts that it starts from. The URI of a run, or of a part of one, also stands for its copy on this machine.
        denied: Directories, files and URIs that are read only if they are among `own`.
    """

    roots: Sequence[Location] = ()
    own: Sequence[Location] = ()
    denied: Sequence[Location] = ()

    def to_json(self) -> str:
        """The roots as the text of `ENVIRONMENT`."""
        names = [field.name for field in dataclasses.fields(self)]
        return json.dumps({name: list(map(str, getattr(self, name))) for name in names})


@dataclasses.dataclass(frozen=True)
class Confinement:
    """`ReadRoots` with symbolic links resolved; it is valid until a root or a denied place is replaced."""

    roots: tuple[Path, ...]
    own: tuple[Path, ...]
    denied: tuple[Path, ...]
    own_uris: tuple[str, ...]
    denied_uris: tuple[str, ...]

    def allows(self, real: Path) -> bool:
        """Whether a path without symbolic links may be read."""
        return is_within(real, self.own) or (
            not self.denies(real)
            and any(real.is_relative_to(root) and hidden_part(real, root) is None for root in self.roots)
        )

    def check(self, path: Path) -> None:
        """Refuse a path that may not be read, with symbolic links resolved.

        Raises:
            OSError: The path may not be read.
        """
        if not self.allows(Path(os.path.realpath(path))):
            raise _outside(path)

    def denies(self, real: Path) -> bool:
        """Whether a path without symbolic links is in a denied place."""
        return is_within(real, self.denied)

    def allows_uri(self, uri: str) -> bool:
        """Whether a URI is outside of the denied places. The control service has checked that it is under a root."""
        return uri_is_within(uri, self.own_uris) or not uri_is_within(uri, self.denied_uris)


_WITHIN: ContextVar[ReadRoots | None] = ContextVar("read_roots", default=None)


@contextlib.contextmanager
def reading_within(roots: ReadRoots) -> Iterator[None]:
    """Confine reading to some places until the block ends, in this thread or task only."""
    token = _WITHIN.set(roots)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def confinement() -> Confinement | None:
    """The places that this process may read; None if it may read everything."""
    within = _WITHIN.get()
    if within is None:
        named = os.environ.get(ENVIRONMENT)
        if named is None:
            return None
        within = ReadRoots(**json.loads(named))
    roots = [Path(root) for root in within.roots if not is_uri(root)]
    # Other runs have working copies in the cache.
    denied = [
        *KERNEL,
        _RAY,
        cache_directory(),
        settings_directory(),
        *private_places(roots),
        *(place for place in within.denied if not is_uri(place)),
    ]
    return Confinement(
        roots=_resolved(iter(roots)),
        own=_resolved(copy for place in within.own for copy in local_copies(place)),
        denied=_resolved(map(Path, denied)),
        own_uris=tuple(str(place) for place in within.own if is_uri(place)),
        denied_uris=tuple(str(place) for place in within.denied if is_uri(place)),
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Open a file inside the read roots, and yield a path to this very file, even if it is renamed or replaced later.

    The path is valid until the block ends; a file that was opened through it stays readable.

    Raises:
        OSError: The file cannot be opened, is no regular file, or may not be read.
    """
    confined = confinement()
    if confined is None:
        yield path
        return
    confined.check(path)  # check before opening, because opening a device may have side effects
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = _OPENED / str(descriptor)
        real = Path(str(found.readlink()).removesuffix(_DELETED) if _OPENED.is_dir() else os.path.realpath(path))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not confined.allows(real):
            raise _outside(path)
        yield found if _OPENED.is_dir() else real
    finally:
        os.close(descriptor)


def check_inside(path: Path) -> None:
    """Refuse a path that currently leads out of the read roots, or to a place that is hidden or denied.

    Raises:
        OSError: The path may not be read.
    """
    confined = confinement()
    if confined is not None:
        confined.check(path)


def check_folder(directory: Path) -> None:
    """Refuse a folder if it, or a symbolic link or special file anywhere below it, may not be read.

    Use it before a library opens the files itself, without the checks of `opened`. Entries of `is_passed_over` are not
    looked at.

    Raises:
        OSError: The folder or an entry may not be read, or the folder cannot be listed.
    """
    confined = confinement()
    if confined is None:
        return
    confined.check(directory)
    for path in _checked_entries(directory, confined):
        if path.is_dir():
            _checked_entries(path, confined)


def is_passed_over(path: Path, folder: Path, confined: Confinement) -> bool:
    """Whether a listing leaves out a folder's entry: it is hidden, or it is itself a denied place, not a link to one.

    Args:
        path: The entry.
        folder: The folder that lists it, without symbolic links.
        confined: The places that may be read.
    """
    if path.name.startswith("."):
        return True
    return confined.denies(folder / path.name) and not confined.denies(folder) and not path.is_symlink()


def hidden_part(path: Path, root: Path) -> str | None:
    """The part of a path below a root that hides it: a name with a leading dot, or a mount of devices or secrets."""
    for mounted in _MOUNTED_SECRETS:
        if path.is_relative_to(mounted) and root != mounted and mounted.is_relative_to(root):
            return str(mounted)
    return next((part for part in path.relative_to(root).parts if part.startswith(".")), None)


def is_within(path: Path, directories: Sequence[Path]) -> bool:
    """Whether a path is one of some directories, or below one."""
    return any(path.is_relative_to(directory) for directory in directories)


def uri_is_within(uri: str, folders: Sequence[str]) -> bool:
    """Whether a URI, as written or percent-decoded, is one of some folders or below one; options do not count."""
    forms = {_plain(uri), _plain(unquote(uri.partition("?")[0]))}
    roots = {_plain(folder) for folder in folders}
    return any(form == root or form.startswith(root + "/") for form in forms for root in roots)


def _plain(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    return f"{_SAME_SCHEME.get(scheme, scheme)}://" + re.sub("/+", "/", rest.partition("?")[0]).strip("/")


def _resolved(paths: Iterator[Path]) -> tuple[Path, ...]:
    return tuple(Path(os.path.realpath(path)) for path in paths)


def _checked_entries(directory: Path, confined: Confinement) -> list[Path]:
    """The entries of a folder that are not passed over, after a check of each."""
    real = Path(os.path.realpath(directory))
    entries = [path for path in sorted(directory.iterdir()) if not is_passed_over(path, real, confined)]
    for path in entries:
        confined.check(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise _outside(path)
    return entries


def _outside(path: Path) -> OSError:
    return PermissionError(
        errno.EACCES, "leads out of the directories that may be read; name a file inside them", str(path)
    )
