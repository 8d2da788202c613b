"""What clients of an earlier commit would notice: `python -m docs.api_changes`, run by CI.

Compares the OpenAPI documents, which hold the configuration's schema, of the last release and of this tree. Before the
first release, it compares with the commit of main that this branch began at, and only prints what it finds.

A change breaks clients if a request that was valid is refused, or if an answer lacks what it had, or has a type that it
did not have. New values of a text in an answer, such as the name of a family, break none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from service.api.app import api_routes
from service.api.openapi import document

ROOT = Path(__file__).resolve().parents[1]
_OWN = """import json
from service.api import app, openapi
print(json.dumps(openapi.document(app.api_routes().routes, "")))"""
"""What another commit runs, which need not have this module."""
Document = Mapping[str, Any]
Way = Literal["request", "answer"]
_LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def here() -> Document:
    """The OpenAPI document of this tree."""
    return document(api_routes().routes, "")


def breaking(old: Document, new: Document) -> list[str]:
    """One line for each change that breaks a client of `old`; a schema's is named where it is met first."""
    found: list[str] = []
    comparison = _Comparison(old, new)
    for path, operations in sorted(old["paths"].items()):
        for method, operation in operations.items():
            now = new["paths"].get(path, {}).get(method)
            changes = ["is gone"] if now is None else comparison.operation(operation, now)
            found += [f"{method.upper()} {path} {change}" for change in changes]
    return found


class _Pair(NamedTuple):
    """The same place in two documents."""

    place: str
    old: Document
    new: Document

    def below(self, name: str, old: Document, new: Document) -> _Pair:
        return _Pair(f"{self.place}.{name}".lstrip("."), old, new)


class _Comparison:
    def __init__(self, old: Document, new: Document) -> None:
        self._old, self._new = old, new
        self._seen: set[tuple[Way, str, str]] = set()

    def operation(self, old: Document, new: Document) -> Iterator[str]:
        parameters = {(each["in"], each["name"]): each for each in new.get("parameters", ())}
        known = {(each["in"], each["name"]): each for each in old.get("parameters", ())}
        for key, was in known.items():
            if key not in parameters:
                yield f"parameter {key[1]} is gone"
            else:
                yield from self._schema("request", _Pair(key[1], was["schema"], parameters[key]["schema"]))
        for key in parameters.keys() - known.keys():
            if parameters[key].get("required"):
                yield f"parameter {key[1]} must be given"
        yield from self._bodies("request", old.get("requestBody", {}), new.get("requestBody", {}))
        for status, answer in old["responses"].items():
            if status.startswith("2") and status not in new["responses"]:
                yield f"has no answer {status}"
            elif status.startswith("2"):
                yield from self._bodies("answer", answer, new["responses"][status])

    def _bodies(self, way: Way, old: Document, new: Document) -> Iterator[str]:
        for kind, was in old.get("content", {}).items():
            if kind not in new.get("content", {}):
                yield f"{way}: {kind} is gone"
            else:
                yield from self._schema(way, _Pair(way, was.get("schema", {}), new["content"][kind].get("schema", {})))

    def _schema(self, way: Way, pair: _Pair) -> Iterator[str]:
        old, new = _alternatives(self._old, pair.old), _alternatives(self._new, pair.new)
        lost, more = (old, new) if way == "request" else (new, old)
        if "any" not in more:
            for kind in sorted(lost.keys() - more.keys() - ({"integer"} if "number" in more else set())):
                yield f"{pair.place} {'may not be' if way == 'request' else 'may be'} {kind}"
        for kind in sorted(old.keys() & new.keys()):
            if not self._was_seen(way, old[kind].name, new[kind].name):
                yield from self._alike(way, pair._replace(old=old[kind].schema, new=new[kind].schema))

    def _was_seen(self, way: Way, old: str, new: str) -> bool:
        key = (way, old, new)
        seen = bool(old and new) and key in self._seen
        self._seen.add(key)
        return seen

    def _alike(self, way: Way, pair: _Pair) -> Iterator[str]:
        """Differences of two schemas of the same type."""
        yield from _values(way, pair)
        yield from self._properties(way, pair)
        for word in ("items", "additionalProperties"):
            old, new = pair.old.get(word), pair.new.get(word)
            if isinstance(old, dict) and isinstance(new, dict):
                yield from self._schema(way, pair.below("*", old, new))

    def _properties(self, way: Way, pair: _Pair) -> Iterator[str]:
        old, new = pair.old.get("properties", {}), pair.new.get("properties", {})
        needed, now = set(pair.old.get("required", ())), set(pair.new.get("required", ()))
        for name, was in old.items():
            if name not in new:
                yield f"{pair.place}.{name} is gone"
            else:
                yield from self._schema(way, pair.below(name, was, new[name]))
        if way == "request":
            yield from (f"{pair.place}.{name} must be given" for name in sorted(now - needed))
        else:
            yield from (f"{pair.place}.{name} may be missing" for name in sorted((needed - now) & new.keys()))


def _values(way: Way, pair: _Pair) -> Iterator[str]:
    if way == "answer":
        return
    old, new = _listed(pair.old), _listed(pair.new)
    if new is not None:
        refused = sorted(old - new) if old is not None else ["other values"]
        yield from (f"{pair.place} may not be {value}" for value in refused)
    for word in (*_LEAST, *_MOST):
        was, now = pair.old.get(word), pair.new.get(word)
        if now is not None and (was is None or (now > was if word in _LEAST else now < was)):
            yield f"{pair.place}: {word} is {now}"
    pattern = pair.new.get("pattern")
    if pattern is not None and pattern != pair.old.get("pattern"):
        yield f"{pair.place}: pattern is {pattern}"


def _listed(schema: Document) -> set[str] | None:
    """The values that are allowed, as JSON; None if they are not listed."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if values is None else {json.dumps(value) for value in values}


class _Alternative(NamedTuple):
    """A schema without alternatives, and its name; empty if it has none."""

    name: str
    schema: Document


def _alternatives(within: Document, schema: Document) -> dict[str, _Alternative]:
    """The schemas that a value may have, by type; further objects by type and name."""
    found: dict[str, _Alternative] = {}
    for each in schema.get("anyOf") or schema.get("oneOf") or [schema]:
        name = each.get("$ref", "").rpartition("/")[2]
        plain = within["components"]["schemas"][name] if name else each
        if "anyOf" in plain or "oneOf" in plain:
            found |= _alternatives(within, plain)
            continue
        kinds = plain.get("type", "any")
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            found[f"{kind} {name}" if kind == "object" and kind in found else kind] = _Alternative(name, plain)
    return found


def of_commit(commit: str) -> Document:
    """The OpenAPI document of another commit, made by its own code with the packages of this environment."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)  # noqa: S607
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)  # noqa: S607
        made = subprocess.run([sys.executable, "-c", _OWN], cwd=folder, check=True, capture_output=True)
    found: Document = json.loads(made.stdout)
    return found


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)  # noqa: S607
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    release = _git("describe", "--tags", "--abbrev=0", "--match", "v*")
    base = release or _git("merge-base", "HEAD", "origin/main")
    if base is None:
        print("no release and no origin/main to compare the API with")
        return 0
    changes = breaking(of_commit(base), here())
    print(f"changes of the API since {base} that break clients: {len(changes)}")
    for change in changes:
        print(f"  {change}")
    return 1 if changes and release else 0


if __name__ == "__main__":
    sys.exit(main())
