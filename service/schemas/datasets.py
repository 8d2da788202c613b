"""Data sets: text that people upload for their runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from service.domain.access import Role
from service.domain.datasets import HASH_PATTERN, MOST_BYTES, MOST_FILES, NAME_PATTERN, clash, path_mistake
from service.domain.run_paths import is_id
from service.schemas.base import Document, ProjectReference, example

Sha256 = Annotated[str, Field(pattern=f"^{HASH_PATTERN}$")]
"""A SHA-256 in lower-case hexadecimal digits."""


def _plain(path: str) -> str:
    if (mistake := path_mistake(path)) is not None:
        raise ValueError(mistake)
    return path


def _no_id(name: str) -> str:
    if is_id(name):
        raise ValueError("has the form of an id; choose another name")
    return name


DatasetName = Annotated[str, Field(pattern=f"^{NAME_PATTERN}$"), AfterValidator(_no_id)]


class DatasetFileInfo(Document):
    """A file of a data set."""

    path: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_plain)]
    """Path below the data set's folder, without hidden parts."""
    bytes: Annotated[int, Field(ge=0, le=MOST_BYTES)]
    sha256: Sha256


def _without_clash(files: list[DatasetFileInfo]) -> list[DatasetFileInfo]:
    if (path := clash(file.path for file in files)) is not None:
        raise ValueError(f"have {path!r} twice, or as a file and as a folder")
    return files


class DatasetRequest(Document):
    """A data set to create, as the list of its files."""

    model_config = example(name="wiki", files=[{"path": "a.txt", "bytes": 4, "sha256": "0" * 64}])

    name: DatasetName
    project: ProjectReference | None = None
    """Project whose members may see the data set; with null, your default project."""
    files: Annotated[list[DatasetFileInfo], Field(min_length=1, max_length=MOST_FILES), AfterValidator(_without_clash)]


class DatasetInfo(Document):
    """A data set."""

    id: str
    name: str
    hash: Sha256
    """SHA-256 of the list of files; configurations name the data set as `dataset://NAME@sha256:HASH`."""
    owner: str
    project: str
    """Id of the project whose members may see the data set."""
    role: Role
    """What the caller is in the project."""
    bytes: int
    """Size of all files (bytes)."""
    count: int
    """Number of files."""
    created: float


class DatasetDetail(DatasetInfo):
    """A data set with its files."""

    files: list[DatasetFileInfo]


class DatasetPage(Document):
    """Data sets, newest first."""

    items: list[DatasetInfo]
    next_cursor: str | None
    """`cursor` of the next page; null on the last one."""


class BlobState(Document):
    """How much of a file has arrived."""

    sha256: Sha256
    bytes: int
    """Size of the whole file (bytes)."""
    offset: int
    """Number of bytes that have arrived; the upload continues there."""


class DatasetUpload(Document):
    """The data set, or the files that have to be uploaded before it can be created."""

    dataset: DatasetInfo | None
    """Null while files are missing."""
    missing: list[BlobState]
