"""Proofs by which a run's driver and its service recognise each other; neither sends the key that both know.

The service derives a key for each attempt of a run from its own secret. It writes the key and its URL into a private
file, which the driver reads. A request carries a new nonce, and an HMAC of the nonce and of the body's digest. The
answer carries an HMAC of that nonce, the status and the answer's body. So other programs' answers, recorded answers and
an echo of the request prove nothing.

There is no time in a proof, because clocks of machines differ. A recorded request can be sent again, but it changes
nothing: its lines have numbers, and the service stores each line once.

The path of the request is not part of the proof, because a proxy may add or remove a prefix. A key belongs to one
attempt of one run, and each proof begins with words that say what it signs.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from typing import Self

ATTEMPT_HEADER = "X-MoeDisco-Attempt"
NONCE_HEADER = "X-MoeDisco-Nonce"
PROOF_HEADER = "X-MoeDisco-Proof"
DIGEST_HEADER = "Content-Digest"
"""Digest of the body as in RFC 9530. The proof covers this header, so that a request can be refused before its body is
read."""
NONCE_BYTES = 16
_NONCE = re.compile(rf"[0-9a-f]{{{2 * NONCE_BYTES}}}")
_ATTEMPT = re.compile(r"[0-9]{1,9}")


@dataclasses.dataclass(frozen=True)
class ReportAddress:
    """Where the driver of an attempt reports, as its service wrote it into a file.

    Attributes:
        url: URL that takes the reports.
        attempt: Attempt of the run, from 1.
        key: Key of the attempt's driver.
        secrets: Names of the secrets that the driver asks for when it starts.
    """

    url: str
    attempt: int
    key: bytes = dataclasses.field(repr=False)
    secrets: tuple[str, ...] = ()

    def to_json(self) -> str:
        content = {"url": self.url, "attempt": self.attempt, "key": self.key.hex(), "secrets": self.secrets}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the content of the file.

        Raises:
            ValueError: The text is not an address.
        """
        try:
            raw = json.loads(text)
            named = tuple(map(str, raw.get("secrets", ())))
            return cls(str(raw["url"]), int(raw["attempt"]), bytes.fromhex(raw["key"]), named)
        except (LookupError, TypeError) as error:
            raise ValueError("not the address of a service") from error


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the headers of a report say; see `holds`.

    Attributes:
        attempt: Attempt of the driver that sends the report.
        nonce: Random text that the answer's proof must contain.
        digest: Digest of the body.
        proof: Proof by the driver.
    """

    attempt: int
    nonce: str
    digest: str
    proof: str

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Self | None:
        """The claim in the headers of a request, whose names have any case; None if one is missing or malformed."""
        attempt, nonce = headers.get(ATTEMPT_HEADER, ""), headers.get(NONCE_HEADER, "")
        digest, proof = headers.get(DIGEST_HEADER, ""), headers.get(PROOF_HEADER, "")
        if not (_ATTEMPT.fullmatch(attempt) and _NONCE.fullmatch(nonce)):
            return None
        return cls(int(attempt), nonce, digest, proof)

    def holds(self, key: bytes) -> bool:
        """Whether someone who knows the key of the attempt made these headers; compared in constant time."""
        return _equal(self.proof, _request_proof(key, self.nonce, self.digest))


def request_headers(address: ReportAddress, nonce: str, body: bytes) -> dict[str, str]:
    """Headers with which a driver sends a report.

    Args:
        address: The service and the key.
        nonce: A new random text of `NONCE_BYTES` bytes in lower-case hexadecimal digits.
        body: Body of the report.
    """
    digest = content_digest(body)
    return {
        ATTEMPT_HEADER: str(address.attempt),
        NONCE_HEADER: nonce,
        DIGEST_HEADER: digest,
        PROOF_HEADER: _request_proof(address.key, nonce, digest),
    }


def secrets_place(nonce: str) -> str:
    """Place for which the secrets in the answer to a request are sealed, with the key of the attempt."""
    return f"secrets in the answer to {nonce}"


def content_digest(body: bytes) -> str:
    """Value of the header `Content-Digest`."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def answer_proof(key: bytes, nonce: str, status: int, body: bytes) -> str:
    """Proof with which the service signs its answer to the request that had a nonce."""
    return _proof(key, "answer to a report", nonce, str(status), content_digest(body))


def is_proven(proof: str, key: bytes, nonce: str, status: int, body: bytes) -> bool:
    """Whether a service that knows the key sent the answer to the request with the nonce; compared in constant time."""
    return _equal(proof, answer_proof(key, nonce, status, body))


def _request_proof(key: bytes, nonce: str, digest: str) -> str:
    return _proof(key, "report", nonce, digest)


def _proof(key: bytes, *parts: str) -> str:
    return hmac.new(key, "\n".join(parts).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _equal(given: str, expected: str) -> bool:
    # `compare_digest` refuses texts with other letters than ASCII.
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())
