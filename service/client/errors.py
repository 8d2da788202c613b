"""Errors that the clients raise.

MoeDiscoError
├── ServiceAway          the service cannot be reached, or the connection was lost
├── ServiceProblem       the service answered with an error
│   └── RequestRefused   the service refused the request (HTTP 4xx); also a UserError
└── DownloadError        a download is damaged, unsafe, or cannot be written
"""
# ruff: noqa: N818 - named for what happened, not for being errors

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

import httpx
from pydantic import ValidationError

from moedisco_ray.core.errors import MoeDiscoError, UserError
from service.schemas import Problem

_DETAIL_CHARACTERS = 300
"""Maximum number of characters that an error quotes from the response of another program."""
_PROXY_STATUSES = {HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT}
"""Statuses that only proxies answer with. The service answers 503 itself."""


class ServiceAway(MoeDiscoError):
    """The service cannot be reached, or the connection was lost, for longer than the retry policy allows.

    Args:
        url: The service's URL.
        reason: The failure of the connection.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"no service answers at {self.url} ({' '.join(self.reason.split())}); "
            "start one with `moedisco serve`, or set MOEDISCO_URL to where it runs"
        )


class ServiceProblem(MoeDiscoError):
    """The service answered with an error.

    Args:
        problem: Problem document of the response.
        retry_after: Time that the service asks to wait before the next attempt, in seconds; None if the service does
            not name one.
    """

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        Exception.__init__(self, problem, retry_after)
        self.problem = problem
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    def __str__(self) -> str:
        mistakes = "; ".join(
            f"{mistake.field.removeprefix('config.')}: {mistake.message}" for mistake in self.problem.errors
        )
        text = mistakes or self.problem.detail or self.problem.title
        if self.status == HTTPStatus.UNAUTHORIZED:
            text += "; set MOEDISCO_TOKEN to a valid token"
        return " ".join(text.split())


class RequestRefused(ServiceProblem, UserError):
    """The service refuses the request (HTTP 4xx), such as for an invalid value or a missing right.

    `field` and `remedy` describe the first mistake in the request; `field` is empty if the service names no field.
    """

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        ServiceProblem.__init__(self, problem, retry_after)
        self.field = problem.errors[0].field if problem.errors else ""
        self.value = None
        self.remedy = problem.errors[0].message if problem.errors else problem.detail


class DownloadError(MoeDiscoError):
    """A download is damaged, would write outside its directory, or cannot be written to the disk."""


def problem_in(response: httpx.Response) -> ServiceProblem:
    """Make the error for an unsuccessful response.

    Args:
        response: A response with its body read; the body need not be a problem document.
    """
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except ValidationError:  # the response comes from a proxy or from another program at this URL
        text = _text_in(response)
        title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Unknown status"
        problem = Problem(
            type="about:blank", title=title, status=status, detail=f"HTTP {status} {title}: {text}".rstrip(": ")
        )
    is_refusal = response.is_client_error and status != HTTPStatus.TOO_MANY_REQUESTS
    return (RequestRefused if is_refusal else ServiceProblem)(problem, retry_after(response.headers))


def _text_in(response: httpx.Response) -> str:
    """The beginning of what another program says; nothing of a page, whose text repeats the status."""
    if response.status_code in _PROXY_STATUSES:
        return "a proxy gets no answer from the service; look at the service and its log"
    if "html" in response.headers.get("content-type", ""):
        return "a page, not an answer of the service; see that the URL is the service's"
    return " ".join(response.content.decode(errors="replace").split())[:_DETAIL_CHARACTERS]


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds to wait according to the `Retry-After` header (a number or a date); None if there is no valid header."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except ValueError:
        return None
