"""The service's branch of the error tree; each error knows the HTTP answer it becomes.

MoeDiscoError
└── ServiceError            500
    ├── BadRequest          400  the request is no JSON, or not even HTTP's idea of a request
    ├── Unauthorised        401  no token, or none that is valid
    ├── Forbidden           403  a valid token that may not do this
    │   └── AgainstPolicy   the operator's policy for this owner does not allow it
    ├── NotFound            404  absent, or another owner's
    ├── Conflict            409  the run's state does not allow it
    │   ├── IllegalTransition
    │   ├── StaleRun
    │   └── KeyReused
    ├── TooLarge            413
    ├── RangeUnsatisfiable  416
    ├── TooMany             429
    ├── DatabaseError       500
    │   └── DatabaseUnavailable  503
    ├── Overloaded          503
    └── RayUnavailable      503

A `UserError` of `moedisco_ray` becomes 422 with the field it names.
"""
# ruff: noqa: N818 - the names are those of the HTTP answers

from __future__ import annotations

from typing import ClassVar

from moedisco_ray.core.errors import MoeDiscoError


class ServiceError(MoeDiscoError):
    """Root of the branch.

    Args:
        detail: What happened and what to do about it, in one line, for the one who asked.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    slug: ClassVar[str] = "internal"
    """Names the kind of problem in `Problem.type`."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class BadRequest(ServiceError):
    """The request cannot be read."""

    status = 400
    title = "Bad request"
    slug = "bad-request"


class Unauthorised(ServiceError):
    """Nobody says who asks, or the token is unknown, expired or revoked."""

    status = 401
    title = "Not signed in"
    slug = "unauthorised"


class Forbidden(ServiceError):
    """The token is valid and does not allow this."""

    status = 403
    title = "Not allowed"
    slug = "forbidden"


class AgainstPolicy(Forbidden):
    """The operator's policy for this owner does not allow it.

    Args:
        field: Of the request, or of the policy where the request has no such field.
        value: What was asked for, or what is used already.
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
    """There is no such thing, or it is another owner's."""

    status = 404
    title = "Not found"
    slug = "not-found"


class Conflict(ServiceError):
    """The present state does not allow it."""

    status = 409
    title = "Conflict"
    slug = "conflict"


class IllegalTransition(Conflict):
    """A run's state may not follow its present one."""

    title = "Not from this state"
    slug = "illegal-transition"


class StaleRun(Conflict):
    """The run was changed by another request in between; asking again is safe."""

    title = "Changed meanwhile"
    slug = "stale-run"


class UnusableRun(Conflict):
    """A stored run's configuration is refused by this version of the software."""

    title = "Not usable by this version"
    slug = "unusable-run"


class KeyReused(Conflict):
    """An Idempotency-Key came with another body before."""

    title = "Idempotency key reused"
    slug = "key-reused"


class TooLarge(ServiceError):
    """The body is larger than the service takes."""

    status = 413
    title = "Too large"
    slug = "too-large"


class RangeUnsatisfiable(ServiceError):
    """None of the asked bytes are in the file.

    Args:
        size: Of the file, in bytes.
    """

    status = 416
    title = "Range not satisfiable"
    slug = "range-unsatisfiable"

    def __init__(self, size: int) -> None:
        super().__init__(f"the file has {size} bytes; none of those asked for are among them")
        self.size = size


class TooMany(ServiceError):
    """More requests than the limit.

    Args:
        detail: What the limit is.
        retry_after: Seconds after which one more request is taken.
    """

    status = 429
    title = "Too many requests"
    slug = "too-many-requests"

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class DatabaseError(ServiceError):
    """The database holds something it must not, or its migrations are not current."""

    title = "Database error"
    slug = "database"


class DatabaseUnavailable(DatabaseError):
    """The database does not answer, or gave up a transaction; asking again is safe."""

    status = 503
    title = "Database unavailable"
    slug = "database-unavailable"


class Overloaded(ServiceError):
    """More is under way than the service can hold; asking again later is safe."""

    status = 503
    title = "Overloaded"
    slug = "overloaded"


class RayUnavailable(ServiceError):
    """Ray does not answer."""

    status = 503
    title = "Ray unavailable"
    slug = "ray-unavailable"
