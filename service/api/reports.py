"""Reports of runs: the file of a finished run, what an active one has so far, or why there is none."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.store.checksums import checked
from service.api.answers import unreadable_report
from service.api.context import ServiceContext
from service.api.responses import none_yet
from service.database import tables
from service.domain.states import RunState
from service.errors import NotFound, UnusableRun
from service.run_storage import read, storage_of

_MOST_BYTES = 64 * 2**20
"""Maximum size of a run's JSON file that a response may contain (bytes)."""


def report_of_run(context: ServiceContext, run: tables.RunRow) -> RunReport:
    """The report of a run; of an active one, of the stages that have finished.

    If this version cannot read the run or its report, the report has only its name, cost and state, and why.

    Raises:
        NotFound: The run has succeeded, and its report is absent or damaged.
        Overloaded: The report of another run takes too long.
        StorageUnavailable: The run's URI cannot be reached.
    """
    try:
        if RunState(run.state) is RunState.SUCCEEDED:
            return RunReport.model_validate(_checked(document_of(run, "report.json", "report")))
        return context.reports.get(run.location, run.settings)
    except UnusableRun as error:
        return unreadable_report(run, str(error))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        why = run.unreadable or f"this version cannot read the run's report ({where}); download its file instead"
        return unreadable_report(run, why)


def document_of(run: tables.RunRow, path: str, what: str) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        NotFound: There is none, or it is damaged; `what` names it to the user.
    """
    content = read(storage_of(run.location), path, _MOST_BYTES)
    if content is None:
        raise none_yet(what)
    try:
        found = from_json(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise NotFound(f"{path} of the run is not a JSON object; download its file instead")
    return found


def _checked(document: dict[str, Any]) -> dict[str, Any]:
    try:
        return checked(document)
    except ValueError as error:
        raise NotFound(
            "the run's report is damaged: it is not what the run wrote; run it again to make it again"
        ) from error
