"""Whatever a configuration names, nothing that the service accepts leads a run into a place that is denied to it."""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import pytest
from drawn import examples
from hostile_places import NEEDS, put
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from place_settings import marked

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import ReadsFrom, places
from moedisco_ray.core.errors import ConfigError, UserError
from moedisco_ray.core.store.read_roots import opened, reading_within
from moedisco_ray.stages.corpus.files import list_files
from service.domain.path_sandbox import check_links, sandboxed
from service.settings import Settings

RUN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
DENIED = (
    "state",
    ".local",
    ".ssh",
    ".env",
    "runs",
    "data/homes",
    "checkpoints",
    "data/token.txt",
    "data/.git",
    "old.sqlite3",
)
"""What is denied below the root of the tree."""
FILES = (
    "state/admin-token",
    ".local/x.txt",
    ".ssh/id",
    ".env",
    f"runs/{RUN}/demo/corpus/x.txt",
    "data/homes/x.txt",
    "checkpoints/x.txt",
    "data/token.txt",
    "data/.git/config",
    "old.sqlite3",
    "data/a.txt",
    "data/sub/b.txt",
    "c.txt",
)
LINKS = {
    "s": "state",
    "data/up": "..",
    "data/r": "../runs",
    "data/k": "../.ssh",
    "data/sub/t": "../token.txt",
    "e": ".env",
    "p": "/proc/self",
    "data/ok": "sub",
    "chain": "data/k",
    "checkpoints/out": "../state",
    "runs/link": "../data",
    f"runs/{RUN}/out": "../../state",
}
PARTS = (
    "data",
    "sub",
    "state",
    "runs",
    "checkpoints",
    "homes",
    RUN,
    RUN.lower(),
    "demo",
    "corpus",
    ".local",
    ".ssh",
    ".env",
    ".git",
    "id",
    "token.txt",
    "admin-token",
    "a.txt",
    "x.txt",
    "old.sqlite3",
    "environ",
    *(Path(link).name for link in LINKS),
    "*",
    "**",
    "?*",
    "[.]*",
    "[!x]*",
    "r*",
    "s*",
    "d?ta",
    "*.txt",
    ".*",
    "..",
    ".",
    "",
    "%2e%2e",
    "%2essh",
    "~",
    "{a,b}",
    "\\",
)
PREFIXES = ("", "", "", "ROOT/", "ROOT//", "/", "/proc/", "file://ROOT/", "s3://b/", "run://", "embedded")
FIELDS = sorted(marked(RunConfig))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with public text, with everything that the service keeps, and with links from one to the other."""
    root = tmp_path_factory.mktemp("tree").resolve()
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for link, target in LINKS.items():
        (root / link).symlink_to(target)
    return root


def operator(root: Path, inputs: list[Path], storage: list[Path]) -> Settings:
    return Settings(
        state_dir=root / "state",
        input_roots=(*map(str, inputs), "s3://texts/wiki"),
        output_roots=(root / "runs",),
        home_dir=root / "data" / "homes",
        storage_roots=tuple(map(str, storage)),
        admin_token_file=root / "data" / "token.txt",
        database_url=f"sqlite:///{root / 'old.sqlite3'}",
    )


@st.composite
def values(draw: st.DrawFn) -> str:
    """A path, relative or absolute, of parts of the tree, of wildcards and of what tries to get around a check."""
    slash = draw(st.sampled_from(["/", "/", "//", "/./"]))
    return draw(st.sampled_from(PREFIXES)) + slash.join(draw(st.lists(st.sampled_from(PARTS), max_size=5)))


def configuration(field: str, value: str) -> dict[str, Any]:
    entry = field.replace("owners.*", "owners.alice").replace("*", "0")
    raw = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, **copy.deepcopy(NEEDS.get(entry, {}))}
    put(raw, entry.split("."), value)
    return raw


def is_denied(path: str | Path, root: Path) -> bool:
    real = Path(os.path.realpath(path))
    return not real.is_relative_to(root) or any(real.is_relative_to(root / name) for name in DENIED)


@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=examples(50, 150), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=values(), inner=st.booleans())
@example(value=".ssh/id", inner=False)
@example(value="ROOT/state", inner=False)
@example(value="data/k/id", inner=False)
@example(value="**/*", inner=False)
@example(value=f"runs/{RUN}/demo", inner=False)
def test_nothing_that_is_accepted_leads_into_a_denied_place(tree: Path, field: str, value: str, inner: bool) -> None:
    """Before (af276e38): falsified for 8 of 9 settings, such as tokenizer.path with value .ssh/id_rsa; output held."""
    reads = isinstance(marked(RunConfig)[field][1], ReadsFrom)
    storage = [tree / "checkpoints", *([] if reads else [tree])]
    roots = operator(tree, [tree / "data", tree] if inner else [tree], storage).roots
    try:
        config = sandboxed(RunConfig.model_validate(configuration(field, value.replace("ROOT", str(tree)))), roots)
        check_links(config, roots)
    except (ConfigError, ValueError):
        return
    place = next(
        place for place in places(config) if place.field == field.replace("owners.*", "owners.alice").replace("*", "0")
    )
    path = str(place.value)
    if path == "embedded" or "://" in path or path.startswith("run:"):
        return
    if not isinstance(place.marker, ReadsFrom):
        own = tree / ("runs" if place.marker.what == "runs" else "checkpoints")
        assert Path(os.path.realpath(path)).is_relative_to(own) or not is_denied(path, tree)
        assert RUN not in Path(os.path.realpath(path)).parts
        return
    assert set("*?[") & set(path) or not is_denied(path, tree), "the check lets it through"
    with reading_within(roots.readable()):
        for found in driver_reads(config, path):
            assert not is_denied(found, tree), "the driver reads it"


@pytest.mark.parametrize("field", FIELDS)
def test_other_places_are_accepted(tree: Path, field: str) -> None:
    roots = operator(tree, [tree], [tree / "checkpoints"]).roots
    value = "data/ok/b.txt" if isinstance(marked(RunConfig)[field][1], ReadsFrom) else "team/a"
    check_links(sandboxed(RunConfig.model_validate(configuration(field, value)), roots), roots)


def driver_reads(config: RunConfig, path: str) -> list[str]:
    """The files that a driver reads at a path: of a source all, else those directly in the folder that it can open."""
    source = next((each for each in (*config.corpus.sources, *config.evaluation.sources) if each.path == path), None)
    if source is not None:
        try:
            return [file.path for file in list_files("source", source.model_copy(update={"format": "text"})).files]
        except UserError:
            return []
    found = []
    for each in Path(path).iterdir() if Path(path).is_dir() else [Path(path)]:
        with contextlib.suppress(OSError), opened(each):
            found.append(str(each))
    return found
