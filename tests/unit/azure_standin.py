"""Azure's blob storage on loopback: Azurite, which demands a token of Microsoft Entra, and hence TLS."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

AZURITE = "azurite@3.35.0"
_ACCOUNT = "devstoreaccount1"
"""The account that Azurite has."""


@contextlib.contextmanager
def azure_server(container: str, folder: Path) -> Iterator[str]:
    """The URI of a container on a server of its own, in memory; `identities` must be there for its clients.

    Args:
        container: Name of the container, which is created.
        folder: Empty folder for the server's certificate, and for Azurite if it is not installed.
    """
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-noenc",
            "-keyout",
            key,
            "-out",
            certificate,
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    command = [
        _azurite(folder),
        "--blobPort",
        "0",
        "--inMemoryPersistence",
        "--oauth",
        "basic",
        "--cert",
        certificate,
        "--key",
        key,
        "--skipApiVersionCheck",
        "--disableTelemetry",
        "--silent",
    ]
    with (
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            patch.setenv("SSL_CERT_FILE", str(certificate))
            uri = f"abfs://{_ACCOUNT}@{_address(server)}/{container}"
            system, path = fs.FileSystem.from_uri(uri)
            system.create_dir(path)
            yield uri
        finally:
            server.kill()


def _azurite(folder: Path) -> str | Path:
    """Azurite's program: the installed one, or one from the package index of Node.js."""
    if installed := shutil.which("azurite-blob"):
        return installed
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("neither azurite-blob nor npm, which installs it, is on PATH")
    subprocess.run(
        [npm, "install", "--prefix", folder, "--no-audit", "--no-fund", AZURITE],
        check=True,
        capture_output=True,
        env=os.environ | {"npm_config_cache": str(folder / "npm")},
    )
    return folder / "node_modules" / ".bin" / "azurite-blob"


def _address(server: subprocess.Popen[str]) -> str:
    """HOST:PORT at which Azurite listens, from what it prints."""
    for line in server.stdout or ():
        if found := re.search(r"successfully listens on https://(\S+)", line):
            return found[1]
    raise AssertionError("Azurite has ended")
