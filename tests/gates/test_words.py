"""Words that people read follow the language standard: in docstrings, help texts, comments of presets, documents."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS_TO_AVOID = {
    "told": "the active verb",
    "tells?": "says, returns, reports",
    "nobody": "no one, or the active verb",
    "somebody": "a user, an operator",
    "whoever": "a user who",
    "lies": "is stored",
    "go(es)? on": "continues, resumes",
    "going on": "continuing",
    "beside": "next to, with",
    "so many": "the number",
    "as many as": "the number of",
    "by what": "a plain clause",
    "of which": "a sentence of its own",
    "dear(er|est)?": "more expensive",
    "what (it|they) came to": "reaches, costs",
    "makes? of": "derives from",
}
"""Regular expression of each word to avoid, and what to write instead."""
CLEAN = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs",
    "cluster_yaml",
    "service",
    "moedisco_ray",
    "benchmarks/RESULTS.md",
    *sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")),
    "benchmarks/study",
    "tests",
]
"""Folders and files without such words."""

_WORD = re.compile(rf"\b({'|'.join(WORDS_TO_AVOID)})\b", re.IGNORECASE)
_SHOWN = frozenset({"help", "description", "summary", "short_help", "epilog", "title"})
"""Keyword arguments that typer, pydantic and FastAPI show to users."""


def texts_of_python(source):
    """Line and text of every docstring (module, class, function, attribute) and of every text that users are shown."""
    for node in ast.walk(ast.parse(source)):
        shown = isinstance(node, ast.Expr) or (isinstance(node, ast.keyword) and node.arg in _SHOWN)
        if shown and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.lineno, node.value.value


def texts(path):
    """Line and text of all that a file has for people to read."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from texts_of_python(content)
    elif path.suffix == ".yaml":
        yield from ((number, line.partition("#")[2]) for number, line in enumerate(content.splitlines(), 1))
    else:
        yield 1, content


def words_to_avoid(place):
    """Every word to avoid in a file, or in a folder's Python files, presets and documents."""
    paths = (
        [place]
        if place.is_file()
        else sorted(path for path in place.rglob("*") if path.suffix in (".py", ".md", ".yaml"))
    )
    for path in paths:
        for line, text in texts(path):
            for match in _WORD.finditer(text):
                yield f"{path.relative_to(ROOT)}:{line + text.count(chr(10), 0, match.start())}: {match[0]}"


@pytest.mark.parametrize("place", CLEAN)
def test_a_clean_place_stays_clean(place):
    assert list(words_to_avoid(ROOT / place)) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Nobody is told."""', 2),
        ('X = 1\n"""What it came to."""', 1),
        ('option(help="Runs that go on.")', 1),
        ("name = 'told'  # told", 0),
        ('"""Says where the file is stored."""', 0),
    ],
)
def test_words_are_found_where_people_read_them(source, expected):
    assert sum(len(_WORD.findall(text)) for _, text in texts_of_python(source)) == expected
