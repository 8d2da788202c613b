"""A join token: where the head is, and an ssh certificate that opens one tunnel to it. And the offer that the head answers with."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import time
import zlib
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moedisco_ray.core.errors import ConfigError

_PREFIX = "mdj1."
_FIRST_DEVICE = 7700
"""Number of the tunnel device before the first one, so that other tunnels of a machine keep theirs."""
_FIRST_ADDRESS = 256
"""Position in the network before the first machine's address; the head has position 1."""
_MOST_BYTES = 1 << 16
"""Maximum size of a decoded token (bytes)."""


class JoinToken(BaseModel):
    """Everything that a machine needs to reach the head once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    """Name or address of the head, reachable from the machine."""
    port: int
    host_key: str
    """Public key of the head's sshd."""
    user: str
    slot: int
    """Number of the tunnel, from 1."""
    network: str
    """Network of the tunnels' addresses."""
    key: str
    """Private key."""
    certificate: str
    expires: float
    """Time until which the certificate opens a connection (Unix time)."""

    @property
    def device(self) -> int:
        """Number N of the device tunN on both ends."""
        return _FIRST_DEVICE + self.slot

    @property
    def head_address(self) -> str:
        """The head's address in the tunnel."""
        return address(self.network, 0)

    @property
    def own_address(self) -> str:
        """The machine's address in the tunnel."""
        return address(self.network, self.slot)

    def encoded(self) -> str:
        """The token as one word."""
        return _PREFIX + base64.urlsafe_b64encode(zlib.compress(self.model_dump_json().encode(), 9)).decode()

    @classmethod
    def decode(cls, text: str, now: float | None = None) -> Self:
        """Read a token.

        Args:
            text: The word that `join-token` printed.
            now: Current time (Unix time); None: the clock's.

        Raises:
            ConfigError: It is no token, or it has expired.
        """
        word = text.strip()
        unpacking = zlib.decompressobj()
        try:
            prefix, packed = word[:len(_PREFIX)], base64.b64decode(word[len(_PREFIX):], altchars=b"-_", validate=True)
            content = unpacking.decompress(packed, _MOST_BYTES)
            token = cls.model_validate_json(content if unpacking.eof and prefix == _PREFIX else b"")
        except (binascii.Error, zlib.error, ValidationError, ValueError) as error:
            raise ConfigError(
                "TOKEN", shortened(text), "is not a join token; copy the whole word that `moedisco join-token` printed") from error
        if token.expires <= (time.time() if now is None else now):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(token.expires))
            raise ConfigError("TOKEN", shortened(text), f"expired at {when}; ask for a new one (`moedisco join-token` on the head)")
        return token


class Offer(BaseModel):
    """What the head answers to a machine that the tunnel connects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_address: str
    """HOST:PORT of the Ray cluster."""
    ray_token: str | None
    """Token of the Ray cluster; null: it has none."""
    versions: dict[str, str]
    """Versions of Python and of packages that all nodes of a Ray cluster must share."""

    @property
    def ray_host(self) -> str:
        """Address of the head in its own network."""
        return self.ray_address.rpartition(":")[0]


def address(network: str, slot: int) -> str:
    """Address in the tunnels' network of a slot's machine; of the head for slot 0."""
    return str(ipaddress.IPv4Network(network)[_FIRST_ADDRESS + slot if slot else 1])


def device_name(slot: int) -> str:
    """Name of a slot's tunnel device on the head."""
    return f"tun{_FIRST_DEVICE + slot}"


def shortened(text: str) -> str:
    """The start of a token, which identifies it without revealing it."""
    return text if len(text) <= len(_PREFIX) + 6 else f"{text[:len(_PREFIX) + 6]}..."
