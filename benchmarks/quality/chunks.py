"""Cuts long documents at line ends, so that each domain has hundreds of them: to hold out, and to cluster.

    python benchmarks/quality/chunks.py FOLDER OUT

FOLDER has text files, one per domain, with blank lines between documents; OUT gets the same files with more blank lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path


def chunks(text: str, most: int) -> Iterator[str]:
    """Documents of at most `most` characters, if their lines are no longer than that."""
    for document in text.split("\n\n"):
        lines: list[str] = []
        length = 0
        for line in document.split("\n"):
            if lines and length + len(line) > most:
                yield "\n".join(lines)
                lines, length = [], 0
            lines.append(line)
            length += len(line) + 1
        yield "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=3000, help="of a document, at most")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(arguments.folder.glob("*.txt")):
        documents = [part for part in chunks(path.read_text(encoding="utf-8"), arguments.characters) if part.strip()]
        (arguments.out / path.name).write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        print(f"{path.name}: {len(documents)} documents")


if __name__ == "__main__":
    main()
