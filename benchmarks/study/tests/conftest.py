import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if "CI" not in os.environ:  # Hypothesis has a profile of its own for CI, without deadlines too
    settings.register_profile("shared machine", deadline=None)
    settings.load_profile("shared machine")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Train with one thread: repeated sums then have equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
