from __future__ import annotations

from collections.abc import Iterator

import pytest
from spot_nodes import SpotNodes, spot_nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[SpotNodes]:
    """A Ray cluster for all tests of a file; each test resets its nodes."""
    with spot_nodes() as nodes:
        yield nodes
