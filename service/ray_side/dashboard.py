"""The Ray dashboard's REST, with timeouts, and with Ray's token where the cluster wants one.

Spoken directly: Ray's own client has no timeouts, obeys RAY_ADDRESS over its argument, and loads Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from service import run_files
from service.errors import RayUnavailable

TIMEOUT = httpx.Timeout(10, connect=3)


class Dashboard:
    """A client of one dashboard; safe to use from several threads.

    Args:
        url: Where it listens: `http://127.0.0.1:8265`.
        token_path: File with the cluster's token; null: what RAY_AUTH_* says, read anew with every request.
        transport: For tests; null: the network.
    """

    def __init__(self, url: str, token_path: Path | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        self._token_path = token_path
        # Proxies of the environment are for the outside world; the cluster is ours.
        self._client = httpx.Client(base_url=self.url, timeout=TIMEOUT, trust_env=False, transport=transport)

    def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON at a path.

        Raises:
            RayUnavailable: It does not answer, or answers with an error.
        """
        answer = self.send("GET", path, params=params)
        if not answer.is_success:
            raise refused(answer)
        return parsed(answer)

    def send(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        """Any answer that Ray itself gives, errors too.

        Raises:
            RayUnavailable: None came, or the token is refused.
        """
        try:
            answer = self._client.request(method, path, params=params, json=body, headers=self.headers())
        except httpx.HTTPError as error:
            raise RayUnavailable(f"Ray does not answer at {self.url} ({type(error).__name__})") from error
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RayUnavailable(f"Ray at {self.url} refuses the token; RAY_AUTH_TOKEN_PATH must name a file with the cluster's")
        return answer

    def headers(self) -> dict[str, str]:
        """Headers that prove the service to the cluster; read anew each time, since the token's file may change."""
        return auth_headers(self._token_path)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def refused(answer: httpx.Response) -> RayUnavailable:
    """The error for an answer that is one; Ray's tracebacks are cut down to their last line, without the full stops after it."""
    lines = [line for line in answer.text.splitlines() if line.strip(" .")] or [answer.reason_phrase]
    return RayUnavailable(f"Ray answers {answer.status_code}: {lines[-1][:300]}")


def parsed(answer: httpx.Response) -> Any:
    """The answer's JSON.

    Raises:
        RayUnavailable: It is something else, such as a proxy's page.
    """
    try:
        return answer.json()
    except ValueError as error:
        raise RayUnavailable(f"{answer.url} does not answer as Ray does") from error


def auth_headers(token_path: Path | None = None) -> dict[str, str]:
    """What proves us to the cluster, found as Ray finds it.

    A token that lies in its default place counts even where RAY_AUTH_MODE is unset: Ray's head then asks for it.

    Args:
        token_path: Goes before RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and `~/.ray/auth_token`.
    """
    if token_path is not None:
        return _bearer(_read_own(token_path))
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return _bearer(token)
    return _bearer(_read(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")))


def _read_own(path: Path) -> str:
    """A token in a directory of the drivers' user, who may make links there: one to the service's own token would hand it out."""
    try:
        content = run_files.read(path.parent, path.name)
    except OSError:
        return ""
    return (content or b"").decode(errors="replace")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}
