"""Tables that make several processes one service: its secrets, leases, and when regular tasks were completed."""

from __future__ import annotations

from sqlalchemy import LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from service.database.table import Table


class ServiceSecret(Table):
    """A secret that all processes of the service share."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[bytes] = mapped_column(LargeBinary)
    created: Mapped[float]


class LeaseRow(Table):
    """The right of one process to do some work until a time of the database's clock."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str]
    """Name of the replica that holds the lease."""
    epoch: Mapped[int]
    """Number of times the lease was taken; it distinguishes a process from an earlier one of the same replica."""
    ends: Mapped[float]


class LastDone(Table):
    """The time at which a regular task was completed last."""

    __tablename__ = "last_done"

    task: Mapped[str] = mapped_column(String(32), primary_key=True)
    time: Mapped[float]
