"""The web page's files: what others wrote of them, and what must keep up with the rest of the product."""

import hashlib
import re
from typing import get_args

from moedisco_ray.core.records.events import EventType
from service.web import STATIC


def test_every_type_of_event_is_received_and_described():
    kinds = set(get_args(EventType))
    [listed] = re.findall(r"const TYPES = \[(.*?)\];", (STATIC / "run" / "stream.js").read_text(), re.DOTALL)
    assert set(re.findall(r'"(\w+)"', listed)) == kinds
    assert set(re.findall(r'case "(\w+)":', (STATIC / "run" / "events.js").read_text())) == kinds - {"heartbeat"}


def test_every_vendored_file_is_listed_with_its_digest_and_has_its_licence():
    vendor = STATIC / "vendor"
    listed = {}
    for line in (vendor / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 8 and cells[1] not in ("file", "---"):
            listed[cells[1]] = cells[-2]
    there = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in vendor.iterdir()
        if path.suffix not in (".md", ".LICENSE")
    }
    assert listed == there
    assert all((vendor / f"{name.split('.')[0].removesuffix('-hooks')}.LICENSE").exists() for name in there)
