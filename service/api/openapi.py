"""OpenAPI document with responses, problems, examples and links between operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from service.api.problems import MEDIA_TYPE
from service.schemas import DatasetRequest, EstimateRequest, Problem, Report, RetryRequest, RunRequest

Responses = dict[int | str, dict[str, Any]]

_DESCRIPTION = """\
Control service of MoEDisCo training runs on Ray: submit a configuration, watch it train, and fetch the model.

Sign in with `Authorization: Bearer TOKEN`. Errors are problem documents (RFC 9457); `errors` names each field that is
not valid, with the messages of `moedisco validate`. Times are seconds since the epoch, UTC. The headers `RateLimit` and
`RateLimit-Policy` say how many requests the token may send in a minute, and how many are left; with status 429,
`Retry-After` says when to try again.
"""
_TAGS = ("runs", "watching", "files", "datasets", "planning", "projects", "policies", "access", "operations")
_MEANINGS = {
    400: "The request is not JSON.",
    401: "The request has no valid token or session.",
    403: "The token, or the caller's role in the project, does not allow this.",
    404: "The object does not exist, or the caller may not see it.",
    409: "The current state does not allow this.",
    410: "The run has another driver, has ended or was deleted.",
    412: "The run has another version than `If-Match` names.",
    413: "The body is too large.",
    416: "None of the requested bytes are in the file.",
    422: "A field is not valid; `errors` names it and says what to do.",
    429: "Too many requests; `Retry-After` says when to try again.",
    500: "An error in the service.",
    503: "The database or Ray does not answer, or the service is overloaded.",
    507: "The disk of the service is full; what has arrived is kept.",
}
_REFERRED = (DatasetRequest, EstimateRequest, Problem, Report, RetryRequest, RunRequest)
"""Schemas that routes refer to only by name, so that FastAPI does not find them."""
_ALWAYS = (401, 403, 422, 429, 500, 503)
_WITH_BODY = (400, 413)


def problems(*statuses: int, body: bool = False) -> Responses:
    """Document a route's error responses, by their statuses: the given ones and those that every route can return.

    With `body`, the statuses for a request body that is too large or is not JSON are added.
    """
    every = {*_ALWAYS, *statuses, *(_WITH_BODY if body else ())}
    return {status: _problem(status) for status in sorted(every)}


ETAG: dict[str, Any] = {"ETag": {"description": "Version of the run, for `If-Match`.", "schema": {"type": "string"}}}
"""Documentation of the header of answers with one run."""


def versioned(status: int, description: str) -> Responses:
    """Documentation of a successful answer with one run."""
    return {status: {"description": description, "headers": ETAG}}


def body_of(schema: str, *, required: bool = True) -> dict[str, Any]:
    """Documentation of a JSON body that the route itself parses."""
    return {
        "requestBody": {
            "required": required,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }
    }


def content(media_type: str, description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """Documentation of a response that is not JSON."""
    return {
        "description": description,
        "content": {media_type: {"schema": schema or {"type": "string", "format": "binary"}}},
    }


def links(*operations: str, parameter: str = "run_id") -> dict[str, Any]:
    """Links from the response that creates an object to operations that take the object's id as path parameter."""
    return {
        operation: {"operationId": operation, "parameters": {parameter: "$response.body#/id"}}
        for operation in operations
    }


def operation_id(route: APIRoute) -> str:
    """Id of an operation: the name of its function."""
    return route.name


def document(routes: Sequence[BaseRoute], version: str) -> dict[str, Any]:
    """The OpenAPI document of routes, at a version of the package."""
    found = get_openapi(
        title="MoEDisCo control service",
        version=version,
        description=_DESCRIPTION,
        routes=routes,
        tags=[{"name": name} for name in _TAGS],
    )
    schemas = found["components"]["schemas"]
    _, referred = models_json_schema(
        [(model, "validation") for model in _REFERRED], ref_template="#/components/schemas/{model}"
    )
    schemas.update(referred["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return found


def _problem(status: int) -> dict[str, Any]:
    documented: dict[str, Any] = {
        "description": _MEANINGS[status],
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status in (429, 503):
        documented["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return documented
