"""Client of the Ray dashboard's REST API, with timeouts and Ray's token.

Ray's own client is not used: it has no timeouts, its argument is overridden by RAY_ADDRESS, and it imports Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from service.errors import RayUnavailable
from service.run_storage import DirectoryRun, read

TIMEOUT = httpx.Timeout(10, connect=3)


class Dashboard:
    """Client of one dashboard; safe to use from several threads.

    Args:
        url: URL of the dashboard, such as `http://127.0.0.1:8265`.
        token_path: File with the cluster's token; None uses the RAY_AUTH_* variables, read for every request.
        transport: Transport for tests; None uses the network.
    """

    def __init__(self, url: str, token_path: Path | None = None, transport: httpx.BaseTransport | None = None) -> None:
        # Ignore HTTP_PROXY and similar variables: the cluster is reached directly.
        self._client = httpx.Client(timeout=TIMEOUT, trust_env=False, transport=transport)
        self.move(url, token_path)

    def move(self, url: str, token_path: Path | None) -> None:
        """Send all further requests to another dashboard; the arguments are those of the class."""
        self.url = url.rstrip("/")
        self._token_path = token_path
        self._client.base_url = self.url

    def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """The JSON at a path.

        Raises:
            RayUnavailable: Ray does not answer, or answers with an error.
        """
        answer = self.send("GET", path, params=params)
        if not answer.is_success:
            raise refused(answer)
        return parsed(answer)

    def send(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None
    ) -> httpx.Response:
        """Send a request and return Ray's response, even if it reports an error.

        Raises:
            RayUnavailable: Ray does not answer, or refuses the token.
        """
        try:
            answer = self._client.request(method, path, params=params, json=body, headers=self.headers())
        except httpx.HTTPError as error:
            raise RayUnavailable(f"Ray does not answer at {self.url} ({type(error).__name__})") from error
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RayUnavailable(
                f"Ray at {self.url} refuses the token; RAY_AUTH_TOKEN_PATH must name a file with the cluster's"
            )
        return answer

    def headers(self) -> dict[str, str]:
        """Authentication headers, read for every request because the token file may change."""
        return auth_headers(self._token_path)

    def close(self) -> None:
        self._client.close()


def refused(answer: httpx.Response) -> RayUnavailable:
    """Make the error for an error response of Ray; of a traceback, only the last line is kept."""
    lines = [line for line in answer.text.splitlines() if line.strip(" .")] or [answer.reason_phrase]
    return RayUnavailable(f"Ray answers {answer.status_code}: {lines[-1][:300]}")


def parsed(answer: httpx.Response) -> Any:
    """JSON of a response.

    Raises:
        RayUnavailable: The response is not JSON, such as an error page of a proxy.
    """
    try:
        return answer.json()
    except ValueError as error:
        raise RayUnavailable(f"{answer.url} does not answer as Ray does") from error


def auth_headers(token_path: Path | None = None) -> dict[str, str]:
    """Authentication headers, with the token from the given file or else from where Ray looks for it.

    A token in Ray's default file is used even if RAY_AUTH_MODE is unset, because a Ray head with such a file requires
    it.
    """
    if token_path is not None:
        return _bearer(_read_own(token_path))
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return _bearer(token)
    return _bearer(_read(Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")))


def _read_own(path: Path) -> str:
    """Read a token without following symbolic links.

    The drivers' user owns the directory and could link to a service secret.
    """
    try:
        content = read(DirectoryRun(path.parent), path.name)
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
