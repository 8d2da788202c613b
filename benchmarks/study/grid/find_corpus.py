"""Finds the text of a corpus: the embedded text, or a folder with one file per domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedisco_ray.core.errors import ConfigError

EMBEDDED = "embedded"
"""The corpus of text that the installed packages carry."""


def sources(corpus: str, corpora: Path | None) -> list[dict[str, Any]]:
    """The sources of a corpus, as in `corpus.sources`.

    Raises:
        ConfigError: The folder of corpora holds no such corpus.
    """
    if corpus == EMBEDDED:
        return [{"path": EMBEDDED}]
    files = [] if corpora is None else _domains(corpora / corpus)
    if not files:
        raise ConfigError(
            "--corpus", corpus, "has no text files; name the folder that holds it with --corpus or MOEDISCO_CORPORA"
        )
    return [_source(path) for path in files]


def unseen_sources(corpus: str, corpora: Path | None) -> list[dict[str, Any]]:
    """The domains of the other corpora in the folder, except those whose names this corpus also has."""
    if corpora is None:
        return []
    known = {path.stem for path in _domains(corpora / corpus)}
    found = {
        path.stem: path
        for other in known_corpora(corpora)
        for path in _domains(corpora / other)
        if path.stem not in known
    }
    return [_source(path) for path in found.values()]


def known_corpora(corpora: Path | None) -> list[str]:
    """Names of the corpora in the folder.

    Raises:
        ConfigError: There is no such folder.
    """
    if corpora is not None and not corpora.is_dir():
        raise ConfigError("--corpus", str(corpora), "is no folder")
    folders = sorted(corpora.iterdir()) if corpora is not None else []
    return [folder.name for folder in folders if _domains(folder)]


def _domains(folder: Path) -> list[Path]:
    return sorted((folder / "train").glob("*.txt")) or sorted(folder.glob("*.txt"))


def _source(path: Path) -> dict[str, Any]:
    return {"path": str(path), "name": path.stem, "documents": "paragraph", "format": "text"}
