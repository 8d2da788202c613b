"""The three clouds' notices, heard from stand-ins of their metadata services on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from metadata_standin import AwsStandin, AzureStandin, GcpStandin, Standin, hangs, says, serving, trickles

from moedisco_ray.execution.clouds.aws import Aws
from moedisco_ray.execution.clouds.azure import Azure
from moedisco_ray.execution.clouds.gcp import Gcp
from moedisco_ray.execution.clouds.metadata import Service
from moedisco_ray.execution.node_agent import Notice, Provider, Unavailable, find_provider, make_provider

STANDINS: dict[str, type[Standin]] = {"aws": AwsStandin, "gcp": GcpStandin, "azure": AzureStandin}
CLIENTS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@pytest.fixture
def aws() -> Iterator[AwsStandin]:
    standin = AwsStandin()
    with serving(standin):
        yield standin


@pytest.fixture
def gcp() -> Iterator[GcpStandin]:
    standin = GcpStandin()
    with serving(standin):
        yield standin


@pytest.fixture
def azure() -> Iterator[AzureStandin]:
    standin = AzureStandin()
    with serving(standin):
        yield standin


@pytest.fixture(params=list(STANDINS))
def any_cloud(request: pytest.FixtureRequest) -> Iterator[tuple[Standin, Provider]]:
    standin = STANDINS[request.param]()
    with serving(standin):
        yield standin, CLIENTS[request.param](Service(standin.url, timeout=0.3))


def poll(standin: Standin, name: str, max_wait: float = 0.0) -> Notice | None:
    return make_provider(name, standin.url).poll(max_wait)


def test_no_notice_is_no_notice(any_cloud: tuple[Standin, Provider]) -> None:
    _, provider = any_cloud
    assert provider.poll(0.0) is None
    assert provider.poll(0.0) is None


def test_each_cloud_is_recognised_by_its_own_client_alone(any_cloud: tuple[Standin, Provider]) -> None:
    standin, provider = any_cloud
    found = find_provider(standin.url)
    assert found is not None
    assert found.name == provider.name


def test_where_nobody_answers_no_cloud_is_found() -> None:
    standin = AwsStandin()
    with serving(standin):
        url = standin.url
    assert find_provider(url) is None


GARBAGE = [
    (200, "<html>sign in</html>"),
    (200, "[]"),
    (200, '{"Events": 3}'),
    (200, "\x00"),
    (200, "{"),
    (500, ""),
    (503, ""),
]


@pytest.mark.parametrize("make_trouble", [hangs, trickles, *(lambda _, reply=reply: says(*reply) for reply in GARBAGE)])
def test_trouble_is_never_a_notice_and_passes(any_cloud: tuple[Standin, Provider], make_trouble) -> None:
    standin, provider = any_cloud
    standin.trouble = make_trouble(standin)
    began = time.monotonic()
    with contextlib.suppress(Unavailable):
        assert provider.poll(0.0) is None
    assert time.monotonic() - began < 5
    standin.trouble = lambda _handler: False
    # A word that was no token, or no name, must not be kept.
    assert type(provider)(Service(standin.url)).poll(0.0) is None


def test_a_service_that_is_gone_is_unavailable(any_cloud: tuple[Standin, Provider]) -> None:
    standin, provider = any_cloud
    standin.trouble = hangs(standin)
    with pytest.raises(Unavailable):
        provider.poll(0.0)


def test_ec2_interrupts_at_the_time_it_names(aws: AwsStandin) -> None:
    aws.interrupt(action="terminate", time="2026-11-24T08:22:00Z")
    assert poll(aws, "aws") == Notice("end", 1795508520.0, "EC2 spot interruption: terminate")


def test_ec2_notice_without_a_readable_time_is_a_notice(aws: AwsStandin) -> None:
    aws.interrupt(action="stop", time="soon")
    notice = poll(aws, "aws")
    assert notice is not None
    assert notice.kind == "end"
    assert notice.deadline == pytest.approx(time.time() + 120, abs=10)


def test_ec2_rebalance_is_a_risk_and_an_interruption_goes_before_it(aws: AwsStandin) -> None:
    aws.recommend(noticeTime="2026-11-24T08:00:00Z")
    assert poll(aws, "aws") == Notice("risk", 1795507200.0, "EC2 rebalance recommendation")
    aws.interrupt(action="terminate", time="2026-11-24T08:22:00Z")
    assert poll(aws, "aws") == Notice("end", 1795508520.0, "EC2 spot interruption: terminate")


def test_ec2_token_is_used_until_it_expires_and_then_renewed(aws: AwsStandin) -> None:
    provider = make_provider("aws", aws.url)
    for _ in range(3):
        assert provider.poll(0.0) is None
    assert aws.tokens == 1
    aws.expire()
    aws.interrupt(action="terminate", time="2026-11-24T08:22:00Z")
    assert provider.poll(0.0) is not None
    assert aws.tokens == 2


def test_compute_engine_preempts_in_half_a_minute_from_when_it_was_heard(gcp: GcpStandin) -> None:
    provider = make_provider("gcp", gcp.url)
    gcp.set("preempted", "TRUE")
    notice = provider.poll(0.0)
    assert notice is not None
    assert notice.deadline == pytest.approx(time.time() + 30, abs=5)
    assert provider.poll(0.0) == notice  # the deadline does not move with each poll


def test_compute_engine_question_is_answered_the_moment_it_changes(gcp: GcpStandin) -> None:
    timer = threading.Timer(0.3, gcp.set, ("preempted", "TRUE"))
    timer.start()
    began = time.monotonic()
    notice = poll(gcp, "gcp", max_wait=30.0)
    timer.join()
    assert notice is not None
    assert time.monotonic() - began < 10


def test_compute_engine_change_between_two_questions_is_not_missed(gcp: GcpStandin) -> None:
    asked = 0

    def change_after_the_first(handler) -> bool:
        nonlocal asked
        if "preempted" in handler.path:
            asked += 1
            if asked == 2:
                # it changed before the request came, so that no waiting request is answered
                gcp.values["preempted"] = "TRUE"
        return False

    gcp.trouble = change_after_the_first
    began = time.monotonic()
    assert poll(gcp, "gcp", max_wait=30.0) is not None
    assert time.monotonic() - began < 10


def test_compute_engine_maintenance_ends_a_machine_that_cannot_move(gcp: GcpStandin) -> None:
    gcp.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert poll(gcp, "gcp") is None
    gcp.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    notice = poll(gcp, "gcp")
    assert notice is not None
    assert notice.reason == "Compute Engine host maintenance"


def test_compute_engine_machine_that_cannot_be_preempted_has_no_such_key(gcp: GcpStandin) -> None:
    del gcp.values["preempted"]
    assert poll(gcp, "gcp", max_wait=1.0) is None


def test_azure_takes_the_earliest_event_that_names_this_machine(azure: AzureStandin) -> None:
    azure.add("Preempt", "Tue, 24 Nov 2026 08:22:00 GMT", "spot_2")
    azure.add("Freeze", "Tue, 24 Nov 2026 08:22:00 GMT", "spot_3")
    assert poll(azure, "azure") is None
    azure.add("Redeploy", "Tue, 24 Nov 2026 09:00:00 GMT", "spot_3")
    azure.add("Preempt", "Tue, 24 Nov 2026 08:22:00 GMT", "spot_2", "spot_3")
    assert poll(azure, "azure") == Notice("end", 1795508520.0, "Azure Preempt")


def test_azure_event_that_has_begun_is_due_now(azure: AzureStandin) -> None:
    azure.add("Preempt", "", "spot_3")
    notice = poll(azure, "azure")
    assert notice is not None
    assert notice.deadline == pytest.approx(time.time(), abs=5)
    assert not [path for method, path in azure.asked if method != "GET"]  # nothing is acknowledged
