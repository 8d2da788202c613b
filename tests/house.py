"""Print the measures of the working tree next to those of main, and mark what rose: `python tests/house.py [REVISION]`.

No measure is a limit. It may fall; a rise needs a line in the commit that says what it buys. The base is the commit at
which the branch left REVISION, by default `main`.
"""

import ast
import collections
import io
import itertools
import re
import subprocess
import sys
import tarfile
import tokenize
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from moedisco_ray.core.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("moedisco_ray", "service")
MEASURED = (*PRODUCT, "tests", "benchmarks")
STAGE_NAMES = frozenset(stage.name for stage in STAGES)

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_LAYOUT = frozenset(
    {
        tokenize.COMMENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
        tokenize.INDENT,
        tokenize.NEWLINE,
        tokenize.NL,
    }
)
_PAGES = {
    "settings with a row": ("docs/configuration.md", re.compile(r"^\| `", re.MULTILINE)),
    "settings with a meaning of their own": (
        "docs/configuration.md",
        re.compile(r"^\| `(?!.*\| As `\S+`\. \|$)", re.MULTILINE),
    ),
    "commands": ("docs/cli.md", re.compile(r"^```text\nmoedisco (?!.* COMMAND \[ARGS\])", re.MULTILINE)),
    "options": ("docs/cli.md", re.compile(r"^\| `-", re.MULTILINE)),
    "REST routes": ("docs/rest.md", re.compile(r"^### `", re.MULTILINE)),
    "lines of README": ("README.md", re.compile(r"\n")),
    "words of README": ("README.md", re.compile(r"\S+")),
}
"""Per measure: a document, and what is counted in it. `make docs` writes the references, so run it after a change.

In the reference of the configuration, a setting that is as an earlier one has no row if its default is the same too,
and a row that refers to the earlier one if only its default differs.
"""
_READ = frozenset(page for page, _ in _PAGES.values())


class Source(NamedTuple):
    """Measures of one Python file.

    Attributes:
        lines: Number of lines.
        code_lines: Number of lines that hold more than white space, comments and docstrings.
        tokens: Number of tokens on these lines.
        literals: Number of strings that are the name of a stage.
        configured: Number of functions with a parameter that is the configuration of a run.
        public: Number of functions, classes and constants of the module without a leading underscore.
        tests: Number of test functions.
    """

    lines: int
    code_lines: int
    tokens: int
    literals: int
    configured: int
    public: int
    tests: int


