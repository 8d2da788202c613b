"""The clouds: one page each, and the list of all pages."""

from __future__ import annotations

from collections.abc import Mapping

from moedisco_ray.execution.clouds import aws, azure, gcp
from moedisco_ray.execution.clouds.declaration import Cloud

__all__ = ["CLOUDS", "Cloud"]

PAGES = (aws, gcp, azure)
CLOUDS: Mapping[str, Cloud] = {page.CLOUD.name: page.CLOUD for page in PAGES}
"""Every cloud by its name."""
