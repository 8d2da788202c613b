"""Tables about what runs share: the runs that a retry may take stages from, and files that several runs have."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from service.database.table import ULID, Table


class OfferRow(Table):
    """Another run that a run may take stages from, and the stages that it has taken."""

    __tablename__ = "offers"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Place among the run's offers, from 0, as the driver counts them."""
    donor: Mapped[str] = mapped_column(ULID)
    """Id of the other run, which may have been deleted."""
    donor_project: Mapped[str] = mapped_column(ULID, server_default=text("''"))
    """Id of the other run's project, which decides to whom the id of a deleted run is shown."""
    location: Mapped[str]
    """Path or URI of the other run's directory."""
    stages: Mapped[list[str]]
    """Stages that were taken."""
    taken: Mapped[float | None]
    """Time at which the newest of them was reported; null before."""

    __table_args__ = (Index("offers_by_donor", "donor", "taken"),)


class ShareRow(Table):
    """Files in a folder of a run directory that have other names, too; other runs with the same key have them all."""

    __tablename__ = "shares"

    run_id: Mapped[str] = mapped_column(ULID, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    folder: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(64))
    """Digest of the files' numbers on their disk."""
    bytes: Mapped[int]
    """Size of the files (bytes)."""

    __table_args__ = (Index("shares_by_key", "key", "run_id"),)
