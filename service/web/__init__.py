"""Web page of the service: static files. `static/vendor/README.md` lists third-party code."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).with_name("static")
"""Directory that is served under `/static/`."""

REFERENCE = STATIC / "reference.html"
"""Page that is served at `/reference`."""

PAGE = STATIC / "index.html"
"""Page that is served at `/`."""
