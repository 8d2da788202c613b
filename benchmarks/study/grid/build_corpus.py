"""Builds a corpus for the grid: eight domains of text from Debian packages, or your own text, in short documents.

    python -m benchmarks.study.grid.build_corpus debian OUT [--bytes 450000]
    python -m benchmarks.study.grid.build_corpus cut FOLDER OUT

`debian` downloads packages by apt-get, and installs nothing. FOLDER of `cut` has text files, one per domain. OUT gets
a text file per domain, with blank lines between documents, and SHA256SUMS. Lines are joined to documents of about 1,000
characters: long enough to cluster, and short enough that each domain has hundreds of them, some to hold out. The same
packages always give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SEED = 0
"""Seed for the order of a domain's files."""
_APT, _DPKG = "/usr/bin/apt-get", "/usr/bin/dpkg-deb"
_SHORTEST = 200
"""Minimum length of a file (characters); shorter ones are stubs."""
_NO_TEXT = re.compile(r"<(script|style|head|nav)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"</?(p|div|br|li|tr|h[1-6]|dt|dd|pre|table|ul|ol)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]+>", re.DOTALL)


class Domain(NamedTuple):
    """Source of a domain's text."""

    package: str
    files: str
    """Glob pattern of the files in the unpacked package."""
    text: Callable[[str], str] = str.strip
    """Extracts the text from a file's content."""


def of_html(page: str) -> str:
    """The text of an HTML page, one line per block."""
    lines = html.unescape(_TAG.sub("", _BREAK.sub("\n", _NO_TEXT.sub("", page)))).splitlines()
    return "\n".join(words for line in lines if (words := " ".join(line.split())))


DOMAINS = {
    "kernel_docs": Domain("linux-doc-6.12", "usr/share/doc/*/Documentation/[a-s]*/**/*.rst.gz"),
    "perl_docs": Domain("perl-doc", "usr/share/perl/**/*.pod"),
    "code_python": Domain("python3-django", "usr/lib/python3/**/*.py"),
    "code_cpp": Domain("libeigen3-dev", "usr/include/**/*.h"),
    "help_fr": Domain("libreoffice-help-fr", "usr/share/**/*.html", of_html),
    "help_zh": Domain("libreoffice-help-zh-cn", "usr/share/**/*.html", of_html),
    "politics_faq": Domain("anarchism", "usr/share/doc/**/*.html", of_html),
    "dictionary": Domain("dict-gcide", "usr/share/**/*.dict.dz"),
}


def documents(text: str, most: int) -> Iterator[str]:
    """Join the non-blank lines of a text to documents of at most `most` characters; only a longer line exceeds that."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines():
        if not line.strip():
            continue
        if lines and length + len(line) > most:
            yield "\n".join(lines)
            lines, length = [], 0
        lines.append(line.rstrip())
        length += len(line) + 1
    if lines:
        yield "\n".join(lines)


def write(texts: Iterable[str], path: Path, characters: int, most_bytes: int | None) -> None:
    """Write the documents of the texts to a file, up to about `most_bytes`."""
    found, size = [], 0
    for document in (part for text in texts for part in documents(text, characters)):
        if most_bytes is not None and size >= most_bytes:
            break
        found.append(document)
        size += len(document.encode()) + 2
    path.write_text("\n\n".join(found) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(found)} documents, {size:,} bytes")


def debian(out: Path, characters: int, most_bytes: int) -> None:
    """Write every domain's text from its Debian package, which is unpacked into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, domain in DOMAINS.items():
            place = Path(folder) / name
            place.mkdir()
            try:
                subprocess.run(
                    [_APT, "download", "-qq", "-o", "APT::Sandbox::User=root", domain.package], cwd=place, check=True
                )
                (package,) = place.glob("*.deb")
                subprocess.run([_DPKG, "-x", str(package), str(place)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"{domain.package}: {error}; this takes Debian 13 and the lists of `apt-get update`"
                ) from error
            write(_texts(place, domain), out / f"{name}.txt", characters, most_bytes)


def _texts(place: Path, domain: Domain) -> Iterator[str]:
    files = sorted(path for path in place.glob(domain.files) if path.is_file() and not path.is_symlink())
    random.Random(SEED).shuffle(files)
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        text = domain.text(content.decode("utf-8", "replace").replace("\r\n", "\n"))
        if len(text) >= _SHORTEST:
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=1000, help="maximum length of a document")
    commands = parser.add_subparsers(dest="command", required=True)
    from_debian = commands.add_parser("debian")
    from_debian.add_argument("out", type=Path)
    from_debian.add_argument("--bytes", type=int, default=450_000, help="approximate size of a domain")
    cut = commands.add_parser("cut")
    cut.add_argument("folder", type=Path)
    cut.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.command == "debian":
        debian(arguments.out, arguments.characters, arguments.bytes)
    else:
        for path in sorted(arguments.folder.glob("*.txt")):
            write([path.read_text(encoding="utf-8")], arguments.out / path.name, arguments.characters, None)
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(arguments.out.glob("*.txt"))
    ]
    (arguments.out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


if __name__ == "__main__":
    main()
