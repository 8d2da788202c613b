"""Names of models for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from moedisco_ray.core.store.run_models import model_name


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("s3://bucket/runs/demo/model", "demo"),
        ("s3://bucket/runs/demo", "demo"),
        ("hf://ORG/NAME@main", "ORG/NAME"),
        (Path("runs/demo"), "demo"),
        (Path("weights.gguf"), "weights"),
    ],
)
def test_a_model_has_the_name_of_its_run(place: str | Path, name: str) -> None:
    assert model_name(place) == name
