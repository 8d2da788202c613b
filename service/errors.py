"""Errors of the service, each with its HTTP status.

A `UserError` of `moedisco_ray` becomes 422 with the field that it names.
"""
# ruff: noqa: N818 - the names are those of the HTTP statuses

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from moedisco_ray.core.errors import MoeDiscoError


class ServiceError(MoeDiscoError):
    """Base of the service's errors.

    Args:
        detail: What happened and what to do about it, in one line.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    slug: ClassVar[str] = "internal"
    """Last part of `Problem.type`."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class BadRequest(ServiceError):
    """The request cannot be read."""

    status = 400
    title = "Bad request"
    slug = "bad-request"


class Unauthorised(ServiceError):
    """The request has no token, or the token is unknown, expired or revoked."""

    status = 401
    title = "Not signed in"
    slug = "unauthorised"


class Forbidden(ServiceError):
    """The token is valid but does not allow the request."""

    status = 403
    title = "Not allowed"
    slug = "forbidden"


class AgainstPolicy(Forbidden):
    """The operator's policy for this owner does not allow the request.

    Args:
        field: Field of the request or, if it has no such field, of the policy.
        value: Requested value, or the amount already used.
        remedy: The limit, and what to do.
    """

    title = "Against the policy"
    slug = "policy"

    def __init__(self, field: str, value: str | float, remedy: str) -> None:
        super().__init__(f"{field}: {value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


class NotFound(ServiceError):
    """The object does not exist, or the caller may not see it."""

    status = 404
    title = "Not found"
    slug = "not-found"


class Conflict(ServiceError):
    """The current state of the object does not allow the request."""

    status = 409
    title = "Conflict"
    slug = "conflict"


class IllegalTransition(Conflict):
    """The run cannot enter this state from its current one."""

    title = "Illegal state change"
    slug = "illegal-transition"


class StaleRun(Conflict):
    """Another request changed the run in the meantime; it is safe to repeat the request."""

    title = "Run changed"
    slug = "stale-run"


class UnusableRun(Conflict):
    """This version of the software refuses the stored configuration of a run."""

    title = "Not usable by this version"
    slug = "unusable-run"


class KeyReused(Conflict):
    """The Idempotency-Key was used before with another request."""

    title = "Idempotency key reused"
    slug = "key-reused"


class Gone(ServiceError):
    """The caller's role has ended for good."""

    status = 410
    title = "Gone"
    slug = "gone"


class PreconditionFailed(ServiceError):
    """The run has another version than the request is about."""

    status = 412
    title = "Another version"
    slug = "precondition-failed"


class TooLarge(ServiceError):
    """The body of the request is larger than allowed."""

    status = 413
    title = "Too large"
    slug = "too-large"


class RangeUnsatisfiable(ServiceError):
    """The requested byte range is outside of the file.

    Args:
        size: Size of the file (bytes).
    """

    status = 416
    title = "Range not satisfiable"
    slug = "range-unsatisfiable"

    def __init__(self, size: int) -> None:
        super().__init__(f"the file has {size} bytes; none of the requested bytes are in it")
        self.size = size


class InvalidRequest(ServiceError):
    """Fields of the request are not valid.

    Args:
        mistakes: Dotted path and message of each mistake, at least one.
    """

    status = 422
    title = "Invalid request"
    slug = "invalid"

    def __init__(self, mistakes: Sequence[tuple[str, str]]) -> None:
        first = ": ".join(mistakes[0])
        super().__init__(first if len(mistakes) == 1 else f"{len(mistakes)} mistakes; the first: {first}")
        self.mistakes = tuple(mistakes)


class TooCostly(ServiceError):
    """Planning a configuration takes more time or memory than one request may use."""

    status = 422
    title = "Too costly to plan"
    slug = "too-costly"


class TooMany(ServiceError):
    """The caller exceeds the rate limit.

    Args:
        detail: The limit, and what to do.
        retry_after: Time after which one more request is accepted, in seconds.
    """

    status = 429
    title = "Too many requests"
    slug = "too-many-requests"

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class DatabaseError(ServiceError):
    """The database has the wrong schema revision or contains invalid data."""

    title = "Database error"
    slug = "database"


class DatabaseUnavailable(DatabaseError):
    """The database does not answer or aborted a transaction; it is safe to repeat the request."""

    status = 503
    title = "Database unavailable"
    slug = "database-unavailable"


class LeaseLost(DatabaseError):
    """Another replica of the service may do the background work now."""

    title = "Lease lost"
    slug = "lease-lost"


class Overloaded(ServiceError):
    """The service is overloaded; it is safe to repeat the request later."""

    status = 503
    title = "Overloaded"
    slug = "overloaded"


class StorageUnavailable(ServiceError, OSError):
    """The storage of a run does not answer, or refuses access."""

    status = 503
    title = "Storage unavailable"
    slug = "storage-unavailable"


class RayUnavailable(ServiceError):
    """Ray does not answer."""

    status = 503
    title = "Ray unavailable"
    slug = "ray-unavailable"


class StorageFull(ServiceError, OSError):
    """The disk of the service is full; what has arrived is kept."""

    status = 507
    title = "Storage full"
    slug = "storage-full"
