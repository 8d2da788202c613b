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

from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import UserError, masked
from service.api.responses import SECURITY_HEADERS
from service.errors import AgainstPolicy, BadRequest, RangeUnsatisfiable, ServiceError, TooMany, Unauthorised
from service.schemas import Mistake

MEDIA_TYPE = "application/problem+json"
_LONGEST_VALUE = 200
_LONGEST_SEARCHED = 10_000


def handle_problems(app: FastAPI) -> None:
    """Install handlers that turn every error, including those of the router, into a problem document."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)


def problem_response(error: ServiceError, request: Request) -> Response:
    """Response for an error."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorised):
        headers["WWW-Authenticate"] = 'Bearer realm="moedisco"'
    if isinstance(error, TooMany):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, RangeUnsatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "2"
    mistakes: tuple[Mistake, ...] = ()
    if isinstance(error, AgainstPolicy):
        mistakes = (Mistake(field=error.field, message=_words(error.value, error.remedy)),)
    return _response(
        request, error.status, slug=error.slug, title=error.title, detail=error.detail, errors=mistakes, headers=headers)


def mistakes_in(error: UserError) -> list[Mistake]:
    """The mistakes that a `UserError` reports in a run's configuration; their fields in the request begin with `config`."""
    return [
        Mistake(field=f"config.{each.field}" if each.field else "config", message=_words(each.value, each.remedy))
        for each in (error, *error.others)]


def mistakes_of(found: Sequence[Mapping[str, Any]]) -> list[Mistake]:
    """Mistakes for FastAPI's validation errors; for a run's configuration they have the words of `moedisco validate`."""
    config = [
        {**mistake, "loc": mistake["loc"][2:]}
        for mistake in found if mistake["loc"][:2] == ("body", "config")]
    others = [_mistake(mistake) for mistake in found if mistake["loc"][:2] != ("body", "config")]
    if config and not (len(config) == 1 and not config[0]["loc"] and config[0]["type"] != "value_error"):
        return [*mistakes_in(first_mistake(config)), *others]
    return [*(_mistake({**mistake, "loc": ("body", "config")}) for mistake in config), *others]


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - as registered
    return problem_response(error, request)


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)  # noqa: S101 - as registered
    return _invalid(request, mistakes_in(error))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as registered
    return _invalid(request, mistakes_of(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered
    status = HTTPStatus(error.status_code)
    details: Any = error.detail
    if isinstance(details, list):
        return _invalid(request, mistakes_of(details))
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
        request, status, slug=status.phrase.lower().replace(" ", "-"), title=status.phrase, detail=detail, headers=headers)


async def _unforeseen(request: Request, error: Exception) -> Response:
    del error   # the server logs the error; its text may contain secrets
    # The middleware that adds these headers does not see this response.
    return _response(
        request, 500, slug=ServiceError.slug, title=ServiceError.title,
        detail="the service failed; its log has the cause under the request's id",
        headers=SECURITY_HEADERS)


def _methods(request: Request) -> set[str]:
    """Methods that any route allows at the request's path; the router reports only those of the first matching route."""
    # In a mounted application, `root_path` is the path of the mount; routes match against the `root_path` of the outer application.
    scope = {**request.scope, "root_path": request.scope.get("app_root_path", "")}
    return {
        method for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        for route in request.app.routes if route.matches({**scope, "method": method})[0] is Match.FULL
        and (method in ("GET", "HEAD") or not isinstance(route, Mount))}


def _invalid(request: Request, mistakes: list[Mistake]) -> Response:
    first = f"{mistakes[0].field}: {mistakes[0].message}"
    detail = first if len(mistakes) == 1 else f"{len(mistakes)} mistakes; the first: {first}"
    return _response(request, 422, slug="invalid", title="Invalid request", detail=detail, errors=mistakes)


def _response(
    request: Request, status: int, *, slug: str, title: str, detail: str, errors: Sequence[Mistake] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    problem = {
        "type": f"urn:moedisco:problem:{slug}", "title": title, "status": int(status), "detail": detail,
        "instance": _plain_path(request), "errors": [{"field": mistake.field, "message": mistake.message} for mistake in errors]}
    # `json.dumps` escapes all but ASCII, because a request may contain text that UTF-8 cannot encode.
    text = json.dumps(problem)
    return Response(text, status, headers={"Cache-Control": "no-store", **(headers or {})}, media_type=MEDIA_TYPE)


def _mistake(found: Mapping[str, Any]) -> Mistake:
    parts = [str(part) for part in found["loc"]]
    field = ".".join(parts[1:]) or parts[0]
    match found["type"]:
        case "missing":
            return Mistake(field=field, message="is missing")
        case "extra_forbidden":
            return Mistake(field=field, message="no such field; remove it")
        case "model_attributes_type" | "model_type" if found["loc"] == ("body",):
            return Mistake(field=field, message="must be a JSON object, with the header Content-Type: application/json")
        case _:
            return Mistake(field=field, message=_words(_scalar(found.get("input")), plain_words(found)))


def _scalar(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_SEARCHED:
        return None     # do not quote a value that is too long to be searched for credentials
    return value if isinstance(value, str | int | float | bool) else None


def _words(value: Any, remedy: str) -> str:
    if value is None:
        return remedy.replace("\n", " ")
    shown = masked(repr(value))
    if len(shown) > _LONGEST_VALUE:
        shown = shown[:_LONGEST_VALUE] + "..."
    return f"{shown}: {remedy}".replace("\n", " ")


def _plain_path(request: Request) -> str:
    return quote(request.scope["path"], errors="replace")
