"""The storage of a gang's Ray Train run, without keys for folders.

Ray Train creates each folder that it writes to. Object stores have no folders, but pyarrow writes a key for each of them, and asks
for the bucket before. A role that is limited to one folder of a bucket may not ask for the bucket (apache/arrow#49949).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pyarrow import fs

from moedisco_ray.core.locations import Location
from moedisco_ray.core.remote import resolve


class TrainStorage(NamedTuple):
    """Arguments of `ray.train.RunConfig`."""

    storage_path: str
    storage_filesystem: fs.FileSystem | None


def train_storage(location: Location) -> TrainStorage:
    """Ray Train's storage at a path or URI.

    Raises:
        OSError: The storage cannot be reached.
    """
    system, path = resolve(location)
    if isinstance(system, fs.LocalFileSystem):
        return TrainStorage(path, None)
    bucket, _, folder = path.partition("/")
    return TrainStorage(folder, ObjectStore(bucket, system))


class ObjectStore(fs.SubTreeFileSystem):
    """A bucket in which no folder is created: a folder exists while there is an object in it."""

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Do nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.base_path, self.base_fs)
