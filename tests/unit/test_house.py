"""The script behind `make house` counts what it says it counts."""

import pytest

from tests import house

CODE = '''"""A module."""

import os

LIMIT, _HIDDEN = 3, 4
rate: float = 0.5


class Part:
    """A part."""

    def of(self, name):     # a comment
        """Docstrings and comments are no code, though they may name "merge"."""
        return name == "merge" or [x for x in name]


def _inner(config: RunConfig | None, *, other: int):
    pass


async def test_something():
    assert "seeds" != "seed"
'''


def test_a_source_is_measured_by_its_code_and_not_by_its_text():
    found = house.measured(CODE)
    assert (found.lines, found.literals, found.tests) == (CODE.count("\n"), 2, 1)
    assert found.configured == 1
    assert found.public == len(["LIMIT", "rate", "Part", "test_something"])
    assert found.code_lines == 10
    without = house.measured(CODE.replace("  # a comment", "").replace('"""A part."""\n', "\n"))
    assert (without.tokens, without.code_lines) == (found.tokens, found.code_lines)


def test_a_tree_is_measured_by_rooms_and_by_its_reference_pages():
    files = {
        "moedisco_ray/core/a.py": CODE,
        "moedisco_ray/core/b/c.py": CODE,
        "service/errors.py": CODE,
        "tests/unit/test_a.py": CODE,
        "docs/configuration.md": "| setting |\n| --- |\n| `a.b` | 1 |\n| `a.c` | As `a.b`. |\n\nAs in `a`: `d.b`.\n",
        "README.md": "two words\n",
        "docs/cli.md": (
            "```text\nmoedisco [OPTIONS] COMMAND [ARGS]...\n```\n"
            "```text\nmoedisco run [OPTIONS]\n```\n| `--set KEY` | x |\n"
        ),
        "docs/rest.md": "### `GET /a`\n",
    }
    found = house.measures(files, {CODE: house.measured(CODE)})
    named = (
        "settings with a row",
        "settings with a meaning of their own",
        "commands",
        "options",
        "REST routes",
        "lines of README",
        "words of README",
    )
    assert [found[name] for name in named] == [2, 1, 1, 1, 1, 1, 2]
    assert (found["public names of moedisco_ray/core"], found["public names of service"]) == (8, 4)
    assert (found["literals that name a stage"], found["test functions"]) == (6, 4)


def test_only_what_rose_is_marked():
    lines = list(house.table({"lines": 3, "names": 5, "gone": 1}, {"lines": 4, "names": 5, "new": 2}))
    assert [line.split()[0] for line in lines if line.endswith("rise")] == ["lines", "new"]
    assert lines[3].split() == ["gone", "1", "0", "-1"]


def test_seconds_are_summed_by_folder(tmp_path):
    report = tmp_path / "test-units.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.unit.test_a" time="1.5"/>'
        '<testcase classname="tests.unit.test_b.Group" time="0.5"/><testcase classname="tests.ray.test_c" time="9"/>'
        "</testsuite></testsuites>"
    )
    assert house.seconds([report]) == pytest.approx({"tests/ray": 9, "tests/unit": 2})
