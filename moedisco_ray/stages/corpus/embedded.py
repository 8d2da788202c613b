"""The embedded corpus: real text from the packages that every installation has.

There are eight domains: `python`, `cpp` and `cython` sources, API documentation (`docstrings`), project descriptions
and changelogs (`readmes`), `licences`, `yaml` (operator declarations), and JavaScript and TypeScript of the Ray
dashboard (`web`, from its source maps).

The text depends only on the installed versions. Files are visited in the order of a hash of their path and cut at line
ends into documents of at most `DOCUMENT_CHARACTERS`, until a domain has `DOMAIN_CHARACTERS`. Files with very long lines
(minified, generated) and repeated documents are left out.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from moedisco_ray.core.errors import CorpusError

DOMAIN_CHARACTERS = 1_500_000
"""Maximum characters of text per domain."""
DOCUMENT_CHARACTERS = 4_000
"""Maximum characters of a document."""
_SHORTEST_DOCUMENT = 200
_LONGEST_LINE = 2_000
_MAX_FILE_BYTES = 200_000

_NUMERIC = ("numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "networkx", "sympy")
_NATIVE = ("torch", "pyarrow", "numpy", "scipy", "scikit-learn", "ray")
_ALL = (
    *_NUMERIC,
    "torch",
    "pyarrow",
    "ray",
    "transformers",
    "tokenizers",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "pydantic",
    "fonttools",
    "pillow",
    "tqdm",
    "charset-normalizer",
    "regex",
    "threadpoolctl",
    "xxhash",
    "rich",
    "narwhals",
    "typer",
    "dill",
    "attrs",
    "msgpack",
    "mpmath",
    "python-dateutil",
    "cloudpickle",
    "tensorboardx",
    "multiprocess",
    "idna",
    "markdown-it-py",
    "urllib3",
    "jsonschema",
    "joblib",
    "fsspec",
    "pyparsing",
    "click",
    "filelock",
    "packaging",
    "requests",
    "jinja2",
    "pyyaml",
    "protobuf",
    "pygments",
    "setuptools",
    "contourpy",
    "kiwisolver",
    "cycler",
    "typing-extensions",
)
"""Packages that are installed with this one, directly or as dependencies of dependencies."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """One kind of text in the embedded corpus.

    Attributes:
        packages: Packages to search, by distribution name.
        wants: Whether a file belongs to the domain.
        extract: Function that yields the texts in a file's content.
        max_file_bytes: Size above which a file is left out.
    """

    packages: tuple[str, ...]
    wants: Callable[[PurePosixPath], bool]
    extract: Callable[[str], Iterator[str]]
    max_file_bytes: int = _MAX_FILE_BYTES


def write_embedded(directory: Path) -> dict[str, Path]:
    """Write the embedded corpus as JSON Lines, one file per domain.

    Args:
        directory: Directory for the JSON Lines files; created if it does not exist.

    Returns:
        Path of the file by domain name, in a fixed order. A domain without any installed text is left out.

    Raises:
        CorpusError: No installed package lists its files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for name in DOMAINS:
        path = directory / f"{name}.jsonl"
        lines = [json.dumps({"text": text}) + "\n" for text in domain_texts(name)]
        if lines:
            path.write_text("".join(lines), encoding="utf-8")
            written[name] = path
    if not written:
        raise CorpusError("corpus.sources", "embedded", "no installed package lists its files; name a folder with text")
    return written


def domain_texts(name: str, characters: int = DOMAIN_CHARACTERS) -> list[str]:
    """The first documents of one domain that together hold `characters` characters."""
    domain = DOMAINS[name]
    texts: dict[str, None] = {}
    held = 0
    for path in _files(domain):
        for document in domain.extract(_read(path)):
            for text in _chop(document):
                if len(text) >= _SHORTEST_DOCUMENT and text not in texts:
                    texts[text] = None
                    held += len(text)
                if held >= characters:
                    return list(texts)
    return list(texts)


def identity() -> str:
    """Digest of everything the embedded text depends on: package versions and size limits."""
    found = [f"{name}=={package.version}" for name in _ALL if (package := _distribution(name)) is not None]
    return hashlib.sha256(json.dumps([DOMAIN_CHARACTERS, DOCUMENT_CHARACTERS, *found]).encode()).hexdigest()


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _files(domain: Domain) -> Iterator[Path]:
    found: list[tuple[bytes, Path]] = []
    for name in domain.packages:
        package = _distribution(name)
        files = package.files if package is not None else None
        found += [
            (hashlib.blake2b(str(file).encode(), digest_size=16).digest(), Path(str(file.locate())))
            for file in files or ()
            if domain.wants(file)
        ]
    for _, path in sorted(found):
        if path.is_file() and path.stat().st_size <= domain.max_file_bytes:
            yield path


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")


def _chop(text: str) -> Iterator[str]:
    """Cut a text at line ends, and within a line only if it exceeds the maximum length of a document."""
    document: list[str] = []
    held = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), DOCUMENT_CHARACTERS):
            piece = line[start : start + DOCUMENT_CHARACTERS]
            if held + len(piece) > DOCUMENT_CHARACTERS:
                yield "".join(document).strip("\n")
                document, held = [], 0
            document.append(piece)
            held += len(piece)
    yield "".join(document).strip("\n")


def _as_is(text: str) -> Iterator[str]:
    if all(len(line) <= _LONGEST_LINE for line in text.splitlines()):
        yield text


def _description(text: str) -> Iterator[str]:
    # A METADATA file has headers, an empty line, then the project's README; other files are documentation throughout.
    head, _, body = text.partition("\n\n")
    yield from _as_is(body if head.startswith("Metadata-Version:") else text)


def _docstrings(text: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about old escape sequences in third-party sources
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
            documentation = ast.get_docstring(node, clean=False)
            if documentation is not None:
                yield inspect.cleandoc(documentation)


def _map_sources(text: str) -> Iterator[str]:
    """Yield the original sources that a JavaScript source map contains."""
    try:
        quoted = json.loads(text)
    except ValueError:
        return
    named = zip(quoted.get("sources", []), quoted.get("sourcesContent", []), strict=False)
    for _, source in sorted((name, source) for name, source in named if source):
        yield from _as_is(source)


def _is_source(*suffixes: str) -> Callable[[PurePosixPath], bool]:
    return lambda path: path.suffix in suffixes and "tests" not in path.parts


def _is_description(path: PurePosixPath) -> bool:
    return path.name == "METADATA" or path.suffix in (".md", ".rst")


def _is_licence(path: PurePosixPath) -> bool:
    return path.suffix not in {".py", ".pyc"} and any(
        word in path.name.upper() for word in ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    )


DOMAINS: dict[str, Domain] = {
    "python": Domain(("transformers", "ray", "torch"), _is_source(".py"), _as_is),
    "cpp": Domain(("torch", "pyarrow", "numpy"), _is_source(".h", ".hpp", ".cc", ".cpp"), _as_is),
    "cython": Domain(_NATIVE, _is_source(".pyx", ".pxd", ".pxi"), _as_is),
    "docstrings": Domain(_NUMERIC, _is_source(".py"), _docstrings),
    "readmes": Domain(_ALL, _is_description, _description, max_file_bytes=1 << 20),
    "licences": Domain(_ALL, _is_licence, _as_is, max_file_bytes=1 << 20),
    "yaml": Domain(("torch", "ray", "datasets"), _is_source(".yaml", ".yml"), _as_is, max_file_bytes=2 << 20),
    "web": Domain(("ray",), _is_source(".map"), _map_sources, max_file_bytes=64 << 20),
}
