"""A service in the background: started by a command that does not wait for its end."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moedisco_ray.core.errors import RunError
from service.commands.output import say

if TYPE_CHECKING:
    from service.client import Address

OWN_ADDRESS = "address.json"
"""Of the service that uses a state directory, in that directory."""
_START_SECONDS = 180.0


def start_apart(state_dir: Path, arguments: Sequence[str]) -> Address:
    """The service of a state directory; started, and waited for until it listens, where there is none.

    Args:
        state_dir: Holds what it remembers; its output goes to `service.log` there.
        arguments: Of `moedisco serve`, beside the state directory.

    Raises:
        RunError: It did not come up.
    """
    # Late, as everything that `--help` does not need.
    process, client = importlib.import_module("service.process"), importlib.import_module("service.client")
    if process.find(state_dir) is None:
        _launch(state_dir, arguments)
    address: Address | None = client.load_address(state_dir / OWN_ADDRESS)
    if address is None:
        raise RunError(f"the service of {state_dir} does not say where it is; end it with `moedisco stop --state-dir {state_dir}`")
    client.save_address(address)
    return address


def say_how_to_sign_in(address: Address, token_file: Path, code: str | None = None) -> None:
    """Say where the page is and how to sign in to it.

    Only a terminal is shown a link that signs in. Any other output may be a log, which others read: there the file is named that
    holds the token.

    Args:
        address: The service.
        token_file: The file of the first token.
        code: A sign-in code; None: the service, which answers, is asked for one.
    """
    if address.token is not None and sys.stdout.isatty():
        say(f"To sign in: {sign_in_link(address, code)}")
        say("The link works once, within ten minutes; `moedisco sign-in` prints another")
    elif token_file.exists():
        say(f"To sign in: {address.url}, with the token in {token_file}")
    else:
        say(f"To sign in: {address.url}, with a token of yours")


def sign_in_link(address: Address, code: str | None = None) -> str:
    """A link to the page that signs one browser in; the page takes the code out of its address.

    Args:
        address: The service.
        code: A sign-in code; None: the service is asked for one.
    """
    if code is None:
        client = importlib.import_module("service.client")
        with client.Client(address.url, address.token) as connection:
            code = connection.create_sign_in_code().code
    return f"{address.url}/#code={code}"


def _launch(state_dir: Path, arguments: Sequence[str]) -> None:
    process = importlib.import_module("service.process")
    process.close_to_others(state_dir)
    log = state_dir / "service.log"
    log.touch(0o600)
    words = [sys.executable, "-m", "service", "serve", *arguments, "--state-dir", str(state_dir)]
    with log.open("w", encoding="utf-8") as output:
        started = subprocess.Popen(  # noqa: S603 - ourselves
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + _START_SECONDS
    while (found := process.find(state_dir)) is None or found.url is None:
        if started.poll() is not None:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            raise RunError(f"the service did not start: {lines[-1] if lines else log}")
        if time.monotonic() > deadline:
            raise RunError(f"the service did not come up within {_START_SECONDS:.0f} s; see {log}")
        time.sleep(0.1)
