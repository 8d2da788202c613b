"""Keeps the failure of one run from ending a round that has other runs to process."""

from __future__ import annotations

from collections.abc import Callable

from service.database import runs
from service.database.session import Database
from service.database.tables import RunRow
from service.domain.states import TERMINAL
from service.errors import DatabaseError, NotFound, StaleRun
from service.observability import bound, logger

_log = logger(__name__)
_FAILED = "cannot be "
"""Start of the marks of steps that failed, before the name of the step."""


def isolated(database: Database, run: RunRow, step: str, work: Callable[[], None]) -> bool:
    """Do one step of the work on a run; if it fails, mark the run and return false.

    A mark stays until the step that made it succeeds or the run changes its state. If other steps fail or succeed in
    the meantime, it does not change, so that readers see the same mark in every round.

    Args:
        database: Database of the runs.
        run: The run as it was loaded.
        step: What is done to the run, as a participle such as `measured`; each step has a name of its own.
        work: Processes the run; handles the failures that it foresees.

    Raises:
        DatabaseError: The database does not answer, so that no other run can be processed either.
    """
    with bound(run_id=run.id):
        try:
            work()
        except (StaleRun, NotFound):
            return True  # a request changed or deleted the run; the next round sees it
        except DatabaseError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug or a damaged record may raise anything
            # Other runs must not wait for this one.
            _log.exception("run %s cannot be %s", run.id, step)
            _mark(database, run, step, f"{_FAILED}{step} ({type(error).__name__}); the service's log has the cause")
            return False
        _mark(database, run, step, None if run.state in TERMINAL else run.unreadable)
        return True


def _mark(database: Database, run: RunRow, step: str, trouble: str | None) -> None:
    known = run.trouble or ""
    by_another = known.startswith(_FAILED) and not known.startswith(f"{_FAILED}{step} ")
    if by_another or run.trouble == trouble:
        return
    with database.write() as session:
        runs.mark_trouble(session, run.id, trouble, ended=run.state in TERMINAL)