def measured(text: str, *, tokens: bool = True) -> Source:
    """Measure the text of a Python file; without `tokens`, which take longest, it has none and no line of code."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    docstrings = {
        (node.lineno, node.col_offset) for node in nodes if isinstance(node, ast.Expr) and _text(node.value) is not None
    }
    found = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text if tokens else "").readline)
        if token.type not in _LAYOUT and token.start not in docstrings
    ]
    code_lines = {line for token in found for line in range(token.start[0], token.end[0] + 1)}
    return Source(
        lines=len(text.splitlines()),
        code_lines=len(code_lines),
        tokens=len(found),
        literals=sum(_text(node) in STAGE_NAMES for node in nodes),
        configured=sum(isinstance(node, _FUNCTIONS) and _takes_configuration(node) for node in nodes),
        public=sum(not name.startswith("_") for name in _defined(tree)),
        tests=sum(isinstance(node, _FUNCTIONS) and node.name.startswith("test_") for node in nodes),
    )


def measures(files: Mapping[str, str], sources: Mapping[str, Source]) -> dict[str, float]:
    """The measures of a tree.

    Args:
        files: Text of each file, by its path in the repository.
        sources: Measures of the text of each Python file.
    """
    rooms: dict[str, list[Source]] = collections.defaultdict(list)
    folders: dict[str, list[Source]] = collections.defaultdict(list)
    for path in filter(_is_source, files):
        rooms[_room(path)].append(sources[files[path]])
        folders[path.partition("/")[0]].append(sources[files[path]])
    product = [*folders["moedisco_ray"], *folders["service"]]
    every = list(itertools.chain.from_iterable(folders.values()))
    inside = [room for room in sorted(rooms) if room.startswith(PRODUCT)]
    tokens = _total(product, "tokens")
    return {
        **{f"lines of {folder}": _total(folders[folder], "lines") for folder in MEASURED},
        "tokens of the product": tokens,
        "tokens per line of its code": round(tokens / max(1, _total(product, "code_lines")), 2),
        **{name: len(pattern.findall(files.get(page, ""))) for name, (page, pattern) in _PAGES.items()},
        "literals that name a stage": _total(product, "literals"),
        "functions that take the configuration": _total(product, "configured"),
        "test functions": _total(every, "tests"),
        **{f"public names of {room}": _total(rooms[room], "public") for room in inside},
    }


def table(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """One line per measure: both values, the difference, and a mark where it rose."""
    yield f"{'':<40}{'before':>10}{'now':>10}"
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, 0), after.get(name, 0)
        change = "" if old == new else f"{new - old:>+10,.6g}" + ("  rise" if new > old else "")
        yield f"{name:<40}{old:>10,.6g}{new:>10,.6g}{change}"


def seconds(reports: list[Path]) -> dict[str, float]:
    """Seconds of each folder of tests, from JUnit files of pytest."""
    found: dict[str, float] = collections.defaultdict(float)
    for case in itertools.chain.from_iterable(ET.parse(report).iter("testcase") for report in reports):
        found["/".join(case.get("classname", "").split(".")[:2])] += float(case.get("time", 0))
    return dict(sorted(found.items()))


def committed(revision: str) -> dict[str, str]:
    """Text of each measured file in a commit, by its path."""
    with tarfile.open(fileobj=io.BytesIO(_git("archive", revision))) as archive:
        members = {
            each.name: archive.extractfile(each) for each in archive if _is_source(each.name) or each.name in _READ
        }
        return {name: member.read().decode() for name, member in members.items() if member is not None}


def working_tree() -> dict[str, str]:
    """Text of each measured file here that git does not ignore, by its path."""
    names = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").decode().split("\0")
    paths = {name: ROOT / name for name in names if _is_source(name) or name in _READ}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}


def main(revision: str = "main") -> None:
    """Print the table, and the seconds of the last `make test` if its reports are there."""
    base = _git("merge-base", "HEAD", revision).decode().strip()
    before, now = committed(base), working_tree()
    texts = {tree[name]: name.startswith(PRODUCT) for tree in (before, now) for name in tree if _is_source(name)}
    sources = {text: measured(text, tokens=counts) for text, counts in texts.items()}
    shown = [
        f"before: {base[:8]}, where this branch left {revision}",
        *table(measures(before, sources), measures(now, sources)),
    ]
    times = seconds(sorted((ROOT / "build").glob("test-*.xml")))
    shown += [f"{f'seconds of {folder}':<40}{'':>10}{time:>10,.0f}" for folder, time in times.items()]
    print("\n".join(shown))  # noqa: T201


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.PIPE).stdout


def _is_source(path: str) -> bool:
    return path.endswith(".py") and path.partition("/")[0] in MEASURED


def _room(path: str) -> str:
    """The folder inside `moedisco_ray` or `service` that a file is in; elsewhere the top folder."""
    first, *others = path.split("/")
    return f"{first}/{others[0]}" if first in PRODUCT and len(others) > 1 else first


def _total(sources: Iterable[Source], field: str) -> int:
    return sum(getattr(source, field) for source in sources)


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _takes_configuration(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    parameters = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return any(each.annotation is not None and "RunConfig" in ast.unparse(each.annotation) for each in parameters)


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names that the statements of a module define, without what it imports."""
    for node in tree.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


if __name__ == "__main__":
    main(*sys.argv[1:])
