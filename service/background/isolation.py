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


def isolated(database: Database, run: RunRow, work: Callable[[], None]) -> bool:
    """Do the work on one run; if it fails, mark the run and return false.

    Args:
        database: Database of the runs.
        run: The run as it was loaded.
        work: Processes the run; handles the failures that it foresees.

    Raises:
        DatabaseError: The database does not answer, so that no other run can be processed either.
    """
    with bound(run_id=run.id):
        try:
            work()
        except (StaleRun, NotFound):
            return True     # a request changed or deleted the run; the next round sees it
        except DatabaseError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug or a damaged record may raise anything, and other runs must not wait for it
            _log.exception("run %s cannot be processed", run.id)
            _mark(database, run, f"cannot be processed ({type(error).__name__}); the service's log has the cause")
            return False
        _mark(database, run, None if run.state in TERMINAL else run.unreadable)
        return True


def _mark(database: Database, run: RunRow, trouble: str | None) -> None:
    if run.trouble == trouble:
        return
    with database.write() as session:
        runs.mark_trouble(session, run.id, trouble, ended=run.state in TERMINAL)
