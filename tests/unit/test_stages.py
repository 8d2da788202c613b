"""Which stages a changed setting makes again."""

from __future__ import annotations

from typing import Any

import pytest

from moedisco_ray.core.config import check_config
from moedisco_ray.core.stages import STAGES, fingerprints

ORDER = [stage.name for stage in STAGES]


def digests(**sections: dict[str, Any]) -> dict[str, str]:
    return fingerprints(check_config({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, **sections}))


@pytest.mark.parametrize(("section", "setting", "value", "first"), [
    ("clusters", "method", "random", "cluster"),
    ("clusters", "method", "likelihood", "cluster"),
    ("clusters", "capacity", None, "cluster"),
    ("merge", "backbone", "auto", "merge"),
    ("merge", "backbone", "ties", "merge"),
    ("merge", "delta_scale", 0.9, "merge"),
    ("merge", "ties_keep", 0.5, "merge"),
    ("merge", "dare_drop", 0.9, "merge"),
    ("merge", "auto_scales", [1.0], "merge"),
    ("merge", "auto_tokens", 4096, "merge"),
    ("merge", "match_load", False, "merge"),
    ("finetune", "z_loss", 0.5, "finetune"),
    ("evaluation", "max_tokens", 5, "evaluate"),
    ("evaluation", "sources", [{"path": "s3://bucket/other"}], "evaluate"),
    ("evaluation", "lm_eval_limit", 5, "evaluate"),
    ("export", "dtype", "bf16", "export"),
])
def test_a_setting_changes_its_stage_and_those_after_it_alone(section: str, setting: str, value: Any, first: str) -> None:
    before, after = digests(), digests(**{section: {setting: value}})
    assert [name for name in ORDER if before[name] != after[name]] == ORDER[ORDER.index(first):]


@pytest.mark.parametrize(("reader", "first"), [("corpus", "corpus"), ("evaluate", "evaluate")])
def test_a_changed_file_changes_the_stage_that_reads_it_and_those_after_it(reader: str, first: str) -> None:
    config = check_config({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}})
    before, after = fingerprints(config, {reader: "a"}), fingerprints(config, {reader: "b"})
    assert [name for name in ORDER if before[name] != after[name]] == ORDER[ORDER.index(first):]


@pytest.mark.parametrize("sections", [
    {"pools": {"low_memory": {"max_workers": 2}}}, {"checkpoint": {"every": 7}}, {"tracking": {"tensorboard": True}}])
def test_where_and_when_work_happens_changes_nothing(sections: dict[str, Any]) -> None:
    assert digests(**sections) == digests()
