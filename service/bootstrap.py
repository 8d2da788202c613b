"""Tokens that are made without a caller: the first one at a start, and those of an operator who can reach the database."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.secret_file import kept_secret
from service.database import audit, tokens
from service.database.session import Database
from service.database.tables import Token
from service.process import close_to_others
from service.schemas import Scope
from service.schemas.access import NewToken, TokenRequest
from service.settings import Settings

OWNER = "admin"
_ALL: list[Scope] = ["read", "submit", "admin"]
_USABLE = re.compile(r"[\x21-\x7e]{32,256}")
_DAY = 86400.0
_OPTIONS = {"name": "NAME", "owner": "--owner", "scopes": "--scope", "expires_in_days": "--days"}
"""Of the command line, by the field of a request."""

_log = logging.getLogger(__name__)


def first_token(database: Database, path: Path) -> str | None:
    """The first administrator's token: read from a file, or made and written there (mode 0600) where nobody has a token yet.

    The same file gives the same token at every start. A file whose content was replaced brings a further token: earlier ones stay
    valid until they are revoked. A revoked token is not revived.

    Args:
        database: With its tables.
        path: The file, such as a mounted Secret.

    Returns:
        The token in the file, if it is valid; None: the file does not exist and there are other tokens, or its token was revoked.

    Raises:
        ConfigError: The file cannot be read or written, or holds no token.
    """
    now = time.time()
    with database.read() as session:
        known = tokens.count_valid(session, now)
    try:
        if known and not path.exists():
            return None
        # Written before it is entered: a start that was cut off in between is completed by the next one.
        plain = kept_secret(path, _new).decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError("--admin-token-file", str(path), f"cannot be read or written ({error.strerror})") from error
    if not _USABLE.fullmatch(plain):
        remedy = "holds no token: 32 to 256 visible characters without spaces, such as the output of `openssl rand -hex 32`"
        raise ConfigError("--admin-token-file", str(path), remedy)
    with database.write() as session:
        row = tokens.known(session, plain)
        if row is None:
            row = tokens.enter(session, plain, name="first token", owner=OWNER, scopes=_ALL, expires=None, now=now)
            _note(session, row, now, {"file": str(path)})
            return plain
    if not tokens.is_valid(row, now):
        _log.warning(
            "the token in %s is revoked or expired, and not used; replace the file, or make another token with "
            "`moedisco tokens create NAME --owner OWNER --state-dir DIR`", path)
        return None
    return plain


def database_url(state_dir: Path | None, url: str | None) -> str:
    """The database of a service that was started with these options, or will be.

    Args:
        state_dir: Holds the database unless another is named; made where it does not exist.
        url: The database; None: what MOEDISCO_DATABASE_URL names, as for the service itself.
    """
    url = url or os.environ.get("MOEDISCO_DATABASE_URL") or None
    if url is not None or state_dir is None:
        return url or ""
    close_to_others(state_dir)
    return Settings(state_dir=state_dir).database


def without_password(url: str) -> str:
    """A database's URL that can be shown."""
    return make_url(url).render_as_string(hide_password=True)


def create_token(url: str, name: str, owner: str, scope: str, days: float | None) -> NewToken:
    """Make a token in a database, whether or not a service uses it.

    Args:
        url: The database, which is migrated where it is older than this version.
        name: What the token is for.
        owner: Who it works as.
        scope: The highest of `read`, `submit`, `admin`.
        days: How long it is valid; None: for ever.

    Raises:
        ConfigError: URL, name, owner or days are none.
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
            plain, row = tokens.create(session, name=asked.name, owner=asked.owner, scopes=asked.scopes, expires=expires, now=now)
            _note(session, row, now, {})
    return NewToken(
        id=row.id, name=row.name, owner=row.owner, scopes=asked.scopes, created=now, expires=expires, revoked=None, used=None,
        token=plain)


def _new() -> bytes:
    return f"{tokens.new_plain()}\n".encode()


def _note(session: Session, row: Token, now: float, more: dict[str, str]) -> None:
    detail = {"name": row.name, "owner": row.owner, "scopes": row.scopes, **more}
    audit.note(session, owner=OWNER, token_id=None, action="token.create", target=row.id, detail=detail, address=None, now=now)
