"""Which changes of the API break its clients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from docs.api_changes import breaking, here

OLD = here()
Document = dict[str, Any]


def schema(document: Document, name: str) -> Document:
    found: Document = document["components"]["schemas"][name]
    return found


def operation(document: Document, path: str, method: str = "get") -> Document:
    found: Document = document["paths"][path][method]
    return found


def without_route(new: Document) -> None:
    del new["paths"]["/v1/comparison"]


def without_parameter(new: Document) -> None:
    found = operation(new, "/v1/audit")["parameters"]
    found[:] = [each for each in found if each["name"] != "limit"]


def needed_parameter(new: Document) -> None:
    operation(new, "/v1/audit")["parameters"].append({"in": "query", "name": "who", "required": True, "schema": {}})


def lower_maximum(new: Document) -> None:
    [limit] = [each for each in operation(new, "/v1/audit")["parameters"] if each["name"] == "limit"]
    limit["schema"]["maximum"] = 7


def without_setting(new: Document) -> None:
    del schema(new, "RunConfig")["properties"]["seed"]


def needed_field(new: Document) -> None:
    schema(new, "ProjectRequest").setdefault("required", []).append("colour")
    schema(new, "ProjectRequest")["properties"]["colour"] = {"type": "string"}


def refused_value(new: Document) -> None:
    schema(new, "MemberRequest")["properties"]["role"]["enum"].remove("viewer")


def without_answer(new: Document) -> None:
    del schema(new, "Money")["properties"]["dollars"]


def nullable_answer(new: Document) -> None:
    schema(new, "Money")["properties"]["dollars"] = {"anyOf": [{"type": "number"}, {"type": "null"}]}


def absent_answer(new: Document) -> None:
    schema(new, "Money")["required"].remove("dollars")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without_route, "GET /v1/comparison is gone"),
        (without_parameter, "GET /v1/audit parameter limit is gone"),
        (needed_parameter, "GET /v1/audit parameter who must be given"),
        (lower_maximum, "GET /v1/audit limit: maximum is 7"),
        (without_setting, "POST /v1/estimates request.config.seed is gone"),
        (needed_field, "POST /v1/projects request.colour must be given"),
        (refused_value, 'request.role may not be "viewer"'),
        (without_answer, "money.dollars is gone"),
        (nullable_answer, "money.dollars may be null"),
        (absent_answer, "money.dollars may be missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_change_that_breaks_clients_is_named_once(change: Callable[[Document], None], line: str) -> None:
    new = copy.deepcopy(dict(OLD))
    change(new)
    found = breaking(OLD, new)
    assert [each for each in found if line in each] == found
    assert len(found) == 1


def new_route(new: Document) -> None:
    new["paths"]["/v1/new"] = copy.deepcopy(new["paths"]["/v1/audit"])


def new_parameter(new: Document) -> None:
    operation(new, "/v1/audit")["parameters"].append({"in": "query", "name": "who", "schema": {"type": "string"}})


def higher_maximum(new: Document) -> None:
    [limit] = [each for each in operation(new, "/v1/audit")["parameters"] if each["name"] == "limit"]
    limit["schema"]["maximum"] += 1


def new_setting(new: Document) -> None:
    schema(new, "Optimizer")["properties"]["new"] = {"type": "number", "default": 1}


def new_state(new: Document) -> None:
    schema(new, "RunState")["enum"].append("paused")


def needed_answer(new: Document) -> None:
    schema(new, "Money")["properties"]["cents"] = {"type": "integer"}
    schema(new, "Money")["required"].append("cents")


@pytest.mark.parametrize("change", [new_route, new_parameter, higher_maximum, new_setting, new_state, needed_answer])
def test_a_change_that_adds_breaks_no_client(change: Callable[[Document], None]) -> None:
    new = copy.deepcopy(dict(OLD))
    change(new)
    assert new != OLD
    assert breaking(OLD, new) == []
