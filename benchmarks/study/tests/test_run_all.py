from __future__ import annotations

import shlex

from benchmarks.harness import RESULTS
from benchmarks.run_all import COMMANDS

NAMES = {"study.simulation": "simulator", "corpus_engines": "corpus_blocks"}
"""Results whose names are not their modules'."""


def test_every_result_is_measured_again_and_the_page_is_written_last() -> None:
    commands = [shlex.split(command) for command in COMMANDS]
    written = [
        words[words.index("--result") + 1] if "--result" in words else NAMES.get(words[0], words[0])
        for words in commands
    ]
    assert written[-1] == "document"
    comparison = {"corpus_engines"}  # of two commits
    assert set(written[:-1]) == {path.stem for path in RESULTS.glob("*.json")} - comparison
