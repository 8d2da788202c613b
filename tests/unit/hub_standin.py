"""A Hugging Face hub on loopback: the few requests that `huggingface_hub` sends to read and write repositories."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits of one repository, by their id, and its branches."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
        commit = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    """What the hub holds, and what it was asked.

    Attributes:
        token: Token that reads private repositories and writes.
        requests: Method, path and authorization of every request.
        xet: Address of the Xet storage that large files are in; None: they are sent over HTTP.
    """

    token: str = "hf_standin"
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    uploads: Files = field(default_factory=dict)
    xet: str | None = None

    def add(self, name: str, files: Path | Files, branch: str = "main", *, private: bool = False) -> str:
        """Commit files to a repository, such as `org/name` or `datasets/org/name`."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        return self.repositories.setdefault(name, Repository(private)).commit(files, branch)


@contextlib.contextmanager
def hub(cache: Path) -> Iterator[Hub]:
    """A hub; the environment names it, and a cache of its own, and no token."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", state.url)
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.delenv("HF_TOKEN", raising=False)
        # large files go over HTTP, as without hf_xet
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield state
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        where = urlsplit(self.path)
        self.hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        body = self._body()
        path = unquote(where.path)
        for pattern, method in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/(?:models/)?(?P<name>.+?)/revision/(?P<revision>.+)", self._info),
            (r"/api/(?:models/)?(?P<name>.+?)/tree/(?P<revision>[^/]+)(?:/(?P<inside>.*))?", self._tree),
            (r"/api/(?:models/)?(?P<name>.+?)/paths-info/(?P<revision>[^/]+)", self._paths),
            (r"/api/(?:models/)?(?P<name>.+?)/preupload/(?P<revision>[^/]+)", self._preupload),
            (r"/api/(?:models/)?(?P<name>.+?)/commit/(?P<revision>[^/]+)", self._commit),
            (r"/api/(?:models/)?(?P<name>datasets/[^/]+/[^/]+|[^/]+/[^/]+)", self._newest),
            (r"/api/xet-token", self._xet_token),
            (r"/(?P<name>.+?)\.git/info/lfs/objects/batch", self._batch),
            (r"/upload/(?P<oid>.+)", self._upload),
            (r"/(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<inside>.+)", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match is not None:
                named = match.groupdict()
                if "name" in named and not self._may(
                    "write" if self.command in ("POST", "PUT") else "read", named["name"]
                ):
                    self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                    return
                method(body=body, query=parse_qs(where.query), **named)
                return
        self._send(404, {"error": f"no such request: {self.command} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _may(self, what: str, name: str) -> bool:
        repository = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        return repository is not None and (
            known or (what == "read" and not repository.private) or "paths-info" in self.path
        )

    def _files(self, name: str, revision: str) -> tuple[str, Files] | None:
        repository = self.hub.repositories[name]
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, repository.commits[commit]

    def _create(self, body: bytes, query: Any) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, {"error": "Invalid username or password."})
        elif name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.repositories[name] = Repository(
                private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self.hub.add(name, {".gitattributes": b""})
            self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self, body: bytes, query: Any) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _info(self, name: str, revision: str, **_: Any) -> None:
        found = self._files(name, revision)
        if found is not None:
            self._send(
                200,
                {
                    "id": name.removeprefix("datasets/"),
                    "sha": found[0],
                    "private": self.hub.repositories[name].private,
                    "siblings": [{"rfilename": path} for path in found[1]],
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                },
            )

    def _newest(self, name: str, **_: Any) -> None:
        self._info(name, "main")

    def _tree(self, name: str, revision: str, query: dict[str, list[str]], inside: str | None = None, **_: Any) -> None:
        found = self._files(name, revision)
        if found is None:
            return
        below = f"{inside.rstrip('/')}/" if inside else ""
        paths = [path for path in found[1] if path.startswith(below)]
        if not paths:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        deep = query.get("recursive", ["False"])[0].lower() == "true"
        folders = {below + path.removeprefix(below).split("/")[0] for path in paths if "/" in path.removeprefix(below)}
        self._send(
            200,
            [
                *({"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)),
                *(self._entry(path, found[1][path]) for path in paths if deep or "/" not in path.removeprefix(below)),
            ],
        )

    def _paths(self, name: str, revision: str, body: bytes, **_: Any) -> None:
        found = self._files(name, revision)
        if found is None:
            return
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        asked = [asked] if isinstance(asked, str) else asked
        folders = [path for path in asked if _is_folder(path, found[1])]
        self._send(
            200,
            [
                *(self._entry(path, found[1][path]) for path in asked if path in found[1]),
                *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders),
            ],
        )

    def _resolve(self, name: str, revision: str, inside: str, **_: Any) -> None:
        found = self._files(name, revision)
        if found is None:
            return
        if inside not in found[1]:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
            return
        data = found[1][inside]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        if self.hub.xet is not None and inside.endswith(".safetensors"):
            headers |= {
                "X-Xet-Hash": hashlib.sha256(data).hexdigest(),
                "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet-token",
            }
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            self._send(200, data, headers)
            return
        first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
        self._send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _xet_token(self, **_: Any) -> None:
        self._send(
            200,
            {},
            {
                "X-Xet-Cas-Url": str(self.hub.xet),
                "X-Xet-Access-Token": "xet_standin",
                "X-Xet-Token-Expiration": "4102444800",
            },
        )

    def _preupload(self, name: str, body: bytes, **_: Any) -> None:
        paths = [each["path"] for each in json.loads(body)["files"]]
        self._send(
            200,
            {
                "files": [
                    {
                        "path": path,
                        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for path in paths
                ]
            },
        )

    def _batch(self, name: str, body: bytes, **_: Any) -> None:
        self._send(
            200,
            {
                "transfer": "basic",
                "objects": [
                    {**each, "actions": {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ],
            },
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def _upload(self, oid: str, body: bytes, **_: Any) -> None:
        self.hub.uploads[oid] = body
        self._send(200, {})

    def _commit(self, name: str, revision: str, body: bytes, **_: Any) -> None:
        files = dict((self._files(name, revision) or ("", {}))[1])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(name, files)
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    @staticmethod
    def _entry(path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _is_folder(path: str, files: Iterable[str]) -> bool:
    return any(each.startswith(f"{path}/") for each in files)
