"""Which of a cloud's refusals are missing capacity, and what a waiting run says of the others."""

from __future__ import annotations

import json

import pytest
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.autoscaling import launch_failures
from moedisco_ray.execution.ray.autoscaling.launch_failures import Kind, kind_of, message, published
from moedisco_ray.execution.ray.autoscaling.spot_fallback import RefusalMonitor
from moedisco_ray.execution.ray.wait_notice import WaitNotice

AZURE = (
    "(DeploymentFailed) At least one resource deployment operation failed.\n"
    "Code: DeploymentFailed\nException Details:\t"
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            (
                "Node Launch Exception (InsufficientInstanceCapacity): "
                "We currently do not have sufficient p5.4xlarge capacity"
            ),
            "capacity",
        ),
        (
            "Node Launch Exception (SpotMaxPriceTooLow): Your Spot request price of 0.1 is lower than the minimum",
            "capacity",
        ),
        (
            (
                "{'errors': [{'code': 'ZONE_RESOURCE_POOL_EXHAUSTED', "
                "'message': \"The zone does not have enough resources\"}]}"
            ),
            "capacity",
        ),
        (
            f"{AZURE}(SkuNotAvailable) The requested VM size is currently not available in location 'eastus'.",
            "capacity",
        ),
        (f"{AZURE}(OverconstrainedZonalAllocationRequest) Allocation failed.", "capacity"),
        ("Node Launch Exception (MaxSpotInstanceCountExceeded): Max spot instance count exceeded", "quota"),
        (
            (
                "Node Launch Exception (VcpuLimitExceeded): "
                "You have requested more vCPU capacity than your current vCPU limit"
            ),
            "quota",
        ),
        (
            (
                "{'errors': [{'code': 'QUOTA_EXCEEDED', "
                "'message': \"Quota 'PREEMPTIBLE_NVIDIA_T4_GPUS' exceeded. Limit: 0.0\"}]}"
            ),
            "quota",
        ),
        (f"{AZURE}(OperationNotAllowed) It results in exceeding approved LowPriorityCores Quota", "quota"),
        (f"{AZURE}(OperationNotAllowed) The operation is not allowed on this resource", "other"),
        (
            "Node Launch Exception (AuthFailure.ServiceLinkedRoleCreationNotPermitted): The provided credentials",
            "other",
        ),
        ("Node Launch Exception (InvalidAMIID.NotFound): The image id '[ami-1]' does not exist", "other"),
        ("Node Launch Exception (InvalidSubnetID.NotFound): The subnet ID 'subnet-1' does not exist", "other"),
        ("<HttpError 403 when requesting it returned \"Required 'compute.instances.create' permission\">", "other"),
        ("Node Launch Exception (RequestLimitExceeded): Request limit exceeded.", "other"),
    ],
)
def test_only_machines_that_the_cloud_lacks_are_missing_capacity(error: str, kind: Kind) -> None:
    assert kind_of(error) == kind


def test_a_message_is_one_line_and_short() -> None:
    text = message("low", f"{AZURE}(AuthorizationFailed) {'The client has no authorization. ' * 200}")
    assert "\n" not in text
    assert len(text) < 600


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The Ray cluster's key-value store."""
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(launch_failures.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_internals, "kv_get", lambda key, _namespace: kept.get(key))
    monkeypatch.setattr(
        ray_internals, "kv_put_from_head", lambda key, value, _namespace: kept.update({key: value.encode()})
    )
    return kept


def test_a_failure_is_published_until_it_is_old(store: dict[str, bytes]) -> None:
    assert published() == {}
    launch_failures.publish({"low": "no role"}, lambda: 1000.0)
    assert json.loads(*store.values()) == {"low": [1000.0, "no role"]}
    assert published(lambda: 1299.0) == {"low": "no role"}
    assert published(lambda: 1301.0) == {}


def test_without_a_cluster_nothing_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: str) -> None:
        raise ConnectionError

    monkeypatch.setattr(ray_internals, "kv_put_from_head", absent)
    launch_failures.publish({"low": "no role"})
    monkeypatch.setattr(launch_failures.ray, "is_initialized", lambda: False)
    assert published() == {}


def test_a_wait_reports_each_refused_type_once_as_soon_as_it_is_known(store: dict[str, bytes]) -> None:
    now, events = [0.0], list[Event]()
    notice = WaitNotice(events.append, lambda: now[0])
    for failing in (
        {"early": "no role"},
        {},
        {"low": "no role"},
        {"low": "no role", "high": "no quota"},
        {"low": "no role"},
    ):
        launch_failures.publish(failing)
        notice.waiting(lambda: "waits", grace=10.0)
        now[0] += 30.0
    assert [event.data["message"] for event in events] == ["waits", "no role", "no quota"]


class Autoscaler:
    """The events that Ray sends for one instance of a type."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, str], str] = {}
        self.now = 0.0
        self.monitor = RefusalMonitor(self.errors, lambda: self.now)

    def launch(self, error: str | None, status: int = Instance.ALLOCATION_FAILED) -> None:
        request = f"request-{self.now}"
        if error is not None:
            self.errors[request, "low"] = error
        for new, instance_type in (
            (Instance.REQUESTED, "low"),
            (status, "low" if status == Instance.ALLOCATED else ""),
        ):
            self.monitor.notify(
                [
                    InstanceUpdateEvent(
                        instance_id=request,
                        new_instance_status=new,
                        launch_request_id=request,
                        instance_type=instance_type,
                    )
                ]
            )
        self.now += 10.0

    @property
    def scores(self) -> dict[str, float]:
        return self.monitor.get_recoverable_resource_availabilities()


def test_only_missing_capacity_lowers_a_score(store: dict[str, bytes]) -> None:
    autoscaler = Autoscaler()
    autoscaler.launch("(UnauthorizedOperation): You are not authorized")
    autoscaler.launch("(MaxSpotInstanceCountExceeded): Max spot instance count exceeded")
    assert autoscaler.scores == {}
    assert list(published()) == ["low"]
    autoscaler.launch("(InsufficientInstanceCapacity): none")
    assert autoscaler.scores == {"low": 0.0}
    assert published() == {}, "the earlier failure is over"


def test_a_machine_that_was_promised_and_never_came_lowers_the_score(store: dict[str, bytes]) -> None:
    autoscaler = Autoscaler()
    autoscaler.launch(None)
    assert autoscaler.scores == {"low": 0.0}


def test_a_failure_is_over_when_a_machine_comes(store: dict[str, bytes]) -> None:
    autoscaler = Autoscaler()
    autoscaler.launch("(UnauthorizedOperation): You are not authorized")
    autoscaler.launch(None, Instance.ALLOCATED)
    assert published() == {}


def test_the_log_repeats_a_failure_every_five_minutes(
    store: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    autoscaler = Autoscaler()
    for _ in range(61):
        autoscaler.launch("(UnauthorizedOperation): You are not authorized")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 3
