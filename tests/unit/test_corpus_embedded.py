from __future__ import annotations

import re
from importlib.metadata import distribution

import pytest
from corpus_sources import documents_of
from packaging.requirements import Requirement

from moedisco_ray.core.config import CorpusSource, Source
from moedisco_ray.stages.corpus import embedded
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits


def hard_dependencies():
    found, waiting = {}, [("moedisco-ray", frozenset())]
    while waiting:
        name, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if extras <= found.get(key, {None}) and key in found:
            continue
        found[key] = found.get(key, set()) | extras
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in found[key] | {""}):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return set(found)


def test_every_package_it_reads_comes_with_this_one():
    assert set(embedded._ALL) <= hard_dependencies()
    assert {name for domain in embedded.DOMAINS.values() for name in domain.packages} <= set(embedded._ALL)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "python" else [pytest.mark.slow]) for name in embedded.DOMAINS]
)
def test_a_domain_is_distinct_readable_text_of_bounded_documents(name):
    texts = embedded.domain_texts(name, 100_000)
    assert 100_000 <= sum(len(text) for text in texts) < 105_000
    assert len(set(texts)) == len(texts)
    assert max(len(text) for text in texts) <= embedded.DOCUMENT_CHARACTERS
    assert min(len(text) for text in texts) >= 200
    shorter = embedded.domain_texts(name, 60_000)
    assert texts[: len(shorter)] == shorter


def test_the_embedded_source_becomes_one_named_source_per_domain(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "domain_texts", lambda name: [f"{name} one", f"{name} two\nlines"])
    inputs = expand_sources(
        [CorpusSource(path="embedded", weight=2), Source(path="embedded", name="mine")], tmp_path, Limits(1024, 8192)
    )
    names = list(embedded.DOMAINS)
    assert [item.name for item in inputs] == [*names, *(f"mine-{name}" for name in names)]
    assert [item.order for item in inputs] == list(range(2 * len(names)))
    assert [item.settings.weight for item in inputs] == [2] * len(names) + [1] * len(names)
    first = inputs[0]
    (unit,) = plan_units([(first, list_files(first.field, first.settings).files)])
    assert [document.text for document in documents_of(unit)] == [f"{names[0]} one", f"{names[0]} two\nlines"]


def test_its_identity_follows_versions(monkeypatch):
    before = embedded.identity()
    assert embedded.identity() == before
    monkeypatch.setattr(embedded, "_distribution", lambda _: None)
    assert embedded.identity() != before
