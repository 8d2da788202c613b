"""The web page."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import FileResponse

from service.web import PAGE

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=FileResponse)
def page() -> FileResponse:
    """The page; it asks for everything it shows with the session's cookie."""
    return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})
