"""Recognises the drivers of runs, and signs the answers to their reports; see `moedisco_ray.core.driver_proofs`."""

from __future__ import annotations

import dataclasses
import re

from fastapi import Request, Response, Security
from fastapi.security import APIKeyHeader

from moedisco_ray.core.driver_proofs import PROOF_HEADER, Claim, answer_proof, content_digest
from service.api.context import ServiceContext
from service.api.problems import problem_response
from service.api.security import client_address
from service.database.tables import RunRow
from service.domain.run_paths import is_id
from service.domain.signatures import driver_key
from service.domain.states import ACTIVE
from service.errors import Gone, Unauthorised

_REPORT = re.compile(r"/v1/runs/([^/]+)/report")
DRIVER = [
    Security(
        APIKeyHeader(
            name=PROOF_HEADER,
            auto_error=False,
            scheme_name="driver",
            description="HMAC with the key of one attempt of a run.",
        )
    )
]
"""FastAPI dependencies that document, in the OpenAPI schema, that only the driver of a run may call a route."""


@dataclasses.dataclass(frozen=True)
class Driver:
    """A driver that has proved to know the key of its attempt, which may no longer be the run's current one.

    Attributes:
        nonce: Nonce of the request, which the answer's proof contains.
    """

    attempt: int
    nonce: str
    key: bytes = dataclasses.field(repr=False)

    def drives(self, run: RunRow | None) -> bool:
        """Whether a run, None if it was deleted, still belongs to this driver."""
        return run is not None and run.attempt == self.attempt and run.state in ACTIVE

    def signed(self, answer: Response) -> Response:
        """The answer with the proof that it comes from the driver's own service.

        Only such answers change what a driver does.
        """
        answer.headers[PROOF_HEADER] = answer_proof(self.key, self.nonce, answer.status_code, bytes(answer.body))
        return answer

    def dismissed(self, request: Request) -> Response:
        """The signed answer that ends this driver, because another may drive the run now."""
        return self.signed(problem_response(Gone("this is not the driver of the run's current attempt"), request))


def reported_run(path: str) -> str | None:
    """Id of the run to which a path takes reports; None for all other paths."""
    found = _REPORT.fullmatch(path)
    return None if found is None else found[1]


def check_driver(request: Request, context: ServiceContext, run_id: str, body: bytes | None = None) -> Driver:
    """Accept only a driver that this service has started.

    Args:
        request: A report.
        context: Objects of the application.
        run_id: Id of the run in the path of the request.
        body: Body of the report; None checks the headers only, before the body is read.

    Raises:
        Unauthorised: The proof is missing or wrong, or the body is not the signed one.
    """
    claim = Claim.of(request.headers)
    if claim is not None and is_id(run_id):
        key = driver_key(context.secret, run_id, claim.attempt)
        if claim.holds(key) and (body is None or claim.digest == content_digest(body)):
            return Driver(claim.attempt, claim.nonce, key)
    context.limits.take(f"address {client_address(request)}")
    raise Unauthorised("this takes reports of the run's own driver only")
