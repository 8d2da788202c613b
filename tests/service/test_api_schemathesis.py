"""The whole OpenAPI document against the whole application: single operations, and sequences along its links."""

import collections

import pytest
import schemathesis
from api_client import demo, service
from dashboard_standin import dashboard
from hypothesis import HealthCheck, Phase, core, given, seed, settings
from hypothesis import strategies as st
from page_runs import finish
from page_server import Site
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
QUIET = [
    HealthCheck.filter_too_much,
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.function_scoped_fixture,
]
SEQUENCES = (10, 100)
"""At least, and at most until each of `REACHED` was answered: draws depend on the identifiers of the moment."""
REACHED = [("submit_run", 201), ("get_run", 200), ("retry_run", 201), ("cancel_run", 202), ("delete_run", 204)]
ENDLESS = {"stream_events", "get_log"}
"""With `follow` these wait for a run that does not end here."""


@pytest.fixture(scope="module")
def ray():
    with dashboard() as standin:
        yield standin


@pytest.fixture(scope="module")
def api(tmp_path_factory, ray):
    home = tmp_path_factory.mktemp("schemathesis")
    with service(home, requests_per_minute=10_000_000, dashboard_url=ray.url) as made:
        yield made


@pytest.fixture(scope="module")
def real(api, ray):
    """Parameters that name something, by operation or for all: a finished run with its files, tokens, and two runs."""
    site = Site.__new__(Site)  # what is behind a page, without a port
    site.service = api
    run, other = finish(site), api.submit()["id"]
    dataset = api.upload("demo", {"clusters/report.json": b"text"}, "admin")["id"]
    api.admin.put("/v1/projects/root/notices", json={"url": "https://localhost/hook"})
    return {
        "run": lambda _: [run, other],
        "run_id": lambda _: run,
        "dataset_id": lambda _: dataset,
        "path": lambda _: "clusters/report.json",
        "name": lambda operation: "driver" if operation == "get_log" else "demo",
        "project": lambda _: "root",
        "member": lambda _: "bob",
        "secret": lambda _: "HF_TOKEN",
        "token_id": lambda _: api.admin.get("/v1/tokens").json()["items"][-1]["id"],
    }


@pytest.fixture(scope="module")
def document(api):
    return schemathesis.openapi.from_asgi("/openapi.json", api.app)


DESTRUCTIVE = {"delete_run", "delete_dataset", "revoke_token", "rotate_token", "delete_notice_url"}
"""Never asked of what all other operations look at."""


def sent(api, case, seen, real=None):
    operation = case.operation.definition.raw["operationId"]
    if real is not None and operation not in DESTRUCTIVE:
        case.path_parameters = {
            name: real[name](operation) if name in real else value
            for name, value in (case.path_parameters or {}).items()
        }
        if "run" in (case.query or {}):
            case.query["run"] = real["run"](operation)
    if operation in ENDLESS:
        case.query["follow"] = "false"
    answer = case.call(headers={"Authorization": f"Bearer {api.plain['admin']}"})
    case.validate_response(answer, checks=CHECKS)
    seen[operation].add(answer.status_code)


def test_every_operation_answers_as_documented_with_a_finished_run_present(api, document, real):
    seen = collections.defaultdict(set)
    for found in document.get_all_operations():
        operation = found.ok()
        right, wrong = (
            operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        )

        for number in (3, 4 * 3):  # the second time only if all that reads was refused

            @seed(1)
            @settings(
                max_examples=number, deadline=None, suppress_health_check=QUIET, phases=[Phase.generate], database=None
            )
            @given(right | wrong, st.booleans())
            def ask(case, named):
                sent(api, case, seen, real if named else None)

            ask()
            if operation.method != "get" or 200 in seen[operation.definition.raw["operationId"]]:
                break
    assert len(seen) >= 37, "an operation was not asked for"
    assert 201 in seen["create_token"]
    reading = {
        found.ok().definition.raw["operationId"]
        for found in document.get_all_operations()
        if found.ok().method == "get"
    }
    assert not {operation for operation in reading if 200 not in seen[operation]}, (
        "only refused: give `real` what it needs"
    )


def run_each_by_itself(machine, monkeypatch, missing):
    """Each sequence as a search of its own, behind the simplest one, and more of them while any of `missing()` is.

    What a service answers depends on what it was asked before: a search that begins a second time as it did the first,
    and then sees something else, gives up. Hypothesis's own profile for CI derandomizes, which would make all of them
    the same sequence.
    """
    least, most = SEQUENCES
    for number in range(most):
        if number >= least and not missing():
            break
        monkeypatch.setattr(core, "global_force_seed", number)
        machine.run(
            settings=settings(
                max_examples=2,
                stateful_step_count=10,
                deadline=None,
                suppress_health_check=QUIET,
                phases=[Phase.generate],
                database=None,
                derandomize=False,
            )
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_operations_answer_as_documented_one_after_the_other(api, document, monkeypatch):
    seen = collections.Counter()
    [own] = [token["id"] for token in api.admin.get("/v1/tokens").json()["items"] if token["name"] == "admin"]

    def valid(case):
        # Decided by the drawn values, so that a repetition is the same.
        return len(repr(case.body)) % 4

    class Machine(document.as_state_machine()):
        def setup(self):
            # Limits that an earlier sequence has set would refuse every run.
            api.admin.put("/v1/policies", json={}).raise_for_status()

        def get_call_kwargs(self, case):
            operation = case.operation.definition.raw["operationId"]
            if operation in ENDLESS:
                case.query["follow"] = "false"
            if (case.path_parameters or {}).get("token_id") == own:  # a list of tokens leads to it
                case.path_parameters["token_id"] = "0" * len(own)
            # What a configuration must be no schema can say in full; without runs there is nothing to go on with.
            if operation == "submit_run" and valid(case):
                case.body, case.headers, case.media_type = {"config": demo()}, {}, "application/json"
            if operation == "retry_run" and valid(case):
                case.body, case.headers, case.media_type = {"changes": {"seed": 1}}, {}, "application/json"
            return {"headers": {"Authorization": f"Bearer {api.plain['admin']}"}}

        def validate_response(self, response, case, **options):
            case.validate_response(response, checks=CHECKS)
            seen[case.operation.definition.raw["operationId"], response.status_code] += 1

    def missing():
        return [reached for reached in REACHED if not seen[reached]]

    run_each_by_itself(Machine, monkeypatch, missing)
    assert not missing(), seen
