"""The web page."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import FileResponse

from service.api.headers import SECURITY_HEADERS
from service.web import PAGE, REFERENCE

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=FileResponse)
def page() -> FileResponse:
    """The page; it asks for everything it shows with the session's cookie."""
    return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})


@router.get("/reference", response_class=FileResponse)
def reference() -> FileResponse:
    """The reference of the REST API."""
    # Swagger UI's icons are part of its style sheet.
    policy = f"{SECURITY_HEADERS['Content-Security-Policy']}; img-src 'self' data:"
    return FileResponse(
        REFERENCE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache", "Content-Security-Policy": policy})
