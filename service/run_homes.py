"""Creates, writes and removes the home directory of each run, OUTPUT/RUN_ID, which only the service may write.

The run directory below it can belong to the drivers' user, who could plant symbolic links there. Every path is
therefore opened part by part from the output root, without following links.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.locations import Location, is_uri
from service import run_files
from service.domain.run_paths import is_id
from service.driver_user import DriverUser
from service.run_files import FOLDER, open_folder
from service.run_storage import DirectoryRun, delete_folder, read

_ASIDE = ".removed-"
_FIELD = "output"


@contextlib.contextmanager
def open_home(home: Path, roots: Sequence[Path], user: DriverUser | None) -> Iterator[int]:
    """Open a run's home; creates it and its parents below the output root if they are absent.

    Args:
        home: Home of the run.
        roots: Output roots.
        user: User of the drivers; None if drivers run as the service's user.

    Yields:
        A file descriptor, valid inside the block.

    Raises:
        ConfigError: The home is outside of the roots, a part of the path is a symbolic link or belongs to the drivers'
            user, or another user owns the home.
        OSError: The home cannot be created or opened.
    """
    parent = Path(os.path.realpath(home.parent))
    root = _root_of(parent, roots)
    if root is None:
        raise ConfigError(
            _FIELD, str(home.parent), f"is outside of the output roots ({', '.join(map(str, roots))}); submit again"
        )
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        step = os.open(root, FOLDER)
        stack.callback(os.close, step)
        owners = {os.geteuid(), os.fstat(step).st_uid}
        for part in (*parent.relative_to(root).parts, home.name):
            step = _made(step, part, home, user)
            stack.callback(os.close, step)
        if os.fstat(step).st_uid not in owners:
            raise ConfigError(_FIELD, str(home), "belongs to another user than the service; remove it, or submit again")
        if user is not None:
            user.let_read(step)
        yield step


def make_run_directory(home: int, name: str, user: DriverUser) -> None:
    """Create a run directory if it is absent, and make the drivers' user its owner.

    Args:
        home: Descriptor from `open_home`.
        name: Name of the run directory.
        user: User of the drivers.

    Raises:
        ConfigError: The run directory is a symbolic link.
        OSError: The run directory cannot be created.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=home)
    number = _opened(home, name, Path(name))
    try:
        user.own(number)
    finally:
        os.close(number)


def write_in(home: int, name: str, text: str, user: DriverUser | None, mode: int = 0o666) -> None:
    """Write a file atomically.

    Args:
        home: Descriptor from `open_home`.
        name: File name in the home directory.
        text: Content of the file.
        user: User that gets permission to read the file; None if drivers run as the service's user.
        mode: Permissions of the file without a user; the umask removes some of them.

    Raises:
        OSError: The file cannot be written.
    """
    draft = f".{name}.draft"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft, dir_fd=home)
    number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=home)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(text)
        if user is not None:
            user.let_read(number)
    os.replace(draft, name, src_dir_fd=home, dst_dir_fd=home)


def set_aside(home: Path, run_id: str, roots: Sequence[Path], other: str | None) -> Path | None:
    """Rename a run's home out of the way, so that `remove_run` can delete it later.

    Args:
        home: Home of the run.
        run_id: Id of the run.
        roots: Current output roots. A home outside of them is refused, because it may not be a run's directory.
        other: Id of another run whose directory is inside the home, if any.

    Returns:
        The new path, directly under the output root; None if there is no home.

    Raises:
        OSError: The home cannot be renamed, is a symbolic link, is not the run's under a root, or contains another
            run's directory.
    """
    if not os.path.lexists(home):
        return None
    parent = Path(os.path.realpath(home.parent))
    root = _root_of(parent, roots)
    if root is None or home.name != run_id:
        raise _not_its_own(home, run_id)
    if other is not None:
        raise PermissionError(errno.EPERM, f"it contains the directory of run {other}", str(home))
    aside = root / f"{_ASIDE}{run_id}"
    step = open_folder(root, parent.relative_to(root).as_posix().removeprefix("."))
    try:
        if not stat.S_ISDIR(os.stat(home.name, dir_fd=step, follow_symlinks=False).st_mode):
            raise _not_its_own(home, run_id)
        os.rename(home.name, aside, src_dir_fd=step)
    finally:
        os.close(step)
    return aside


