"""Helpers of all commands: connect to the service, and read the run and the budget that a user names."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moedisco_ray.core.errors import UserError
from service.commands.output import remark

if TYPE_CHECKING:
    from service.client import Client

RUNS_PANEL, SERVICE_PANEL = "Runs of a service", "The service"

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The run's id, the first letters of its id, or its name if only one run has it."
    ),
]

RunNames = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Ids of runs, first letters of ids, or names that only one run has."),
]

Budget = Annotated[
    str | None,
    typer.Option(
        metavar="DOLLARS", help="Stop the run with a checkpoint when it has cost this many dollars; none: never."
    ),
]

ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="The project's id, or its name.")]

DEFAULT_URL = "http://127.0.0.1:8300"
"""Default address of `moedisco serve`."""
BRIEF_SECONDS = 5.0
"""Seconds for which a command repeats a failing request before it gives up; few, because a person waits for the
result."""

_ID_LENGTH = 26
_ID_LETTERS = frozenset("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
_MOST_NAMED = 5


@contextlib.contextmanager
def connected(*, outlasts_restarts: bool = False) -> Iterator[Client]:
    """Connect to the service at the address in the environment, or else at the one that `moedisco serve` saved.

    Several services may run on one machine, so an address that is not the default, or not that of the last command, is
    printed on standard error.

    Args:
        outlasts_restarts: Whether to wait while the service restarts; otherwise the command fails after a few seconds.
    """
    import stamina

    from service.client import URL_VARIABLE, Address, Client, RetryPolicy, changed_since_last_use

    stamina.instrumentation.set_on_retry_hooks(())  # do not log repeated requests
    with Client(retry=RetryPolicy() if outlasts_restarts else RetryPolicy(BRIEF_SECONDS, longest_wait=1.0)) as client:
        named = os.environ.get(URL_VARIABLE)
        if not named and changed_since_last_use(Address(client.url, state_dir=client.state_dir)):
            remark(f"now using {client.url}" + (f" (state directory {client.state_dir})" if client.state_dir else ""))
        elif client.url != DEFAULT_URL:
            remark(f"the service at {client.url} ({URL_VARIABLE if named else 'started last by this user'})")
        yield client


def find_run(client: Client, text: str) -> str:
    """Id of the run that `text` names: by its id, by a prefix of its id, or by its name.

    Raises:
        UserError: No run matches, or more than one.
    """
    text = text.strip()
    prefix = text.upper()
    may_be_id = bool(prefix) and _ID_LETTERS.issuperset(prefix)
    if may_be_id and len(prefix) == _ID_LENGTH:
        return prefix
    named = [run.id for run in client.runs(name=text) if run.name == text] if text else []
    if len(named) == 1:
        return named[0]
    if named:
        raise UserError("RUN", text, f"is the name of {len(named)} runs; give the id of one: {_some(named)}")
    begun = list(_with_prefix(client, prefix)) if may_be_id else []
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise UserError("RUN", text, f"begins the ids of {len(begun)} runs; give more letters: {_some(begun)}")
    raise UserError("RUN", text, "no such run; `moedisco list` shows your runs")


def budget_dollars(text: str | None) -> float | Literal["none"] | None:
    """The dollars, "none", or nothing that `--budget` names.

    Raises:
        UserError: The text is no number, or not a finite one.
    """
    if text is None:
        return None
    if text == "none":
        return "none"
    with contextlib.suppress(ValueError):
        if math.isfinite(found := float(text)):
            return found
    raise UserError("--budget", text, "must be a number of dollars, or none")


def _with_prefix(client: Client, prefix: str) -> Iterator[str]:
    # Runs come newest first, so ids decrease: after an id smaller than the prefix, no further run matches.
    for run in client.runs():
        if run.id.startswith(prefix):
            yield run.id
        elif run.id < prefix:
            return


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:_MOST_NAMED]) + (" ..." if len(ids) > _MOST_NAMED else "")
