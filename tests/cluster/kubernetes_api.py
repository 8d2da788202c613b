"""A stand-in for the API of Kubernetes, with one RayCluster and its head's pod: `python kubernetes_api.py FOLDER PORT`.

It speaks TLS with FOLDER/server.pem, answers 401 without the token in FOLDER/token, and 403 to what the Role that the
KubeRay operator writes does not allow. Accepted patches change the RayCluster, and go to FOLDER/patches.jsonl.
"""

from __future__ import annotations

import http.server
import json
import re
import ssl
import sys
from pathlib import Path
from typing import Any

from cluster_files import kubernetes_objects

CLUSTER = "/apis/ray.io/v1/namespaces/default/rayclusters/moedisco"
PODS = "/api/v1/namespaces/default/pods"
ROLE = {"GET": (CLUSTER, PODS), "PATCH": (CLUSTER,)}


def head_pod() -> dict[str, Any]:
    labels = {"ray.io/cluster": "moedisco", "ray.io/node-type": "head", "ray.io/group": "headgroup"}
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    return {
        "metadata": {"name": "moedisco-head", "labels": labels, "resourceVersion": "1"},
        "status": {
            "podIP": "127.0.0.1",
            "phase": "Running",
            "containerStatuses": [{"name": "ray-head", "state": state}],
        },
    }


def patched(document: Any, operations: list[dict[str, Any]]) -> None:
    """Apply a JSON patch in place."""
    for operation in operations:
        *parts, last = operation["path"].strip("/").split("/")
        place = document
        for part in parts:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = operation["value"]


class Api(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.token = (folder / "token").read_text()
        (self.cluster,) = [each for each in kubernetes_objects() if each["kind"] == "RayCluster"]
        self.cluster["metadata"] |= {"namespace": "default", "resourceVersion": "1"}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        self.socket = context.wrap_socket(self.socket, server_side=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        if self._is_allowed():
            pods = {"metadata": {"resourceVersion": "1"}, "items": [head_pod()]}
            self._answer(200, self.server.cluster if self.path.startswith(CLUSTER) else pods)

    def do_PATCH(self) -> None:
        operations = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_allowed():
            patched(self.server.cluster, operations)
            with (self.server.folder / "patches.jsonl").open("a") as file:
                file.write(json.dumps(operations) + "\n")
            self._answer(200, self.server.cluster)

    def _is_allowed(self) -> bool:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"message": "Unauthorized"})
            return False
        if not any(re.split(r"[?]", self.path)[0] == path for path in ROLE[self.command]):
            self._answer(403, {"message": f"cannot {self.command} {self.path}"})
            return False
        return True

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    Api(Path(sys.argv[1]), int(sys.argv[2])).serve_forever()
