"""The dialogue behind most methods: ask until there is an answer, or patience is over."""

from __future__ import annotations

from typing import TypeVar

import httpx

from moedisco_ray.core.errors import MoeDiscoError
from service.client.calls import Answer, Call, Dialogue, Send
from service.client.errors import ServiceAway, ServiceProblem, problem_in
from service.client.patience import PASSING, Attempts, Patience, retry_after
from service.schemas import Problem

T = TypeVar("T")


def ask(call: Call[T], patience: Patience, url: str) -> Dialogue[T]:
    """Send a call; what is safe to send again is sent again while the failure may pass.

    Args:
        call: The request.
        patience: How long to try.
        url: The service's, for messages.

    Raises:
        ServiceProblem: The service answered with a problem.
        ServiceAway: It cannot be reached.
    """
    attempts = Attempts(patience)
    pause = 0.0
    while True:
        try:
            answer = yield Send(call, pause)
        except httpx.TransportError as error:
            pause = next_pause(attempts if call.repeatable else None, away(url, error))
            continue
        if answer.status < 300:
            return parsed(call, answer)
        pause = after_refusal(attempts if call.repeatable else None, answer)


def after_refusal(attempts: Attempts | None, answer: Answer, passing: frozenset[int] = PASSING) -> float:
    """Seconds to wait before asking again after an unsuccessful answer.

    Args:
        attempts: None: do not ask again.
        answer: What came.
        passing: Statuses that a later attempt may not meet.

    Raises:
        ServiceProblem: Asking again is of no use, or patience is over.
    """
    failure = problem_in(answer)
    return next_pause(attempts if answer.status in passing else None, failure, retry_after(answer.headers))


def next_pause(attempts: Attempts | None, failure: MoeDiscoError, asked: float | None = None) -> float:
    """Seconds to wait before the next attempt; raises `failure` where there is none."""
    pause = attempts.pause(asked) if attempts is not None else None
    if pause is None:
        raise failure
    return pause


def away(url: str, error: httpx.TransportError) -> ServiceAway:
    """The error for a connection that died."""
    return ServiceAway(url, str(error) or type(error).__name__)


def parsed(call: Call[T], answer: Answer) -> T:
    """The answer's value.

    Raises:
        ServiceProblem: What answers is not this service, or one too new for this client.
    """
    try:
        return call.parse(answer)
    except ValueError as error:
        raise ServiceProblem(Problem(
            type="about:blank", title="Unreadable answer", status=answer.status,
            detail=f"the answer to {call.method} {call.path} is not understood; is MOEDISCO_URL that of a MoeDisco service, "
            "and as new as this client?")) from error
