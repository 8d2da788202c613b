"""Paths and URIs to the file systems that pyarrow reads: local disks, `s3://`, `gs://` and others.

A URI may end with options of its file system, such as `s3://bucket/folder?endpoint_override=HOST:PORT&scheme=http`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyarrow import fs

Location = Path | str
"""A local path, or a URI."""


def resolve(location: Location) -> tuple[Any, str]:
    """The pyarrow file system of a location, and the location's path in it.

    Raises:
        OSError: The file system cannot be reached.
        pyarrow.ArrowInvalid: The file system is not supported.
    """
    if is_uri(location):
        return fs.FileSystem.from_uri(str(location))
    return fs.LocalFileSystem(), str(Path(location).absolute())


def joined(location: Location, *parts: str) -> Location:
    """A location below another; a URI's options stay at its end."""
    if not is_uri(location):
        return Path(location).absolute().joinpath(*parts)
    place, sign, options = str(location).partition("?")
    return "/".join([place.rstrip("/"), *parts]) + sign + options


def parent(location: Location) -> tuple[Location, str]:
    """The folder that contains a location, and the location's name in it; a URI's options stay with the folder."""
    if not is_uri(location):
        path = Path(location).absolute()
        return path.parent, path.name
    place, sign, options = str(location).partition("?")
    folder, _, name = place.rstrip("/").rpartition("/")
    return folder + sign + options, name


def is_uri(location: Location) -> bool:
    """Whether a location is a URI, not a local path."""
    return isinstance(location, str) and "://" in location


def first_line(error: Exception) -> str:
    """The first line of an error's text, shortened for use in a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
