"""A machine of a run at a URI, for tests."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore


class Machine:
    """A machine: a folder of its own for working copies."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri = folder, uri

    @property
    def store(self) -> RunStore:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE, str(self.folder))
            return RunStore.of(self.uri)

    def load(self, data: bytes) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CACHE, str(self.folder))
            return pickle.loads(data)
