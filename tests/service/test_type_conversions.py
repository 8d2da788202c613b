"""Values of a request are kept as they were sent, or refused."""

from __future__ import annotations

import json
from typing import Any

from api_client import demo
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from moedisco_ray.core.config import RunConfig
from service.schemas.mistakes import converted

SCHEMA = TypeAdapter(RunConfig)


@given(st.sampled_from(["1", 1, 1.0, True]), st.sampled_from(["seed", "tokens.total", "corpus.validation_fraction"]))
def test_the_kept_value_is_of_the_type_that_was_sent(value: Any, field: str) -> None:
    section, _, key = field.rpartition(".")
    config = demo(
        **(
            {section: {key: value} | ({"sources": [{"path": "embedded"}]} if section == "corpus" else {})}
            if section
            else {key: value}
        )
    )
    try:
        refused = bool(converted(SCHEMA, config))
    except ValidationError:
        return
    kept = json.loads(SCHEMA.dump_json(SCHEMA.validate_python(config), exclude_unset=True))
    found = kept[section][key] if section else kept[key]
    assert refused == (type(found) is not type(value) and (type(value), type(found)) != (int, float))
