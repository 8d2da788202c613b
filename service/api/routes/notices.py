"""Routes of the URLs that get notices about ends of runs; no answer shows such a URL whole."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy.orm import Session

from service import notices as sending
from service.api.bodies import StrictRoute
from service.api.context import InContext
from service.api.openapi import problems
from service.api.parameters import ProjectName
from service.api.security import SIGNED_IN, Caller, Reader, Submitter, own_project_for, project_for
from service.api.submission import note
from service.database import access_tables, notices
from service.domain.access import Action
from service.domain.notices import without_secret
from service.errors import Conflict, InvalidRequest, NotFound
from service.schemas import NoticeRequest, NoticeUrl

router = APIRouter(
    prefix="/v1/projects/{project}/notices", tags=["projects"], route_class=StrictRoute, dependencies=SIGNED_IN
)


@router.get("", responses=problems(404, 409))
def get_notice_url(project: ProjectName, caller: Reader, context: InContext) -> NoticeUrl:
    """Get where notices about ends of a project's runs are sent, and whether the last one was accepted."""
    with context.database.read() as session:
        return NoticeUrl.of(_row(session, caller, project, "see"))


@router.put("", responses=problems(404, 409, body=True))
def set_notice_url(project: ProjectName, body: NoticeRequest, caller: Submitter, context: InContext) -> NoticeUrl:
    """Set the URL that gets a notice about the end of each run of a project.

    If the project is the one with the owner's name, so do the owner's runs in projects without a URL.
    """
    now, url = context.now(), body.url.get_secret_value()
    try:
        sending.check_product(url)
    except ValueError as error:
        raise InvalidRequest([("url", str(error))]) from error
    with context.database.write() as session:
        project_id = own_project_for(session, caller, project, now).id
        shown = without_secret(url)
        row = notices.put(session, context.secrets_key, project_id, url, shown, by=caller.owner, now=now)
        note(session, caller, "notices.set", project_id, now=now, detail={"url": shown})
        return NoticeUrl.of(row)


@router.delete("", status_code=204, responses=problems(404, 409))
def delete_notice_url(project: ProjectName, caller: Submitter, context: InContext) -> None:
    """Send no more notices about a project's runs."""
    now = context.now()
    with context.database.write() as session:
        project_id = _row(session, caller, project, "edit").project_id
        notices.remove(session, project_id)
        note(session, caller, "notices.delete", project_id, now=now, detail={})


@router.post("/test", status_code=204, responses=problems(404, 409))
def send_test_notice(project: ProjectName, caller: Submitter, context: InContext) -> None:
    """Send a notice that says that it is a test, at most 20 a minute; status 409 and the reason if it is refused."""
    with context.database.read() as session:
        row = _row(session, caller, project, "edit")
        url = notices.url_of(context.secrets_key, row)
    context.sign_in_limits.take(f"notices {row.project_id}")
    text = f"This is a test by {caller.owner}: notices about runs of the project arrive here. {context.settings.url}"
    failure = sending.send(url, text, {"type": "test"})
    if failure is not None:
        raise Conflict(f"{row.shown} did not accept the notice: {failure}")


def _row(session: Session, caller: Caller, project: str, action: Action) -> access_tables.NoticeUrl:
    row = notices.get(session, project_for(session, caller, project, action).id)
    if row is None:
        raise NotFound("this project has no URL for notices; set one: `moedisco notify set [--project PROJECT]`")
    return row
