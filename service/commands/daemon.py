"""A service in the background, for `moedisco serve --detach` and `moedisco demo`, and how to sign in to it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moedisco_ray.core.errors import ConfigError, RunError, UserError
from service.commands.output import say

if TYPE_CHECKING:
    from service.client import Address

ADDRESS_FILE = "address.json"
"""File in a state directory with the address of its service."""
_START_SECONDS = 180.0
"""Maximum time for a service to start, in seconds. Starting a local Ray takes most of this time."""


def refuse_second(state_dir: Path) -> None:
    """Refuse to start a service in a state directory whose service runs, because that one has other options.

    Raises:
        ConfigError: A service runs.
    """
    from service import process

    if (found := process.find(state_dir)) is not None:
        place = "" if found.url is None else f" at {found.url}"
        remedy = f"a service already runs{place}; stop it first with `moedisco stop --state-dir {state_dir}`"
        raise ConfigError("--state-dir", str(state_dir), remedy)


def start_daemon(state_dir: Path, arguments: Sequence[str]) -> Address:
    """Start the service of a state directory in the background, unless it runs already; returns its address.

    Args:
        state_dir: State directory of the service. Its `service.log` gets the output of the service.
        arguments: Arguments of `moedisco serve` except the state directory.

    Raises:
        RunError: The service did not start.
    """
    from service import process
    from service.client import load_address, save_address

    before = used_so_far()
    if process.find(state_dir) is None:
        _launch(state_dir, arguments)
    address = load_address(state_dir / ADDRESS_FILE)
    if address is None:
        raise RunError(
            f"the service of {state_dir} has not saved its address; stop it with `moedisco stop --state-dir "
            f"{state_dir}`"
        )
    save_address(address)
    say_what_is_left(before, address)
    return address


def used_so_far() -> Address | None:
    """Address that this user's commands use; None if there is none, or if its file is damaged."""
    from service.client import load_address

    with contextlib.suppress(UserError):
        return load_address()
    return None


def say_what_is_left(before: Address | None, address: Address) -> None:
    """Say that this user's commands leave a service that still runs.

    Args:
        before: Address that the commands have used so far.
        address: Address that they use from now on.
    """
    from service import process

    if before is None or before.state_dir is None or before.state_dir == address.state_dir:
        return
    if process.find(Path(before.state_dir)) is not None:
        say(
            f"Your commands leave {before.url} (state directory {before.state_dir}), which still runs, and use "
            f"{address.url} from now on; MOEDISCO_URL and MOEDISCO_TOKEN choose another service"
        )


def say_how_to_sign_in(address: Address, token_file: Path, code: str | None = None) -> None:
    """Print the page's address and how to sign in.

    Only a terminal gets a sign-in link. Other output may be a log that other people read; it gets the path of the
    token's file.

    Args:
        address: Address of the service.
        token_file: File of the first token.
        code: Sign-in code; None requests one from the service.
    """
    if address.token is not None and sys.stdout.isatty():
        say(f"To sign in: {sign_in_link(address, code)}")
        say("The link works once, within ten minutes; `moedisco sign-in` prints another")
    elif token_file.exists():
        say(f"To sign in: {address.url}, with the token in {token_file}")
    else:
        say(f"To sign in: {address.url}, with your token")


def sign_in_link(address: Address, code: str | None = None) -> str:
    """A link that signs one browser in to the page; the page then removes the code from the browser's address bar.

    Args:
        address: Address of the service.
        code: Sign-in code; None requests one from the service.
    """
    if code is None:
        from service.client import Client

        with Client(address.url, address.token) as client:
            code = client.create_sign_in_code().code
    return f"{address.url}/#code={code}"


def _launch(state_dir: Path, arguments: Sequence[str]) -> None:
    from service import process

    process.make_private(state_dir)
    log = state_dir / "service.log"
    log.touch(0o600)
    command = [sys.executable, "-P", "-m", "service", "serve", *arguments, "--state-dir", str(state_dir)]
    with log.open("w", encoding="utf-8") as output:
        started = subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + _START_SECONDS
    while (found := process.find(state_dir)) is None or found.url is None:
        if started.poll() is not None:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            raise RunError(f"the service did not start: {lines[-1] if lines else log}")
        if time.monotonic() > deadline:
            raise RunError(f"the service did not start within {_START_SECONDS:.0f} s; see {log}")
        time.sleep(0.1)
