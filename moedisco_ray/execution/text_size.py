"""How much text a run would read from a source on this machine: it lists the same files."""

from __future__ import annotations

from moedisco_ray.core.config import Source

MOST_ENTRIES = 10_000
"""Maximum number of files and folders of a source that are looked at; with more, the size of its text is unknown."""


def listed_bytes(field: str, source: Source) -> int | None:
    """Estimated size of the text that a run would read from local files (bytes); None if they are too many to list.

    Args:
        field: Configuration path of the source, such as `corpus.sources.0`; errors name it.
        source: The source.

    Raises:
        CorpusError: The files are not here, or a run would not read them.
    """
    # Commands without local text start without pyarrow.
    from moedisco_ray.stages.corpus.entries import TooManyEntriesError  # noqa: PLC0415
    from moedisco_ray.stages.corpus.files import list_files  # noqa: PLC0415

    try:
        return list_files(field, source, most_entries=MOST_ENTRIES).text_bytes
    except TooManyEntriesError:
        return None
