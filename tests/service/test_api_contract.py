"""What clients may rely on in every operation: methods, truth values, names in the description, compression."""

import gzip
import itertools
import json
import re

import pytest
from api_client import service
from page_runs import finish
from page_server import Site

from moedisco_ray.core.records.run_record import RunReport
from service.api.compression import SMALLEST, accepts_gzip

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
LISTS = {
    "/v1/runs": lambda api, name: api.submit(name=name),
    "/v1/datasets": lambda api, name: api.upload(name, {"a.txt": name.encode()}),
    "/v1/projects": lambda api, name: api.ann.post("/v1/projects", json={"name": name}),
    "/v1/tokens": lambda api, name: api.admin.post("/v1/tokens", json={"name": name, "scopes": ["read"]}),
    "/v1/audit": lambda api, name: api.admin.put(f"/v1/policies/owners/{name}", json={}),
}
"""Lists that have pages, and what adds a row to each."""
OLDEST_FIRST = {"/v1/projects", "/v1/tokens"}
KEPT = {"/v1/tokens", "/v1/audit"}
"""Lists whose rows are never deleted."""


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with service(tmp_path_factory.mktemp("contract")) as made:
        yield made


@pytest.fixture(scope="module")
def document(api):
    return api.anonymous.get("/openapi.json").json()


@pytest.fixture(scope="module")
def run(api):
    """A finished run."""
    site = Site.__new__(Site)  # what is behind a page, without a port
    site.service = api
    return finish(site)


def test_a_405_names_every_method_of_the_path(api, document):
    wrong = {}
    for path, operations in document["paths"].items():
        there = {method.upper() for method in operations if method.upper() in METHODS}
        for method in set(METHODS) - there:
            answer = api.admin.request(method, re.sub(r"\{\w+\}", "x", path))
            named = set(answer.headers.get("allow", "").split(", "))
            if answer.status_code != 405 or named != there:
                wrong[method, path] = (answer.status_code, named, there)
    assert not wrong


def pages(api, path, limit):
    cursor = {}
    while cursor is not None:
        page = api.admin.get(path, params={"limit": limit} | cursor).json()
        yield [row["id"] for row in page["items"]]
        cursor = page["next_cursor"] and {"cursor": page["next_cursor"]}


@pytest.mark.parametrize("path", LISTS)
def test_pages_have_each_row_once_and_in_order_also_while_rows_come_and_go(api, path):
    """Before (f7f02f78): projects and tokens had no pages, and the answer grew with their number."""
    for name in "abcd":
        LISTS[path](api, name)
    [whole] = pages(api, path, 200)
    assert whole == sorted(whole, reverse=path not in OLDEST_FIRST)
    for limit in (1, 3, len(whole) - 1, len(whole)):
        walked = list(pages(api, path, limit))
        assert {len(each) for each in walked[:-1]} <= {limit}
        assert list(itertools.chain(*walked)) == whole
    walk = pages(api, path, len(whole) - 2)
    seen = next(walk)
    gone = [] if path in KEPT else [seen[-1], whole[-2]]
    for row in gone:
        assert api.admin.delete(f"{path}/{row}").status_code == 204
    LISTS[path](api, "later")
    [now] = pages(api, path, 200)
    [added] = set(now) - set(whole)
    rest = [row for row in whole[-2:] if row not in gone]
    assert list(itertools.chain(*walk)) == ([*rest, added] if path in OLDEST_FIRST else rest)


@pytest.mark.parametrize("path", LISTS)
def test_a_wrong_cursor_is_refused_in_one_line(api, path):
    refused = api.admin.get(path, params={"cursor": "x"})
    message = "'x': is not the `next_cursor` of a page; begin without a cursor"
    assert (refused.status_code, refused.json()["errors"]) == (422, [{"field": "cursor", "message": message}])


def test_the_lists_with_pages_are_all_that_the_description_has(document):
    for path, operations in document["paths"].items():
        names = {each["name"] for each in operations.get("get", {}).get("parameters", ())}
        assert ("cursor" in names) == (path in LISTS), path


@pytest.mark.parametrize(("method", "path"), [("POST", "/static/app.js"), ("DELETE", "/ray/"), ("PUT", "/")])
def test_a_405_of_the_page_names_its_methods_too(api, method, path):
    assert "GET" in api.admin.request(method, path).headers["allow"].split(", ")


@pytest.mark.parametrize("path", ["events?follow", "logs/driver?follow"])
@pytest.mark.parametrize("word", ["1", "yes", "on", "True", "TRUE", "t", ""])
def test_a_truth_value_in_a_query_is_true_or_false(api, run, path, word):
    answer = api.ann.get(f"/v1/runs/{run}/{path}={word}")
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "follow", "message": f"{word!r}: must be `true` or `false`"}]


@pytest.mark.parametrize("word", ["true", "false"])
def test_a_finished_runs_log_is_read_with_either(api, run, word):
    assert api.ann.get(f"/v1/runs/{run}/logs/driver?follow={word}").text == "the driver began\nthe driver ended\n"


def test_every_reference_of_the_description_leads_somewhere(document):
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))) <= set(schemas)
    assert not [name for name in schemas if not re.fullmatch(r"[A-Z][A-Za-z]+", name)], "two models share a name"


def test_lists_are_compressed_for_those_who_accept_it(api, run):
    for _ in range(5):
        api.submit()
    plain = api.ann.get("/v1/runs", headers={"Accept-Encoding": "identity"})
    with api.ann.stream("GET", "/v1/runs", headers={"Accept-Encoding": "br, gzip;q=0.5"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert (packed.headers["content-encoding"], packed.headers["content-length"]) == ("gzip", str(len(raw)))
    assert gzip.decompress(raw) == plain.content
    assert len(raw) < len(plain.content) / 3
    assert "content-encoding" not in plain.headers
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"


def test_small_streamed_and_secret_answers_are_not_compressed(api, run):
    for path in ("/healthz", f"/v1/runs/{run}/model.tar", f"/v1/runs/{run}/events?follow=false", "/static/app.js"):
        assert "content-encoding" not in api.ann.get(path, headers={"Accept-Encoding": "gzip"}).headers, path
    name = "n" * 120
    made = api.admin.post(
        "/v1/tokens", json={"name": name, "owner": "ann", "scopes": ["read"]}, headers={"Accept-Encoding": "gzip"}
    )
    assert "content-encoding" not in made.headers
    assert len(api.anonymous.get("/healthz").content) < SMALLEST


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True),
        ("*", True),
        ("br, GZIP ; q=0.1", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0", False),
        ("br", False),
        ("", False),
    ],
)
def test_what_counts_as_accepting_gzip(header, accepted):
    assert accepts_gzip(header) is accepted


def test_the_reference_is_a_page_of_the_service(api):
    answer = api.anonymous.get("/reference")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    for path in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
        assert not path.startswith("/")  # a proxy may serve the page below a path of its own
        assert api.anonymous.get(f"/{path}").status_code == 200


def test_a_report_keeps_what_its_schema_does_not_name(api, run):
    written = json.loads((api.directory(run) / "report.json").read_text())
    answered = api.ann.get(f"/v1/runs/{run}/report").json()
    assert answered == written
    assert set(written) - set(RunReport.model_fields) == set(), "name the new part in core/records/run_record.py"
