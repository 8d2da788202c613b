"""One request, however large, keeps the service from others for no more than a moment."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import PLANNING, Service, demo
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moedisco_ray.core.config import RunConfig
from service.api.bodies import AT_ONCE, SMALL, BodyLimit
from service.api.security import bearer_token
from service.planning.pool import PlanningPool

SECONDS = 1.0
KINDS = [("a", "/estimates"), ("a", "/runs"), ("b", "/runs")]


@pytest.fixture
def planning() -> PlanningPool:
    """The real one, in processes of its own."""
    return PLANNING


def answered(api: Service, path: str, body: dict[str, Any], who: str = "reader") -> int:
    """The status of a request that is answered in time, while another person's requests are too.

    Tests share their machine, so the best of three attempts counts.
    """
    text = json.dumps(body)
    assert len(text) <= api.settings.max_body_bytes
    attempts = []
    for _ in range(3):
        status, seconds, wait = _asked(api, path, text, who)
        if max(seconds, wait) < SECONDS:
            return status
        attempts.append((seconds, wait))
    pytest.fail(f"{path} took, and kept others waiting, for {attempts} s")


def _asked(api: Service, path: str, text: str, who: str) -> tuple[int, float, float]:
    client, other = api.client(who), api.bob
    other.get("/v1/runs")  # what is made once is made
    waits = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        asked = pool.submit(client.post, path, content=text, headers={"Content-Type": "application/json"})
        while not asked.done() or not waits:
            began = time.monotonic()
            assert other.get("/v1/runs").status_code == 200
            waits.append(time.monotonic() - began)
        return asked.result().status_code, time.monotonic() - started, max(waits)


@pytest.mark.parametrize(
    ("size", "announced", "most"), [(SMALL + 1, True, AT_ONCE), (SMALL + 1, False, AT_ONCE), (SMALL, True, 6)]
)
def test_large_requests_with_one_credential_to_one_path_wait_for_each_other(
    size: int, announced: bool, most: int
) -> None:
    inside, largest = collections.Counter[str](), collections.Counter[str]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        who = Headers(scope=scope)["authorization"] + scope["path"]
        inside[who] += 1
        largest[who] = max(largest[who], inside[who])
        await asyncio.sleep(0.02)
        inside[who] -= 1
        await Response()(scope, receive, send)

    async def parts() -> AsyncIterator[bytes]:
        yield b"x" * size

    async def ask() -> None:
        limited = BodyLimit(app, lambda _: 10**6, lambda _: None, bearer_token)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(limited), base_url="http://service") as client:
            asked = (
                client.post(
                    path,
                    content=b"x" * size if announced else parts(),
                    headers={"Authorization": f"Bearer {who}", "Cookie": f"any={number}"},
                )
                for number, (who, path) in enumerate(KINDS * 6)
            )
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}

    asyncio.run(ask())
    assert largest == {f"Bearer {who}{path}": most for who, path in KINDS}


def test_an_estimate_over_large_folders_looks_into_none(api: Service, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "many"
    folder.mkdir()
    for i in range(20_000):
        (folder / f"{i}.txt").touch()
    equal = [{"path": "many"}] * 50
    named = [{"path": "many", "name": f"n{i}"} for i in range(50)]
    for sources in (equal, named):
        assert answered(api, "/v1/estimates", {"config": demo(corpus={"sources": sources})}) == 200


ENTRY = {
    "equal sources": {"path": "many"},
    "sources that are none": {"path": 1, "x": 2},
    "sources with a word in common": {"path": "a" * 20},
}


@pytest.mark.parametrize("kind", ENTRY)
def test_a_body_full_of_sources_is_refused_at_once(api: Service, kind: str) -> None:
    sources = [ENTRY[kind]] * 28_000
    assert answered(api, "/v1/estimates", {"config": demo(corpus={"sources": sources})}) == 422


LONG = {
    "letters": "a" * 1_000_000,
    "colons": ":" * 1_000_000,
    "users": "s3://" + ":@" * 400_000,
    "options": "a://?" + "&a=" * 300_000,
    "steps up": "../" * 300_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_text_in_any_place_is_refused_at_once(api: Service, kind: str) -> None:
    text = LONG[kind]
    for config in (
        demo(corpus={"sources": [{"path": text}]}),
        demo(checkpoint={"storage": text}),
        demo(tokenizer={"path": text}),
    ):
        assert answered(api, "/v1/estimates", {"config": config}) == 422


@pytest.mark.parametrize(
    "kind", ["letters", *(pytest.param(kind, marks=pytest.mark.slow) for kind in LONG if kind != "letters")]
)
def test_a_long_text_in_any_other_setting_is_refused_at_once(api: Service, kind: str) -> None:
    text = LONG[kind]
    for config in (
        demo(tracking={"trackers": {"wandb": text}}),
        demo(name=text),
        demo(tags={"a": text}),
        demo(evaluation={"prompts": [text]}),
    ):
        assert answered(api, "/v1/estimates", {"config": config}) == 422


def test_a_retry_with_long_or_deep_changes_is_refused_at_once(api: Service) -> None:
    run = api.submit()
    deep = ".".join(["a"] * 100_000)
    for changes in ({deep: 1}, {"corpus.sources": [{"path": "a"}] * 28_000}, {f"tags.{i}": "x" for i in range(99)}):
        assert answered(api, f"/v1/runs/{run['id']}/retry", {"changes": changes}, "ann") == 422


def test_large_files_are_not_read_in_a_request(api: Service, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tasks.jsonl", "config.json"):
        with (tmp_path / "data" / name).open("wb") as file:
            file.truncate(40 * 2**30)  # sparse: it takes no room
    for config in (
        demo(tokenizer={"path": "."}),
        demo(evaluation={"lm_eval": ["tasks.jsonl"]}),
        demo(model={"init": {"upcycle": "."}}),
    ):
        assert answered(api, "/v1/estimates", {"config": config}) == 422


def test_lists_and_texts_of_a_configuration_are_bounded() -> None:
    schema = RunConfig.model_json_schema()
    nodes = {"": schema, **schema["$defs"]}
    unbounded = [
        f"{section}.{name}"
        for section, node in nodes.items()
        for name, setting in node.get("properties", {}).items()
        for option in (setting, *setting.get("anyOf", ()))
        if (option.get("type") == "array" and "maxItems" not in option)
        or ("additionalProperties" in option and "maxProperties" not in option)
    ]
    assert not unbounded
