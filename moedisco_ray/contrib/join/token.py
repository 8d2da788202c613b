"""The join token and the head's answer, the offer.

The token has the head's address, and an ssh certificate that opens one tunnel to it.
"""

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
FIRST_DEVICE = 7700
"""Offset of the tunnel devices' numbers: a high number, so that they do not collide with other tunnels of a machine."""
_FIRST_ADDRESS = 256
"""Offset of the joined machines' addresses in the tunnel's network: machine N has host number 256 + N, and the head has
1."""
_MOST_BYTES = 1 << 16
"""Maximum size of a decoded token (bytes)."""


class JoinToken(BaseModel):
    """All data that a machine needs to connect to the head once; it brings a key of its own for later connections."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    """Name or address of the head, reachable from the machine."""
    port: int
    host_key: str
    """Public host key of the head's sshd."""
    user: str
    slot: int
    """Number of the tunnel, counted from 1."""
    network: str
    """IP network of the tunnels' addresses, such as 10.97.0.0/16."""
    key: str
    """Private ssh key that belongs to the certificate."""
    certificate: str
    expires: float
    """Time after which the certificate opens no new connection (Unix time)."""

    @property
    def device(self) -> int:
        """Number N of the tunnel device tunN, the same on both ends."""
        return FIRST_DEVICE + self.slot

    @property
    def head_address(self) -> str:
        """The head's address in the tunnel."""
        return address(self.network, 0)

    @property
    def own_address(self) -> str:
        """The machine's address in the tunnel."""
        return address(self.network, self.slot)

    def encoded(self) -> str:
        """Encode the token as one word of ASCII text."""
        return _PREFIX + base64.urlsafe_b64encode(zlib.compress(self.model_dump_json().encode(), 9)).decode()

    @classmethod
    def decode(cls, text: str, now: float | None = None) -> Self:
        """Read a token.

        Args:
            text: The word that `moedisco join-token` printed.
            now: Current Unix time; by default, the clock is read.

        Raises:
            ConfigError: The text is not a join token, or the token has expired.
        """
        word = text.strip()
        unpacking = zlib.decompressobj()
        try:
            prefix, packed = word[: len(_PREFIX)], base64.b64decode(word[len(_PREFIX) :], altchars=b"-_", validate=True)
            content = unpacking.decompress(packed, _MOST_BYTES)
            token = cls.model_validate_json(content if unpacking.eof and prefix == _PREFIX else b"")
        except (binascii.Error, zlib.error, ValidationError, ValueError) as error:
            raise ConfigError(
                "TOKEN", shortened(text), "is not a join token; copy the whole word that `moedisco join-token` printed"
            ) from error
        if token.expires <= (time.time() if now is None else now):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(token.expires))
            raise ConfigError(
                "TOKEN", shortened(text), f"expired at {when}; ask for a new one (`moedisco join-token` on the head)"
            )
        return token


class Offer(BaseModel):
    """The head's answer to a machine that has opened its tunnel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_address: str
    """HOST:PORT of the Ray cluster."""
    ray_token: str | None
    """Authentication token of the Ray cluster; null: the Ray cluster needs none."""
    versions: dict[str, str]
    """The head's versions of Python and of packages; all nodes of the Ray cluster must have the same ones."""

    @property
    def ray_host(self) -> str:
        """The head's address in its own network: the host of `ray_address`."""
        return self.ray_address.rpartition(":")[0]


def address(network: str, slot: int) -> str:
    """Tunnel address of the machine in a slot; slot 0 is the head."""
    return str(ipaddress.IPv4Network(network)[_FIRST_ADDRESS + slot if slot else 1])


def device_name(slot: int) -> str:
    """Name of a slot's tunnel device on the head."""
    return f"tun{FIRST_DEVICE + slot}"


def shortened(text: str) -> str:
    """The start of a token, which identifies it without revealing it."""
    return text if len(text) <= len(_PREFIX) + 6 else f"{text[: len(_PREFIX) + 6]}..."
