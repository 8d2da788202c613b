"""Sizes beyond any real model do not keep the service busy, wherever they stand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import Service, demo

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.run import divisors

CPU_SECONDS = 1.0
HUGE = 2**50 + 1
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
MOE = {**DENSE, "model_type": "qwen3_moe", "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
MANY_TYPES = [
    {
        "name": f"t{i}",
        "resource": f"tag{i}",
        "memory_gb": 100.0,
        "price_per_hour": 1 + i / 7,
        "speed": 1 + i / 3,
        "max_workers": 1,
    }
    for i in range(32)
]


def estimated(api: Service, **changes: Any) -> tuple[int, str]:
    """Status and text of an estimate that takes little processor time."""
    api.reader.get("/v1/runs")
    before = time.process_time()
    answer = api.reader.post("/v1/estimates", json={"config": demo(**changes)})
    assert time.process_time() - before < CPU_SECONDS
    return answer.status_code, answer.text


def stored(tmp_path: Path, config: Any) -> str:
    folder = tmp_path / "data" / "model"
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return "model"


def test_a_small_body_with_very_many_experts_is_refused_at_once(api: Service, tmp_path: Path) -> None:
    start = stored(tmp_path, DENSE)
    status, text = estimated(api, model={"init": {"upcycle": start, "num_experts": HUGE}}, clusters={"count": 2})
    assert status == 422
    assert "65536" in text
    status, _ = estimated(api, model={"config": {"num_experts": HUGE}}, clusters={"count": 2})
    assert status == 422


@pytest.mark.parametrize(
    "claim",
    [
        {"num_experts": 10**15},
        {"num_experts": 10**15 + 37, "num_experts_per_tok": 10**15},
        {"num_hidden_layers": 10**12},
        {"hidden_size": 10**300},
        {"vocab_size": 10**15},
        {"num_experts": "many"},
        {"rope_scaling": [1]},
        {"head_dim": "a" * 1000, "num_attention_heads": 10**15},
    ],
    ids=lambda claim: next(iter(claim)),
)
@pytest.mark.parametrize("kind", ["checkpoint", "upcycle"])
def test_what_a_config_file_claims_is_held_to_the_same_limits(
    api: Service, tmp_path: Path, kind: str, claim: Any
) -> None:
    family, base = ("qwen3_moe", MOE) if kind == "checkpoint" else ("qwen2_moe", {**DENSE, "model_type": "qwen2"})
    if kind == "upcycle" and "num_experts" in claim:
        family, base = "qwen3_moe", MOE
    start = stored(tmp_path, base | claim)
    tokens = {"total": 1_000_000, "seed_share": 0}
    status, text = estimated(api, model={"family": family, "init": {kind: start}}, clusters={"count": 2}, tokens=tokens)
    assert status == 422, text
    assert "config.json cannot be used" in text or "experts of" in text


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, '{"hidden_size": ' + "9" * 10_000 + "}", "\udcff"], ids=len)
def test_a_config_file_that_is_no_json_object_is_refused(api: Service, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "data" / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    status, answer = estimated(api, model={"init": {"checkpoint": "model"}}, tokens={"seed_share": 0})
    assert status == 422
    assert "no readable config.json" in answer


@pytest.mark.parametrize("clusters", [65_536, 10**7])
def test_more_clusters_than_the_limit_are_refused(api: Service, clusters: int) -> None:
    status, text = estimated(
        api,
        model={"config": {"num_experts": 65_536}},
        clusters={"count": clusters},
        pools={"low_memory": {"types": MANY_TYPES}},
    )
    assert status == 422
    assert "4096" in text


@pytest.mark.parametrize("upcycled", [False, True])
def test_the_most_clusters_on_the_most_types_are_estimated_quickly(
    api: Service, tmp_path: Path, upcycled: bool
) -> None:
    low = {"gpu": 1, "types": MANY_TYPES, "max_workers": 65_536}
    sizes = {"num_experts": 65_536, "num_hidden_layers": 1, "hidden_size": 8, "moe_intermediate_size": 8}
    model: dict[str, Any] = {"config": sizes}
    if upcycled:
        model = {"init": {"upcycle": stored(tmp_path, DENSE), "num_experts": 65_536}}
    status, text = estimated(
        api, model=model, clusters={"count": 4096}, pools={"low_memory": low}, tokens={"total": 10**9}
    )
    assert status == 200, text


def test_every_whole_number_of_a_configuration_has_a_limit() -> None:
    def unbounded(node: Any, path: str) -> Iterator[str]:
        if isinstance(node, dict):
            # a constant is one value
            if node.get("type") == "integer" and not {"maximum", "exclusiveMaximum", "const"} & node.keys():
                yield path
            for key, value in node.items():
                yield from unbounded(value, f"{path}.{key}")
        elif isinstance(node, list):
            for value in node:
                yield from unbounded(value, path)

    assert not list(unbounded(RunConfig.model_json_schema(), ""))


def test_divisors_are_found_in_steps_of_the_square_root() -> None:
    for n in range(1, 500):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
    before = time.process_time()
    assert len(divisors(10**12)) == 169
    assert time.process_time() - before < CPU_SECONDS
