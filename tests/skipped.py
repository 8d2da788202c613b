"""Print in one line how many tests were skipped and why, from JUnit files of pytest: `python tests/skipped.py FILE...`.

A reason for a skip says what to install.
"""

import collections
import sys
import xml.etree.ElementTree as ET


def main(files: list[str]) -> None:
    """Count the skipped tests by reason, and print the most frequent reasons first."""
    skips = (skip for file in files for skip in ET.parse(file).iter("skipped"))
    reasons = collections.Counter(skip.get("message", "").removeprefix("Skipped: ") for skip in skips)
    listed = "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common())
    print("no test was skipped" if not reasons else f"{reasons.total()} tests were skipped: {listed}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
