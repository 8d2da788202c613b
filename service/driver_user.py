"""The operating system user that drivers run as, if it is not the service's own.

Drivers and their workers execute what tenants configure. As another user they cannot read the service's state directory
with its database, secret and tokens. The service must be root to start them. It never writes into a directory that
belongs to this user, who could plant symbolic links there.
"""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from moedisco_ray.core.errors import ConfigError

_OPTION = "--driver-user"


@dataclasses.dataclass(frozen=True)
class DriverUser:
    """An unprivileged user of this machine.

    Attributes:
        name: Name in the user database.
        gid: Primary group id.
        home: Home directory, which may not exist.
        setpriv: Path of the program that starts processes as this user.
    """

    name: str
    uid: int
    gid: int
    home: Path
    setpriv: str

    @classmethod
    def named(cls, name: str) -> Self:
        """Look up a user by name.

        Raises:
            ConfigError: The user does not exist, is root, or this process may not start programs as another user.
        """
        try:
            entry = pwd.getpwnam(name)
        except KeyError as error:
            raise ConfigError(
                _OPTION, name, "is no user of this machine; create it first (`useradd --system NAME`)"
            ) from error
        if entry.pw_uid == 0:
            raise ConfigError(_OPTION, name, "is root; name an unprivileged user")
        if os.geteuid() != 0:
            raise ConfigError(
                _OPTION, name, "needs a service that was started as root; leave it out, or start the service as root"
            )
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ConfigError(_OPTION, name, "needs the program `setpriv`; install util-linux")
        return cls(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir), setpriv)

    def check(self) -> None:
        """Check that this user can run this interpreter with this package.

        Raises:
            ConfigError: The user cannot read the interpreter or the package.
        """
        trial = self.command([sys.executable, "-c", f"import {ConfigError.__module__}"], Path("/"))
        if subprocess.run(trial, capture_output=True, check=False).returncode:  # noqa: S603 - our own interpreter
            remedy = f"cannot run {sys.executable} with this package; install both where every user can read them"
            raise ConfigError(_OPTION, self.name, remedy)

    def command(self, words: Sequence[str], directory: Path) -> list[str]:
        """Command line that runs a program as this user; neither the program nor its children can regain privileges.

        Args:
            words: Program and its arguments.
            directory: Working directory; the user may not be able to enter the service's own.
        """
        drop = [self.setpriv, f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--no-new-privs"]
        # `env` runs the program as the new user; `setpriv` could still execute a program that this user may not.
        return [*drop, "--", "env", f"--chdir={directory}", *words]

    def environment(self, inherited: Mapping[str, str], directory: Path) -> dict[str, str]:
        """Environment variables for this user's programs.

        Args:
            inherited: Environment of the service.
            directory: HOME if the user's home directory does not exist.
        """
        home = self.home if self.home.is_dir() else directory
        kept = {name: value for name, value in inherited.items() if not name.startswith("XDG_")}
        return kept | {"HOME": str(home), "USER": self.name, "LOGNAME": self.name}

    def give(self, path: Path) -> None:
        """Make this user the owner of the file or directory at a path."""
        os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def own(self, number: int) -> None:
        """Make this user the owner of an open file or directory."""
        os.fchown(number, self.uid, self.gid)

    def let_read(self, number: int) -> None:
        """Let this user read an open file or enter an open directory that the service owns."""
        os.fchown(number, -1, self.gid)
        os.fchmod(number, 0o750 if stat.S_ISDIR(os.fstat(number).st_mode) else 0o640)
