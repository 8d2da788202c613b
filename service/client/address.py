"""The service's URL and token: from arguments, then the environment, then the file that `moedisco serve` saves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import httpx

from moedisco_ray.core.errors import UserError
from moedisco_ray.core.store.locations import settings_directory

_LAST_USED = "last-used.json"
"""File next to the saved address with the URL and the state directory of the service that the last command used."""
URL_VARIABLE, TOKEN_VARIABLE = "MOEDISCO_URL", "MOEDISCO_TOKEN"


@dataclasses.dataclass(frozen=True)
class Address:
    """URL and token of a service.

    Attributes:
        url: Base URL, without a trailing slash.
        token: Access token; None sends requests without a token.
        state_dir: State directory of a service that was started on this machine; None if it is not known.
    """

    url: str
    token: str | None = dataclasses.field(default=None, repr=False)
    state_dir: str | None = None


def address_file(environment: Mapping[str, str] = os.environ) -> Path:
    """The file with the saved address, in the user's configuration directory."""
    return settings_directory(environment) / "service.json"


def save_address(address: Address, path: Path | None = None) -> Path:
    """Save an address in a file that only the user can read (default: `address_file()`); returns its path."""
    path = path or address_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # `mkstemp` creates files of mode 0600
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(address), file)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def load_address(path: Path | None = None) -> Address | None:
    """Read an address that `save_address` wrote; returns None if there is no file.

    Raises:
        UserError: The file cannot be read, or does not contain an address.
    """
    path = path or address_file()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(str(path), None, "cannot be read; remove it, or start `moedisco serve` again") from error
    url, token, state_dir = (raw.get(key) if isinstance(raw, dict) else None for key in ("url", "token", "state_dir"))
    if not isinstance(url, str) or not isinstance(token, str | None) or not isinstance(state_dir, str | None):
        raise UserError(str(path), None, "contains no address; remove it, or start `moedisco serve` again")
    return Address(url, token, state_dir)


def find_address(
    url: str | None = None, token: str | None = None, environment: Mapping[str, str] = os.environ
) -> Address:
    """The address of the service to use.

    Args:
        url: URL that takes precedence over all other sources.
        token: Token that takes precedence over all other sources.
        environment: Environment variables.

    Raises:
        UserError: No source gives a URL, or it is not valid.
    """
    url = url or environment.get(URL_VARIABLE) or None
    token = token or environment.get(TOKEN_VARIABLE) or None
    state_dir = None
    if url is None or token is None:
        saved = load_address(address_file(environment))
        # never send a saved token to another service
        if saved is not None and _base(url or saved.url) == _base(saved.url):
            url, token, state_dir = saved.url, token or saved.token, saved.state_dir
    if url is None:
        raise UserError(
            URL_VARIABLE,
            None,
            "is not set and you have started no service here; start one with `moedisco serve`, "
            f"or set {URL_VARIABLE} and {TOKEN_VARIABLE}",
        )
    try:
        usable = httpx.URL(url).scheme in {"http", "https"} and httpx.URL(url).host
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise UserError(URL_VARIABLE, url, "is not a URL of a service, such as http://HOST:PORT")
    return Address(_base(url), token, state_dir)


def changed_since_last_use(address: Address, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the previous command of this user used another service; records that this one is used now."""
    path = address_file(environment).with_name(_LAST_USED)
    used = json.dumps([address.url, address.state_dir])
    try:
        before = path.read_text(encoding="utf-8")
    except OSError:
        before = None
    if before != used:
        with contextlib.suppress(OSError):  # a home that cannot be written
            path.write_text(used, encoding="utf-8")
    return before is not None and before != used


def _base(url: str) -> str:
    return url.strip().rstrip("/")
