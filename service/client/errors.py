"""What goes wrong between a program and the service.

MoeDiscoError
├── ServiceAway          nobody answers at the address, or no longer
├── ServiceProblem       it answers with a problem document
│   └── RequestRefused   because of what was asked: also a UserError
└── DownloadError        what came is not what can be kept
"""
# ruff: noqa: N818 - named for what happened, not for being errors

from __future__ import annotations

from http import HTTPStatus

from pydantic import ValidationError

from moedisco_ray.core.errors import MoeDiscoError, UserError
from service.client.calls import Answer
from service.schemas import Problem

_LONGEST_DETAIL = 300


class ServiceAway(MoeDiscoError):
    """The service cannot be reached, or stayed silent for longer than patience lasts.

    Args:
        url: Its address.
        reason: What the connection died of.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"no service answers at {self.url} ({' '.join(self.reason.split())}); "
            "start one with `moedisco serve`, or set MOEDISCO_URL to where it runs")


class ServiceProblem(MoeDiscoError):
    """The service answered, and not with what was asked for.

    Args:
        problem: Its own account.
    """

    def __init__(self, problem: Problem) -> None:
        Exception.__init__(self, problem)
        self.problem = problem

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.problem.status

    def __str__(self) -> str:
        mistakes = "; ".join(f"{mistake.field.removeprefix('config.')}: {mistake.message}" for mistake in self.problem.errors)
        text = mistakes or self.problem.detail or self.problem.title
        if self.status == HTTPStatus.UNAUTHORIZED:
            text += "; set MOEDISCO_TOKEN to a valid token"
        return " ".join(text.split())


class RequestRefused(ServiceProblem, UserError):
    """What was asked cannot be done; asking differently can help.

    `field` and `remedy` are those of the first mistake; `field` is empty where the service names none.
    """

    def __init__(self, problem: Problem) -> None:
        ServiceProblem.__init__(self, problem)
        self.field = problem.errors[0].field if problem.errors else ""
        self.value = None
        self.remedy = problem.errors[0].message if problem.errors else problem.detail


class DownloadError(MoeDiscoError):
    """An archive that must not be unpacked, a file of another size than was said, or a disk that is full."""


def problem_in(answer: Answer) -> ServiceProblem:
    """The error that an answer tells of, whether or not it holds a problem document."""
    try:
        problem = Problem.model_validate_json(answer.body, extra="ignore")
    except ValidationError:  # a proxy's page, or another program at this address
        text = " ".join(answer.body.decode(errors="replace").split())[:_LONGEST_DETAIL]
        title = HTTPStatus(answer.status).phrase if answer.status in set(HTTPStatus) else "Unknown answer"
        problem = Problem(
            type="about:blank", title=title, status=answer.status, detail=f"HTTP {answer.status} {title}: {text}".rstrip(": "))
    asked_wrongly = 400 <= answer.status < 500 and answer.status != HTTPStatus.TOO_MANY_REQUESTS
    return RequestRefused(problem) if asked_wrongly else ServiceProblem(problem)
