"""How much text a run reads from its sources. Files are listed by a function that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moedisco_ray.core.config import RunConfig, Source
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.locations import is_uri

_EMBEDDED_BYTES = 10_000_000
"""Size of the embedded corpus (bytes); 9.8 MB were measured with the pinned libraries."""

Lister = Callable[[str, Source], int | None]
"""Size of the text of a source's local files (bytes), as `execution.text_size.listed_bytes`."""


def text_bytes(sources: Mapping[str, Source], listed: Lister | None) -> int | None:
    """Estimated size of the text that a run would read (bytes); None if that of a source is unknown, as at a URI.

    Args:
        sources: The sources by their configuration paths, such as `corpus.sources.0`.
        listed: Function that lists local files; None: they may not be read.

    Raises:
        CorpusError: The files of a source are not here, or a run would not read them.
    """
    total = 0
    for field, source in sources.items():
        if source.path == "embedded":
            size: int | None = _EMBEDDED_BYTES
        elif listed is None or is_uri(source.path):
            size = None
        else:
            size = listed(field, source)
        if size is None:
            return None
        total += size
    return total


def corpus_bytes(config: RunConfig, listed: Lister | None) -> int | None:
    """Estimated size of a run's text without that of data owners (bytes); None if it is unknown, or not here."""
    sources = {f"corpus.sources.{number}": source for number, source in config.corpus.of_owner(None).items()}
    try:
        return text_bytes(sources, listed)
    except CorpusError:
        return None
