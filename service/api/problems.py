"""Converts every error into a problem document (RFC 9457)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from moedisco_ray.core.errors import UserError
from service.api.responses import SECURITY_HEADERS
from service.errors import (
    AgainstPolicy,
    BadRequest,
    InvalidRequest,
    RangeUnsatisfiable,
    ServiceError,
    TooMany,
    Unauthorised,
)
from service.schemas.mistakes import in_words, mistakes_in, mistakes_of

MEDIA_TYPE = "application/problem+json"


def handle_problems(app: FastAPI) -> None:
    """Install handlers that turn every error, including those of the router, into a problem document."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)


def problem_response(error: ServiceError, request: Request) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorised):
        headers["WWW-Authenticate"] = 'Bearer realm="moedisco"'
    if isinstance(error, TooMany):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, RangeUnsatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "2"
    mistakes: Sequence[tuple[str, str]] = ()
    if isinstance(error, AgainstPolicy):
        mistakes = ((error.field, in_words(error.value, error.remedy)),)
    elif isinstance(error, InvalidRequest):
        mistakes = error.mistakes
    return _response(
        request, error.status, slug=error.slug, title=error.title, detail=error.detail, errors=mistakes, headers=headers
    )


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - as registered
    return problem_response(error, request)


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)  # noqa: S101 - as registered
    return problem_response(InvalidRequest(mistakes_in(error)), request)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as registered
    return problem_response(InvalidRequest(mistakes_of(error.errors())), request)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered
    status = HTTPStatus(error.status_code)
    mistakes: Any = error.detail
    if isinstance(mistakes, tuple):
        return problem_response(InvalidRequest(mistakes), request)
    if status == HTTPStatus.BAD_REQUEST:
        return problem_response(BadRequest(str(error.detail)), request)
    detail = {
        HTTPStatus.NOT_FOUND: f"there is nothing at {_plain_path(request)}",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{request.method} is not allowed at {_plain_path(request)}",
    }.get(status, str(error.detail))
    headers = dict(error.headers or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return _response(
        request,
        status,
        slug=status.phrase.lower().replace(" ", "-"),
        title=status.phrase,
        detail=detail,
        headers=headers,
    )


async def _unforeseen(request: Request, error: Exception) -> Response:
    del error  # the server logs the error; its text may contain secrets
    # The middleware that adds these headers does not see this response.
    return _response(
        request,
        500,
        slug=ServiceError.slug,
        title=ServiceError.title,
        detail="the service failed; its log has the cause under the request's id",
        headers=SECURITY_HEADERS,
    )


def _methods(request: Request) -> set[str]:
    """Methods that any route allows at the request's path; the router knows only those of the first matching route."""
    # In a mounted application, `root_path` is the path of the mount; routes match against the `root_path` of the outer
    # application.
    scope = {**request.scope, "root_path": request.scope.get("app_root_path", "")}
    return {
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        for route in request.app.routes
        if route.matches({**scope, "method": method})[0] is Match.FULL
        and (method in ("GET", "HEAD") or not isinstance(route, Mount))
    }


def _response(
    request: Request,
    status: int,
    *,
    slug: str,
    title: str,
    detail: str,
    errors: Sequence[tuple[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    problem = {
        "type": f"urn:moedisco:problem:{slug}",
        "title": title,
        "status": int(status),
        "detail": detail,
        "instance": _plain_path(request),
        "errors": [{"field": field, "message": message} for field, message in errors],
    }
    # `json.dumps` escapes all but ASCII, because a request may contain text that UTF-8 cannot encode.
    text = json.dumps(problem)
    return Response(text, status, headers={"Cache-Control": "no-store", **(headers or {})}, media_type=MEDIA_TYPE)


def _plain_path(request: Request) -> str:
    return quote(request.scope["path"], errors="replace")
