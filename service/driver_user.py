"""The user of the operating system that drivers run as, where that is not the service's own.

Drivers and their workers execute what tenants configure. As another user they cannot read the service's state directory: its
database, secret and tokens. The service must be root to start them; it never writes into a directory that belongs to them, where
they could plant links.
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
        name: In the user database.
        uid: Its number.
        gid: Its own group.
        home: Its home directory, which may not exist.
        setpriv: The program that starts others as this user.
    """

    name: str
    uid: int
    gid: int
    home: Path
    setpriv: str

    @classmethod
    def named(cls, name: str) -> Self:
        """A user by name.

        Raises:
            ConfigError: There is no such user, it is root, or this process may not start programs as another user.
        """
        try:
            entry = pwd.getpwnam(name)
        except KeyError as error:
            raise ConfigError(_OPTION, name, "is no user of this machine; make one first (`useradd --system NAME`)") from error
        if entry.pw_uid == 0:
            raise ConfigError(_OPTION, name, "is root; name a user without rights of its own")
        if os.geteuid() != 0:
            raise ConfigError(_OPTION, name, "needs a service that was started as root; leave it out, or start the service as root")
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ConfigError(_OPTION, name, "needs the program `setpriv`; install util-linux")
        return cls(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir), setpriv)

    def check(self) -> None:
        """See that this user can start drivers, with this interpreter and this package.

        Raises:
            ConfigError: One of them is where only others can read.
        """
        trial = self.command([sys.executable, "-c", f"import {ConfigError.__module__}"], Path("/"))
        if subprocess.run(trial, capture_output=True, check=False).returncode:  # noqa: S603 - ourselves
            remedy = f"cannot run {sys.executable} with this package; install both where every user can read them"
            raise ConfigError(_OPTION, self.name, remedy)

    def command(self, words: Sequence[str], directory: Path) -> list[str]:
        """The command line that starts a program as this user, for good: neither it nor its children gain rights again.

        Args:
            words: The program and its arguments.
            directory: Where it starts; the service's own may be closed to it.
        """
        drop = [self.setpriv, f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups", "--no-new-privs"]
        # `setpriv` could still start what this user cannot: its rights end with the next program.
        return [*drop, "--", "env", f"--chdir={directory}", *words]

    def environment(self, inherited: Mapping[str, str], directory: Path) -> dict[str, str]:
        """The environment of this user's programs.

        Args:
            inherited: The service's own.
            directory: Stands in for a home directory that does not exist.
        """
        home = self.home if self.home.is_dir() else directory
        kept = {name: value for name, value in inherited.items() if not name.startswith("XDG_")}
        return kept | {"HOME": str(home), "USER": self.name, "LOGNAME": self.name}

    def give(self, path: Path) -> None:
        """Make a file or directory this user's."""
        os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def take(self, number: int) -> None:
        """Make an open file or directory this user's."""
        os.fchown(number, self.uid, self.gid)

    def let_read(self, number: int) -> None:
        """Let this user read an open file, or enter an open directory, that stays the service's."""
        os.fchown(number, -1, self.gid)
        os.fchmod(number, 0o750 if stat.S_ISDIR(os.fstat(number).st_mode) else 0o640)
