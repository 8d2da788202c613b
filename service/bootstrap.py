"""Creates secrets and tokens directly in the database.

At start-up these are the secrets of the service and the first administrator's token; an operator can make more tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.secret_file import kept_secret
from service.database import audit, shared_secrets, tokens
from service.database.access_tables import Token
from service.database.session import Database
from service.process import SECRET_FILES, make_private
from service.schemas import Scope
from service.schemas.access import NewToken, TokenRequest
from service.settings import Settings

OWNER = "admin"
_ALL: list[Scope] = ["read", "submit", "admin"]
_USABLE = re.compile(r"[\x21-\x7e]{32,256}")
_DAY = 86400.0
_SECRET_BYTES = 32
_OPTIONS = {"name": "NAME", "owner": "--owner", "scopes": "--scope", "expires_in_days": "--days"}
"""Command-line option for each field of a token request, to name it in errors."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServiceSecrets:
    """The secrets of the service, which all its processes share.

    Attributes:
        drivers: Secret from which the drivers' keys are derived.
        messages: Secret that signs messages about runs that have ended.
    """

    drivers: bytes = dataclasses.field(repr=False)
    messages: str = dataclasses.field(repr=False)


def service_secrets(database: Database, state_dir: Path) -> ServiceSecrets:
    """Read the secrets of the service from the database; makes them at the first start.

    Secrets in files of an earlier version are stored in the database, so that its drivers continue to report.

    Raises:
        ConfigError: A file of an earlier version cannot be read.
    """
    drivers, messages = (state_dir / name for name in SECRET_FILES)
    return ServiceSecrets(
        _shared(database, "drivers", drivers, lambda: secrets.token_bytes(_SECRET_BYTES)),
        _shared(database, "messages", messages, lambda: secrets.token_urlsafe(_SECRET_BYTES).encode()).decode(),
    )


def secrets_key(path: Path) -> bytes:
    """The key that seals the secrets of projects, which is in no database and no backup; makes it at the first start.

    Raises:
        ConfigError: The file cannot be read or written, or is too short.
    """
    try:
        found = kept_secret(path, lambda: secrets.token_urlsafe(_SECRET_BYTES).encode())
    except OSError as error:
        raise ConfigError("--secrets-key-file", str(path), f"cannot be read or written ({error.strerror})") from error
    if len(found.strip()) < _SECRET_BYTES:
        remedy = "is too short: write 32 bytes or more, such as from `openssl rand -hex 32`"
        raise ConfigError("--secrets-key-file", str(path), remedy)
    return found.strip()


def show_messages_secret(state_dir: Path, secret: str) -> None:
    """Write the secret that signs messages to `webhook-secret`, from which the operator gives it to the receiver.

    Raises:
        ConfigError: The file cannot be written.
    """
    path = state_dir / SECRET_FILES[1]
    found = _readable(path, functools.partial(kept_secret, path, secret.encode))
    if found != secret.encode():
        _log.warning("%s is not the secret that signs messages; delete it, and the next start writes that one", path)


def _shared(database: Database, name: str, path: Path, make: Callable[[], bytes]) -> bytes:
    earlier = _readable(path, path.read_bytes) if path.exists() else b""
    with database.write() as session:
        found = shared_secrets.kept(session, name, (lambda: earlier) if earlier else make, time.time())
    if earlier and earlier != found and name == "drivers":
        _log.warning("%s is not used: the database has another secret, that of the service's other replicas", path)
    return found


def _readable(path: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise ConfigError("--state-dir", str(path), f"cannot be read or written ({error.strerror})") from error


def first_token(database: Database, path: Path) -> str | None:
    """Read the first administrator's token from a file; creates both (mode 0600) if no token is valid.

    The same file gives the same token at every start. A replaced file adds another token; earlier tokens stay valid
    until they are revoked. A revoked token does not become valid again.

    Args:
        database: Migrated database.
        path: Token file, such as a mounted Secret.

    Returns:
        The token in the file if it is valid. None if the token is revoked or expired, or if the file does not exist but
        other tokens do.

    Raises:
        ConfigError: The file cannot be read or written, or does not contain a token.
    """
    now = time.time()
    with database.read() as session:
        known = tokens.count_valid(session, now)
    try:
        if known and not path.exists():
            return None
        # Write the file before the database: if this start is interrupted, the next one stores the token from the file.
        plain = kept_secret(path, _new).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError("--admin-token-file", str(path), f"cannot be read or written ({error.strerror})") from error
    if not _USABLE.fullmatch(plain):
        remedy = (
            "contains no token: write 32 to 256 visible characters without spaces, such as from `openssl rand -hex 32`"
        )
        raise ConfigError("--admin-token-file", str(path), remedy)
    with database.write() as session:
        row = tokens.known(session, plain)
        if row is None:
            row = tokens.enter(session, plain, name="first token", owner=OWNER, scopes=_ALL, expires=None, now=now)
            _note(session, row, now, {"file": str(path)})
            return plain
    if not tokens.is_valid(row, now):
        _log.warning(
            "the token in %s is revoked or expired and is not used; replace the file, or create another token with "
            "`moedisco tokens create NAME --owner OWNER --state-dir DIR`",
            path,
        )
        return None
    return plain


def database_url(state_dir: Path | None, url: str | None) -> str:
    """URL of the database that a service with these options uses.

    Args:
        state_dir: State directory with the default database; created if absent.
        url: URL of the database; None uses MOEDISCO_DATABASE_URL if it is set.
    """
    url = url or os.environ.get("MOEDISCO_DATABASE_URL") or None
    if url is not None or state_dir is None:
        return url or ""
    make_private(state_dir)
    return Settings(state_dir=state_dir).database


def without_password(url: str) -> str:
    """URL of a database with its password hidden."""
    return make_url(url).render_as_string(hide_password=True)


def create_token(url: str, name: str, owner: str, scope: str, days: float | None) -> NewToken:
    """Create a token in a database, whether or not a service uses the database.

    Args:
        url: URL of the database, which is migrated if it is older than this version.
        name: Purpose of the token.
        owner: Owner that the token acts for.
        scope: Highest scope: `read`, `submit` or `admin`.
        days: Days for which the token is valid; None for no limit.

    Raises:
        ConfigError: The URL, name, owner or number of days is not valid.
        DatabaseError: The database cannot be used.
    """
    try:
        asked = TokenRequest.model_validate({"name": name, "owner": owner, "scopes": [scope], "expires_in_days": days})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(_OPTIONS[str(first["loc"][0])], first["input"], plain_words(first)) from error
    with contextlib.closing(Database(url)) as database:
        database.migrate()
        now = time.time()
        expires = None if days is None else now + days * _DAY
        with database.write() as session:
            plain, row = tokens.create(
                session, name=asked.name, owner=owner, scopes=asked.scopes, expires=expires, now=now
            )
            _note(session, row, now, {})
    return NewToken(
        id=row.id,
        name=row.name,
        owner=row.owner,
        scopes=asked.scopes,
        created=now,
        expires=expires,
        revoked=None,
        used=None,
        token=plain,
    )


def _new() -> bytes:
    return f"{tokens.new_plain()}\n".encode()


def _note(session: Session, row: Token, now: float, more: dict[str, str]) -> None:
    detail = {"name": row.name, "owner": row.owner, "scopes": row.scopes, **more}
    audit.note(
        session, owner=OWNER, token_id=None, action="token.create", target=row.id, detail=detail, address=None, now=now
    )
