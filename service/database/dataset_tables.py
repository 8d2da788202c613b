"""Tables of data sets: text that people upload for their runs."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.database.table import ULID, Table


class DatasetRow(Table):
    """A data set: files that are complete and never change."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(ULID, primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the list of files; equal data sets have the same files on the disk."""
    owner: Mapped[str]
    """Person who uploaded the data set; its size counts against this person's quota."""
    project: Mapped[str] = mapped_column(ULID)
    """Id of the project, whose members may see the data set."""
    bytes: Mapped[int]
    count: Mapped[int]
    """Number of files."""
    created: Mapped[float]

    __table_args__ = (
        UniqueConstraint("project", "name", "hash"),
        Index("datasets_by_name", "name", "id"),
        Index("datasets_by_hash", "hash"),
    )


class DatasetFileRow(Table):
    """A file of a data set."""

    __tablename__ = "dataset_files"

    dataset_id: Mapped[str] = mapped_column(ULID, ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Place in the sorted list of files, from 0."""
    path: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))

    __table_args__ = (Index("dataset_files_by_content", "sha256", "dataset_id"),)


class BlobRow(Table):
    """The content of a file that an owner has uploaded; two owners with the same content have a row each."""

    __tablename__ = "blobs"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int]
    created: Mapped[float]

    __table_args__ = (Index("blobs_by_content", "sha256"),)
