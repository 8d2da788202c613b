"""Break random lines of product code, one at a time, and list which of them no test notices.

`python tests/mutants.py --lines 60 --seed 1 --output build/mutants.json` draws lines of `moedisco_ray` and `service`
that hold something to break, breaks one thing in each, and runs the tests of `make test` that are at most two imports
away from the line's module. All happens in a copy of the working tree. A test that fails also without the change
catches nothing, and is left out.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("moedisco_ray", "service")
SELECTED = "not slow and not families and not chaos and not cluster and not fake and not gpu"
STEPS = 2
"""Number of imports between a test file and a module that it is taken to reach."""
MOST_FALSE_ALARMS = 5
"""Number of tests that may fail without the change before a line is given up."""
COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of a source file.

    Attributes:
        file: Path of the file below the root.
        line: Number of the line.
        kind: What is done to the line.
        before: The part that is replaced.
        after: What replaces it.
        span: Where the part begins and ends in the file (bytes).
    """

    file: str
    line: int
    kind: str
    before: str
    after: str
    span: tuple[int, int]

    def applied(self, source: bytes) -> bytes:
        """The file with the change."""
        start, end = self.span
        return source[:start] + self.after.encode() + source[end:]


def changes_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Kind and text of every change of a node."""
    match node:
        case ast.Compare(left, [operator, *rest], comparators):
            yield (
                "comparison flipped",
                f"({ast.unparse(ast.Compare(left, [COMPARISONS[type(operator)](), *rest], comparators))})",
            )
        case ast.BoolOp(operator, values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield "and/or swapped", f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(ast.Not(), operand):
            yield "not removed", f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield "constant changed", str(not value)
        case ast.Constant(int(value) | float(value)):
            yield "constant changed", f"({2 * value + 1!r})"
        case ast.BinOp(left, operator, right) if type(operator) in ARITHMETIC and not _has_text(node):
            yield "operator changed", f"({ast.unparse(ast.BinOp(left, ARITHMETIC[type(operator)](), right))})"
        case ast.Return(value) if value is not None and not _is_none(value):
            yield "None returned", "return None"
        case ast.Expr(ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Continue():
            yield "statement removed", "pass"


def _has_text(node: ast.AST) -> bool:
    return any(
        isinstance(each, ast.JoinedStr) or (isinstance(each, ast.Constant) and isinstance(each.value, str))
        for each in ast.walk(node)
    )


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, except parts of formatted text, whose positions Python 3.11 does not know."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _nodes(child)


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Every change of a file, also one that leaves no program."""
    source = (root / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in _nodes(ast.parse(source)):
        for kind, after in changes_of(node):
            span = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
            found.append(Mutant(file, node.lineno, kind, source[slice(*span)].decode(), after, span))
    return found


def is_program(root: Path, mutant: Mutant) -> bool:
    """Whether the changed file compiles."""
    try:
        compile(mutant.applied((root / mutant.file).read_bytes()), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def draw(root: Path, number: int, seed: int, files: Sequence[str]) -> list[Mutant]:
    """Draw lines among all that hold something to break, and for each one change."""
    lines = collections.defaultdict(list)
    for file in files:
        for mutant in mutants_of(root, file):
            lines[mutant.file, mutant.line].append(mutant)
    numbers = random.Random(seed)
    drawn = (numbers.choice(lines[each]) for each in numbers.sample(sorted(lines), len(lines)))
    return list(itertools.islice((mutant for mutant in drawn if is_program(root, mutant)), number))


def imports_of(root: Path, files: Sequence[str]) -> dict[str, set[str]]:
    """The files that each file imports, also within functions."""
    names = {_module(file): file for file in files}
    found = {}
    for file in files:
        wanted = set()
        for node in ast.walk(ast.parse((root / file).read_bytes())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[file] = {names[name] for name in wanted & names.keys()}
    return found


def _module(file: str) -> str:
    """The name by which a file is imported: helpers of tests are on the path by their own name."""
    path = Path(file).with_suffix("")
    if path.parts[0] == "tests":
        return path.name
    return ".".join(path.parts[:-1] if path.name == "__init__" else path.parts)


def distances(imports: Mapping[str, set[str]], test: str) -> dict[str, int]:
    """Number of imports from a test to each module.

    Helpers of tests and faces of packages count as the file that imports them.
    """
    found, waiting = {test: 0}, collections.deque([test])
    while waiting:
        file = waiting.popleft()
        for other in imports[file]:
            far = found[file] + (0 if other.startswith("tests/") or other.endswith("/__init__.py") else 1)
            if far < found.get(other, STEPS + 1):
                found[other] = far
                waiting.append(other)
    return found


def reaches(imports: Mapping[str, set[str]]) -> dict[str, dict[str, int]]:
    """For each test file, its distance to every module that it reaches."""
    return {name: distances(imports, name) for name in imports if re.match(r"tests/(?!gates/)\w+/test_\w+\.py$", name)}


def tests_of(reached: Mapping[str, Mapping[str, int]], file: str) -> list[str]:
    """Test files that reach a module, nearest first, then those that reach the fewest modules.

    If none does, all unit tests.
    """
    tests = [test for test, found in reached.items() if file in found]
    return sorted(tests, key=lambda test: ("/ray/" in test, reached[test][file], len(reached[test]), test)) or [
        "tests/unit"
    ]


def run_tests(root: Path, tests: Sequence[str], left_out: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run tests until one fails.

    Returns:
        `passed`, `failed` or `out of time`, and the first test that failed.
    """
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", SELECTED, *tests]
    command += [f"--deselect={test}" if "::" in test else f"--ignore={test}" for test in left_out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=root, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return "out of time", ""
    if process.returncode in (0, 5):  # 5: no test was selected
        return "passed", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    return "failed", failed[1] if failed else ""


def judge(root: Path, mutant: Mutant, tests: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the tests of one mutant, and say whether one of them fails because of it."""
    path, started, left_out = root / mutant.file, time.monotonic(), []
    source = path.read_bytes()
    while True:
        _write(path, mutant.applied(source))
        outcome, test = run_tests(root, tests, left_out, seconds - (time.monotonic() - started))
        _write(path, source)
        if outcome != "failed" or not test or run_tests(root, [test], (), seconds)[0] == "passed":
            break
        left_out.append(test)
        if len(left_out) > MOST_FALSE_ALARMS:
            outcome = "undecided"
            break
    named = {"passed": "survived", "failed": "caught"}.get(outcome, outcome)
    shown = {key: value for key, value in dataclasses.asdict(mutant).items() if key != "span"}
    taken = round(time.monotonic() - started, 1)
    return shown | {"outcome": named, "by": test, "test_files": len(tests), "left_out": left_out, "seconds": taken}


def _write(path: Path, source: bytes) -> None:
    """Write a file, and remove its bytecode: two versions may have the same size and second."""
    path.write_bytes(source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def tracked() -> list[str]:
    """Files of the repository, as they are in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def main() -> None:
    """Draw lines, judge each, and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=60, help="number of lines to break")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of one line's tests")
    parser.add_argument("--within", nargs="+", default=PRODUCT, help="folders or files to draw from")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "mutants.json", help="file of the results, as JSON"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        root, files = Path(home), tracked()
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        python = [name for name in files if name.endswith(".py")]
        imports = imports_of(
            root, [name for name in python if name.startswith((*PRODUCT, "tests/", "docs/", "benchmarks/"))]
        )
        reached = reaches(imports)
        drawn = [name for name in python if name.startswith(tuple(arguments.within))]
        found: list[dict[str, Any]] = []
        for mutant in draw(root, arguments.lines, arguments.seed, drawn):
            found.append(judge(root, mutant, tests_of(reached, mutant.file), arguments.seconds))
            print(json.dumps(found[-1]), flush=True)  # noqa: T201
            counts = collections.Counter(each["outcome"] for each in found)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(
                json.dumps({"seed": arguments.seed, "outcomes": counts, "lines": found}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
