"""Pickles values for another machine: paths of runs become paths of that machine's working copies."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moedisco_ray.core.store.run_store import RunStore


class RunPickler(pickle.Pickler):
    """Pickles one value, with paths of runs at a URI as names in their stores."""

    def __init__(self, file: io.BytesIO, *stores: RunStore) -> None:
        super().__init__(file)
        self._stores = stores

    def reducer_override(self, value: Any) -> Any:
        """How to pickle a path of a run; pickle calls this method for every value."""
        for store in self._stores if isinstance(value, Path) and value.is_absolute() else ():
            name = store.name_of(value)
            if name is not None and store.is_remote:
                return _path_of, (store, name)
        return NotImplemented


def _path_of(store: RunStore, name: str) -> Path:
    return store.directory / name
