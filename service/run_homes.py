"""The directory of each run, OUTPUT/RUN_ID: made, written and set aside by the service alone.

With a driver's user, a run directory below is that user's, who may replace what is in it by links. What the service does here it
does step by step from the output root, following none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from moedisco_ray.core.errors import ConfigError
from service.domain.run_paths import is_id
from service.driver_user import DriverUser
from service.run_files import FOLDER, open_folder

_ASIDE = ".removed-"
_FIELD = "output"


@contextlib.contextmanager
def open_home(home: Path, roots: Sequence[Path], user: DriverUser | None) -> Iterator[int]:
    """A run's own directory, made where it is absent.

    Args:
        home: The directory.
        roots: The output roots; what is missing on the way from one of them is made too.
        user: Of the drivers; None: the service's own.

    Yields:
        A descriptor, valid until the block ends.

    Raises:
        ConfigError: It is under none of the roots, a step from the root is a link or the drivers' user's, or another user owns it.
        OSError: It cannot be made or opened.
    """
    parent = Path(os.path.realpath(home.parent))
    root = _root_of(parent, roots)
    if root is None:
        raise ConfigError(_FIELD, str(home.parent), f"is outside of the output roots ({', '.join(map(str, roots))}); submit again")
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        step = os.open(root, FOLDER)
        stack.callback(os.close, step)
        owners = {os.geteuid(), os.fstat(step).st_uid}
        for part in (*parent.relative_to(root).parts, home.name):
            step = _made(step, part, home, user)
            stack.callback(os.close, step)
        if os.fstat(step).st_uid not in owners:
            raise ConfigError(_FIELD, str(home), "belongs to another user than the service's; remove it, or submit again")
        if user is not None:
            user.let_read(step)
        yield step


def make_run_directory(home: int, name: str, user: DriverUser) -> None:
    """Make a run directory, where it is absent, and give it to the drivers' user.

    Args:
        home: What `open_home` yields.
        name: Of the run directory.
        user: Of the drivers.

    Raises:
        ConfigError: It is a link.
        OSError: It cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=home)
    number = _opened(home, name, Path(name))
    try:
        user.take(number)
    finally:
        os.close(number)


def write_in(home: int, name: str, text: str, user: DriverUser | None) -> None:
    """Write a file so that a reader sees the old file or the new one, never half of either.

    Args:
        home: What `open_home` yields.
        name: Of the file.
        text: Its content.
        user: May read it; None: the service's own.

    Raises:
        OSError: It cannot be written.
    """
    draft = f".{name}.draft"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft, dir_fd=home)
    number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=home)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(text)
        if user is not None:
            user.let_read(number)
    os.replace(draft, name, src_dir_fd=home, dst_dir_fd=home)


def set_aside(home: Path, run_id: str, roots: Sequence[Path], other: str | None) -> Path | None:
    """Give a run's directory a name under which nothing finds it any more; `run_files.remove` does the rest.

    Args:
        home: The run's own directory.
        run_id: The run.
        roots: The output roots. They may have changed since the run was made, and a mistake would remove what is not a run's.
        other: A run whose directory is below this one.

    Returns:
        The new name, in the root; None: there is no directory.

    Raises:
        OSError: It cannot be renamed, is a link, is not the run's own under one of the roots, or holds another run's.
    """
    if not os.path.lexists(home):
        return None
    parent = Path(os.path.realpath(home.parent))
    root = _root_of(parent, roots)
    if root is None or home.name != run_id:
        raise _not_its_own(home, run_id)
    if other is not None:
        raise PermissionError(errno.EPERM, f"the directory of run {other} is in it", str(home))
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
    """Directories that were set aside and not removed, because the service ended in between.

    Args:
        roots: The output roots.
        known: Whether there is a run of this id; what is called as if it were set aside is then left.
    """
    for root in roots:
        for path in root.glob(f"{_ASIDE}*"):
            run_id = path.name.removeprefix(_ASIDE)
            if is_id(run_id) and path.is_dir() and not path.is_symlink() and not known(run_id):
                yield path


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
        raise ConfigError(_FIELD, str(home), f"{part} belongs to the drivers' user {user.name}; submit again to another directory")
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
