"""Print how many tests were skipped and why, and which were slowest, from JUnit files of pytest.

`python tests/skipped.py FILE...` prints two lines. A reason for a skip says what to install; a test over 4 seconds
belongs in `make test-slow`.
"""

import collections
import sys
import xml.etree.ElementTree as ET

SLOWEST = 5


def main(files: list[str]) -> None:
    """Count the skipped tests by reason, and print the most frequent reasons first."""
    cases = [case for file in files for case in ET.parse(file).iter("testcase")]
    reasons = collections.Counter(
        skip.get("message", "").removeprefix("Skipped: ") for case in cases for skip in case.iter("skipped")
    )
    listed = "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common())
    print("no test was skipped" if not reasons else f"{reasons.total()} tests were skipped: {listed}")  # noqa: T201
    slowest = sorted(((float(case.get("time", 0)), case.get("name", "")) for case in cases), reverse=True)[:SLOWEST]
    print("the slowest tests: " + "; ".join(f"{seconds:.0f} s {name}" for seconds, name in slowest))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
