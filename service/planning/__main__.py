"""Starts the fork server of `service.planning.pool`, which is its standard input."""

from __future__ import annotations

import json
import socket
import sys

from service.planning.fork_server import Limits, serve

if __name__ == "__main__":
    serve(socket.socket(fileno=sys.stdin.fileno()), Limits(**json.loads(sys.argv[1])))
