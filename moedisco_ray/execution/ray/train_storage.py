"""The storage of a gang's Ray Train run. In an object store, no folders are created.

Ray Train creates each folder before it writes there. Object stores have no folders, so pyarrow writes an empty object
for each, and first checks that the bucket exists. Credentials that are limited to one folder of a bucket do not permit
this check (apache/arrow#49949).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pyarrow import fs

from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.remote import resolve


class TrainStorage(NamedTuple):
    """Storage arguments of `ray.train.RunConfig`."""

    storage_path: str
    storage_filesystem: fs.FileSystem | None


def train_storage(location: Location) -> TrainStorage:
    """Storage arguments of Ray Train for a path or URI.

    Raises:
        OSError: The storage cannot be reached.
    """
    system, path = resolve(location)
    if isinstance(system, fs.LocalFileSystem):
        return TrainStorage(path, None)
    bucket, _, folder = path.partition("/")
    return TrainStorage(folder, ObjectStore(bucket, system))


class ObjectStore(fs.SubTreeFileSystem):
    """A bucket as a file system that creates no folders: a folder exists while it contains an object."""

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        """Do nothing: object stores need no folders."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.base_path, self.base_fs)
