"""The time that a check of a GPU may take, and the check of a machine's GPUs before Ray starts there. No torch here.

    python -m moedisco_ray.execution.cards FIELD COUNT

ends with one line and code 2 if torch cannot use one of this machine's first COUNT cards.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile

from moedisco_ray.core.errors import CardError, ConfigError
from moedisco_ray.core.printable import one_line

CHECK_SECONDS = 180.0
"""Seconds within which torch must be imported and have used a GPU; a card that hangs never answers."""
_END_SECONDS = 5.0
"""Seconds to wait for the end of a check that was killed."""


def check_cards(field: str, count: int, seconds: float = CHECK_SECONDS) -> None:
    """Compute on each of this machine's first GPUs, in a process that ends afterwards and frees their memory.

    Args:
        field: Setting that asks for the GPUs.
        count: Number of GPUs.
        seconds: Time that the checks may take (s).

    Raises:
        ConfigError: torch cannot use one of the GPUs.
    """
    if not count:
        return
    command = [sys.executable, "-P", "-m", "moedisco_ray.execution.card_product", field, str(count)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as output,
        tempfile.TemporaryFile("w+", errors="replace") as log,
    ):
        checking = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=log)  # noqa: S603 - ours
        try:
            checking.wait(seconds)
        except subprocess.TimeoutExpired:
            checking.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a call of the driver may keep it from ending
                checking.wait(_END_SECONDS)
            raise ConfigError(field, count, _hanging(field, socket.gethostname(), seconds)) from None
        output.seek(0)
        found = output.read().strip()
        if not found and checking.returncode:
            log.seek(0)
            reason = (log.read().strip().splitlines() or [f"the check ended with code {checking.returncode}"])[-1]
            found = f"torch cannot start on node {socket.gethostname()}: {one_line(reason)}; install it there again"
    if found:
        raise ConfigError(field, count, found)


def hanging_card(field: str, count: int, node_id: str, seconds: float = CHECK_SECONDS) -> CardError:
    """The error about a worker whose check does not end.

    Args:
        field: Setting that asks for the GPU.
        count: Number of GPUs that it asks for.
        node_id: Id of the worker's node in the Ray cluster.
        seconds: Time that the check had (s).
    """
    return CardError(field, count, _hanging(field, node_id, seconds), node_id)


def _hanging(field: str, node: str, seconds: float) -> str:
    return (
        f"torch does not finish a small product on a GPU of node {node} within {seconds:.0f} s; restart that machine, "
        f"or set {field}=0"
    )


if __name__ == "__main__":
    try:
        check_cards(sys.argv[1], int(sys.argv[2]))
    except ConfigError as error:
        print(f"moedisco: {error}", file=sys.stderr)  # noqa: T201 - the scripts of nodes show it
        raise SystemExit(2) from None