def left_aside(roots: Iterable[Path], known: Callable[[str], bool]) -> Iterator[Path]:
    """Homes that were renamed by `set_aside` but not deleted, because the service ended in between.

    Args:
        roots: Output roots.
        known: Returns whether a run with this id exists; homes of existing runs are left out.
    """
    for root in roots:
        for path in root.glob(f"{_ASIDE}*"):
            run_id = run_of(path)
            if is_id(run_id) and path.is_dir() and not path.is_symlink() and not known(run_id):
                yield path


def check_deletable(home: Location, run_id: str, roots: Sequence[str]) -> None:
    """Check that a run's home may be deleted: a home at a URI must be the run's own folder below an output root.

    Raises:
        PermissionError: The home is at a URI and is another folder.
    """
    place = str(home)
    if is_uri(place) and not (place.endswith(f"/{run_id}") and any(place.startswith(f"{root}/") for root in roots)):
        raise PermissionError(errno.EPERM, f"not the folder of run {run_id} under an output root", place)


def remove_run(aside: Path | None, run_id: str, home: Location, roots: Sequence[str]) -> None:
    """Delete the objects of a run at a URI, then its home on this machine.

    In this order, a failed deletion can be repeated.

    Args:
        aside: New path of the home after `set_aside`; None if there is no home.
        run_id: Id of the run.
        home: OUTPUT/RUN_ID, a path or a URI. If the `request.json` in `aside` names a URI, that URI is used instead,
            because the caller cannot know it once the run has been deleted from the database.
        roots: Output roots at URIs.

    Raises:
        OSError: A part cannot be deleted.
    """
    stored = None if aside is None else _asked_output(aside)
    place = stored if stored is not None and is_uri(stored) else home
    if is_uri(place):
        check_deletable(place, run_id, roots)
        delete_folder(place)
    if aside is not None:
        run_files.remove(aside)


def remove_storage(storage: Location, run_id: str, roots: Sequence[str]) -> None:
    """Delete a run's own folder in `checkpoint.storage`, with all its checkpoints.

    Args:
        storage: STORAGE/RUN_ID, a path or a URI.
        run_id: Id of the run.
        roots: Storage roots.

    Raises:
        OSError: The folder cannot be deleted, or is not the run's own folder under a storage root.
    """
    if is_uri(storage):
        check_deletable(str(storage).partition("?")[0], run_id, roots)
        delete_folder(storage)
        return
    aside = set_aside(Path(storage), run_id, [Path(root) for root in roots if not is_uri(root)], None)
    if aside is not None:
        run_files.remove(aside)


def _asked_output(home: Path) -> str | None:
    """Setting `output` in the `request.json` of a home; None if the file is missing, invalid or does not set it."""
    try:
        output = json.loads(read(DirectoryRun(home), "request.json") or b"{}").get("output")
    except (ValueError, AttributeError):
        return None
    return output if isinstance(output, str) else None


def run_of(aside: Path) -> str:
    """Id of the run whose home was set aside."""
    return aside.name.removeprefix(_ASIDE)


def _root_of(parent: Path, roots: Iterable[Path]) -> Path | None:
    return next((root for root in roots if parent.is_relative_to(root)), None)


def _made(step: int, part: str, home: Path, user: DriverUser | None) -> int:
    try:
        os.mkdir(part, dir_fd=step)
    except FileExistsError:
        new = False
    else:
        new = True
    number = _opened(step, part, home)
    if user is not None and os.fstat(number).st_uid == user.uid:
        os.close(number)
        raise ConfigError(
            _FIELD, str(home), f"{part} belongs to the drivers' user {user.name}; submit again to another directory"
        )
    if user is not None and new:
        user.let_read(number)
    return number


def _opened(step: int, part: str, home: Path) -> int:
    try:
        return os.open(part, FOLDER, dir_fd=step)
    except OSError as error:
        if stat.S_ISLNK(os.stat(part, dir_fd=step, follow_symlinks=False).st_mode):
            raise ConfigError(_FIELD, str(home), f"{part} is a link; remove it, or submit again") from error
        raise


def _not_its_own(home: Path, run_id: str) -> PermissionError:
    return PermissionError(errno.EPERM, f"not the directory of run {run_id} under an output root", str(home))
