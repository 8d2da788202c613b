"""What a file's ending says about its format."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

FileFormat = Literal["text", "jsonl", "csv", "tsv", "parquet", "arrow"]

COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".br")
_ROWS: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".pq": "parquet", ".arrow": "arrow",
}
_TEXT = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log", ".srt", ".po", ".py", ".pyi", ".pyx", ".pxd",
    ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".m", ".mm", ".cs", ".fs", ".swift", ".go", ".rs", ".java", ".kt",
    ".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".clj",
    ".ex", ".erl", ".lisp", ".el", ".lean", ".f90", ".s", ".v", ".sql", ".proto", ".cmake", ".sh", ".bash", ".ps1", ".bat",
    ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf",
)
_INSTEAD = {
    **dict.fromkeys((".warc", ".wet", ".wat"), "is a web archive; extract its text first, for example as JSONL"),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml"), "is markup; extract its text first"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".xz"), "is an archive; unpack it first"),
    **dict.fromkeys((".pdf", ".epub", ".docx", ".doc", ".odt", ".rtf", ".xlsx"), "is a formatted document; extract its text first"),
}


def format_of(path: str) -> FileFormat | None:
    """The format by the file's ending; None where that is unknown. A name without an ending is plain text."""
    ending = _ending(path)
    return "text" if not ending or ending in _TEXT else _ROWS.get(ending)


def unknown(path: str) -> str:
    """What is wrong with a file of unknown ending; completes a sentence that begins with its name."""
    ending = _ending(path)
    return _INSTEAD.get(ending, f"has the unknown ending {ending}")


def refusal(path: str) -> str:
    """As `unknown`, with what to do."""
    return (
        f"{unknown(path)}; leave it out by `exclude` or on_error: skip, or read it as plain text by format: text. "
        f"Known endings: {' '.join((*_ROWS, *_TEXT))}")


def _ending(path: str) -> str:
    name = PurePosixPath(path)
    return (PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix).lower()
