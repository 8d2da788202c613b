"""Globs match as fnmatch and pathlib do, and never take exponential time: they come from strangers."""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import Source
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.globs import Glob, GlobError
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.splits import files_of_split

LETTERS = "a" * 60
DEEP = "a/" * 40 + LETTERS
HOSTILE = {
    "letters": "*a" * 12 + "b",
    "signs": "?*" * 12 + "b",
    "sets": "*[a]" * 12 + "b",
    "folders": "**/" * 12 + "b",
    "named folders": "**/a/" * 12 + "b",
}
names = st.text("ab.-[]!^\\\n", min_size=1, max_size=8)
parts = st.text("ab*?.[]!-", max_size=6).map(lambda part: re.sub(r"\*+", "*", part)) | st.just("**")


def config_of(folder: Path, source: dict[str, Any]) -> str:
    config = folder / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "a",
                "model": {"family": "qwen3_moe"},
                "tokens": {"total": 10**6},
                "corpus": {"sources": [source]},
                "output": str(folder / "runs"),
            }
        )
    )
    return str(config)


@given(pattern=names.map(lambda text: text.replace("a", "*")) | parts, name=names)
def test_a_part_without_slashes_matches_as_fnmatch_does(pattern: str, name: str) -> None:
    plain = re.sub(r"\*+", "*", pattern)
    assert Glob.of(plain).matches(name) == fnmatch.fnmatchcase(name, plain)


@given(
    pattern=st.lists(parts, min_size=1, max_size=6),
    path=st.lists(st.text("ab.", min_size=1, max_size=3), min_size=1, max_size=6),
)
def test_folders_match_as_when_every_way_is_tried(pattern: list[str], path: list[str]) -> None:
    def tried(wanted: list[str], left: list[str]) -> bool:
        if not wanted:
            return not left
        if wanted == ["**"]:
            return bool(left)
        if wanted[0] == "**":
            return any(tried(wanted[1:], left[skipped:]) for skipped in range(len(left) + 1))
        return bool(left) and fnmatch.fnmatchcase(left[0], wanted[0]) and tried(wanted[1:], left[1:])

    assert Glob.of("/".join(pattern)).matches("/".join(path)) == tried(pattern, path)


@given(
    pattern=st.lists(parts, min_size=1, max_size=6),
    path=st.lists(st.text("ab.", min_size=1, max_size=3), min_size=2, max_size=6),
)
def test_no_folder_above_a_match_is_skipped(pattern: list[str], path: list[str]) -> None:
    glob = Glob.of("/".join(pattern))
    if glob.matches("/".join(path)):
        assert all(glob.may_match_below("/".join(path[:depth])) for depth in range(1, len(path)))


def comparisons(do: Callable[[], object]) -> int:
    """Number of names that are compared with a part of a pattern."""
    count = 0

    def seen(_: object, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "c_call" and argument.__name__ == "match"

    sys.setprofile(seen)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("pattern", ["**/" * 200 + "b", "**/a/" * 200 + "b", "**/*/" * 200 + "b"])
def test_the_number_of_comparisons_is_at_most_that_of_the_pairs(pattern: str) -> None:
    glob, path = Glob.of(pattern), "a/" * 300 + "a"
    assert 0 < comparisons(lambda: glob.matches(path)) <= len(glob.parts) * (path.count("/") + 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_patterns_of_25_letters_in_exclude_end(tmp_path: Path, kind: str) -> None:
    """Protects the machine that lists the files of a configuration.

    Before (af276e38): every pattern held the interpreter lock until the test was killed after 60 s.
    """
    folder = tmp_path / DEEP
    folder.parent.mkdir(parents=True)
    folder.write_text("text")
    listing = list_files("corpus.sources.0", Source(path=str(tmp_path), format="text", exclude=(HOSTILE[kind],)))
    assert [file.path for file in listing.files] == [str(folder)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_patterns_of_a_data_sets_card_end(kind: str) -> None:
    """Protects a user of a stranger's data set.

    Before (af276e38): every pattern held the interpreter lock until the test was killed after 60 s.
    """
    card = f"---\nconfigs:\n- data_files:\n  - {{split: train, path: ['{HOSTILE[kind]}', '{LETTERS}']}}\n---\n"
    assert files_of_split((LETTERS, DEEP), "train", None, card) == {LETTERS}


@pytest.mark.timeout(60)
def test_a_path_with_many_wildcards_is_planned(tmp_path: Path) -> None:
    """Protects a user who plans a stranger's configuration.

    Before (af276e38): glob.iglob was still searching the same 40 folders after 12 s.
    """
    (tmp_path / DEEP).parent.mkdir(parents=True)
    (tmp_path / DEEP).write_text("text")
    done = CliRunner().invoke(app, ["plan", config_of(tmp_path, {"path": f"{tmp_path}/{'**/' * 25}b"})])
    assert done.exit_code == 0, done.output


def test_two_stars_next_to_other_characters_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(GlobError, match="`\\*\\*` stands alone between slashes, unlike in 'a\\*\\*'"):
        Glob.of("x/a**/b")
    for source, field in (
        ({"path": "x", "exclude": ["a", "**.txt"]}, "corpus.sources.0.exclude.1: "),
        ({"path": "a**"}, "corpus.sources.0.path: "),
    ):
        done = CliRunner().invoke(app, ["plan", config_of(tmp_path, source)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"moedisco: {field}")
        assert "stands alone between slashes" in done.stderr


def test_a_card_with_such_a_pattern_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: [{split: train, path: 'a**'}]\n---\n")
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.split.*its card has a pattern that is no glob"):
        list_files("corpus.sources.0", Source(path=str(tmp_path), split="train"))
