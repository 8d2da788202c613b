"""The web page: plain files, served as they lie here. `static/vendor/README.md` lists what others wrote."""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).with_name("static")
"""Served under `/static/`."""

REFERENCE = STATIC / "reference.html"
"""Answered at `/reference`."""

PAGE = STATIC / "index.html"
"""Answered at `/`."""
