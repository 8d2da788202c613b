"""Every text, list and mapping of a configuration has a maximum, and what is larger is refused at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.errors import UserError

MANY = ["full_attention"] * 1_200_000
"""20 MB of JSON."""
BASE: dict[str, Any] = {
    "name": "a",
    "corpus": {"sources": [{"path": "embedded"}]},
    "tokens": {"total": 10**6, "seed_share": 0},
}
QWEN: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
LIMIT = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}
BOUNDED = {"enum", "const", "properties"}


def unbounded(
    schema: dict[str, Any], node: dict[str, Any], path: str = "", above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Settings of a JSON schema without a maximum, or without a type."""
    reference = node.get("$ref", "").rpartition("/")[2]
    if reference and reference not in above:
        yield from unbounded(schema, schema["$defs"][reference], path, above | {reference})
    kind = node.get("type")
    if kind in LIMIT and LIMIT[kind] not in node and not BOUNDED & node.keys():
        yield f"{path}: {kind} without {LIMIT[kind]}"
    if node.get("additionalProperties") is True or not node.keys() & {
        "type",
        "$ref",
        "anyOf",
        "oneOf",
        "allOf",
        *BOUNDED,
    }:
        yield f"{path}: anything"
    inner = {f"{path}.{name}": each for name, each in node.get("properties", {}).items()}
    inner |= {f"{path}[]": node["items"]} if "items" in node else {}
    inner |= {f"{path}.*": node["additionalProperties"]} if isinstance(node.get("additionalProperties"), dict) else {}
    inner |= {f"{path}.KEY": {"type": "string", **node["propertyNames"]}} if "propertyNames" in node else {}
    for where, each in inner.items():
        yield from unbounded(schema, each, where, above)
    for each in [each for union in ("anyOf", "oneOf", "allOf", "prefixItems") for each in node.get(union, ())]:
        yield from unbounded(schema, each, path, above)


def test_every_text_list_and_mapping_of_the_schema_has_a_maximum() -> None:
    """Protects a service from work without bounds.

    Before (af276e38): `.model.config.rope_scaling: anything`, and keys of any length in four mappings.
    """
    schema = RunConfig.model_json_schema()
    assert list(unbounded(schema, schema)) == []


def refused_at_once(config: dict[str, Any]) -> str:
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        check_config(config)
    assert time.process_time() - began < 1
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"model": {"config": {"layer_types": MANY}}},
        {"model": {"config": {"fields": {"layer_types": MANY}}}},
        {"model": {"config": {"rope_scaling": {"layer_types": MANY}}}},
        {"evaluation": {"prompts": MANY}},
        {"pools": {"low_memory": {"types": [{}] * 20_000}}},
        {"pools": {"owners": {f"o{number}": {} for number in range(50_000)}}},
        {f"key{number}": 1 for number in range(50_000)},
        {"evaluation": MANY},
        {"corpus": {"sources": [{"path": "x", "exclude": ["a"] * 250}] * 900}},
        {"n" * 20_000_000: MANY},
        {"name": "a" * 20_000_000},
    ],
    ids=range(11),
)
def test_a_huge_configuration_is_refused_within_a_second_in_a_short_line(setting: dict[str, Any]) -> None:
    """Protects a service's worker, and the terminal.

    Before (af276e38): up to 6 s, and messages of 20 MB that repeat the value.
    """
    refused_at_once({**BASE, **setting})


@pytest.mark.parametrize("kinds", [MANY, ["full_attention"] * 5, 3])
def test_a_models_layer_types_are_as_many_as_its_layers(tmp_path: Path, kinds: object) -> None:
    """Protects a service that plans with a tenant's model.

    Before (af276e38): a plan was made, after 17 s; 3 was a traceback of TypeError.
    """
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "layer_types": kinds}))
    (tmp_path / "tokenizer.json").write_text("{}")
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**BASE, "model": {"init": {"checkpoint": str(tmp_path)}}}))
    done = CliRunner().invoke(app, ["plan", str(config)])
    assert done.exit_code == 2
    assert done.stderr.startswith("moedisco: model.init.checkpoint: ")
    assert ("more than 1,048,576 bytes" if kinds is MANY else "a kind for each of 4 layers") in done.stderr


def test_a_scaling_keeps_its_numbers_as_they_are_written() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1, 1.5] * 16, "long_factor": [2] * 32, "factor": 4}
    config = check_config(
        {
            **BASE,
            "tokens": {"total": 10**6},
            "model": {
                "family": "phimoe",
                "config": {
                    "rope_scaling": {
                        **scaling,
                        "short_mscale": 1.0,
                        "long_mscale": 1.25,
                        "original_max_position_embeddings": 64,
                    }
                },
            },
        }
    )
    assert config.model.config is not None
    kept = config.model.config.rope_scaling or {}
    assert json.dumps({name: kept[name] for name in scaling}) == json.dumps(scaling)
