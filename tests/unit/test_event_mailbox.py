"""Events reach the log when the block that emits them fails, and a full disk reaches the block."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from moedisco_ray.core.errors import TrainingError
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import event_mailbox as module
from moedisco_ray.execution.ray import worker_mailbox
from moedisco_ray.execution.ray.boxes import MOST_AT_ONCE, Boxes
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, forwarding, open_mailbox
from moedisco_ray.execution.ray.mailbox_actor import TRAININGS, MailboxActor
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.execution.ray.worker_mailbox import loss_rate_reader, stop_reader
from moedisco_ray.policies.checkpointing import HOUR, loss_rate

WORDS = st.tuples(
    st.booleans(), st.sampled_from(["progress", "leave", "finish", "control", "place"]), st.integers(1, 99)
)


class Box:
    """A mailbox."""

    def __init__(self, *events: Event) -> None:
        self.events = list(events)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def full_disk(event: Event) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_pushed_last_arrives_though_the_block_raises() -> None:
    box, seen = Box(), []
    with pytest.raises(TrainingError, match="diverged"), forwarding(box.take, seen.append, 60.0):
        box.events.append(last := Event("workers_released", data={"hold": "a"}))
        raise TrainingError("diverged")
    assert seen == [last]


def test_events_arrive_in_order_while_the_block_runs() -> None:
    box, seen, arrived = Box(Event("progress"), Event("checkpoint")), [], threading.Event()

    def emit(event: Event) -> None:
        seen.append(event.type)
        if event.type == "checkpoint":
            arrived.set()

    with forwarding(box.take, emit, 0.001) as check:
        assert arrived.wait(10)
        check()
        box.events.append(Event("unit_finished"))
    assert seen == ["progress", "checkpoint", "unit_finished"]


def test_a_driver_that_finds_very_many_events_takes_all_in_messages_of_limited_size() -> None:
    """Before: one message with all that had come while the run had no driver."""
    boxes, seen, sizes = Boxes(), list[float](), list[int]()
    for number in range(3 * MOST_AT_ONCE + 1):
        boxes.put("box", Event("progress", time=number))

    def take() -> list[Event]:
        found = boxes.wait("box", 10.0)
        sizes.append(len(found))
        return found

    with forwarding(
        take,
        lambda event: seen.append(event.time),
        60.0,
        lambda count: boxes.drop("box", count),
        lambda: boxes.wake("box"),
    ):
        pass
    assert seen == list(range(3 * MOST_AT_ONCE + 1))
    assert max(sizes) == MOST_AT_ONCE


def test_a_full_disk_is_noticed_inside_the_block() -> None:
    box = Box(Event("progress"))
    with pytest.raises(OSError, match="No space left"), forwarding(box.take, full_disk, 0.001) as check:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            check()
            time.sleep(0.001)
        pytest.fail("check raised nothing")


def test_a_full_disk_is_noticed_at_the_end_of_the_block() -> None:
    with pytest.raises(OSError, match="No space left"), forwarding(Box(Event("progress")).take, full_disk, 60.0):
        pass


def test_the_blocks_own_error_goes_before_that_of_a_full_disk() -> None:
    with pytest.raises(TrainingError, match="diverged"), forwarding(Box(Event("progress")).take, full_disk, 60.0):
        raise TrainingError("diverged")


def say(mailbox: MailboxActor, attempt: str, word: str, step: int) -> None:
    """What a worker of an attempt at the unit says, or its controller."""
    if word == "progress":
        mailbox.push(
            Event("progress", "submodels", "unit", {"step": step, "tokens": step, "tokens_per_second": 2.0}), attempt
        )
    elif word == "leave":
        mailbox.set_exit_step("unit", attempt, step)
    elif word == "finish":
        mailbox.set_outcome("unit", attempt, str(step).encode())
    elif word == "control":
        mailbox.set_actor("unit", attempt, step)
    else:
        mailbox.set_workers("unit", attempt, (f"node-{step}",), step)


@given(st.lists(WORDS))
def test_workers_that_outlive_their_attempt_say_nothing_of_the_next(words: list[tuple[bool, str, int]]) -> None:
    both, alone = MailboxActor(), MailboxActor()
    older, newer, only = both.begin_attempt("unit"), both.begin_attempt("unit"), alone.begin_attempt("unit")
    for outlived, word, step in words:
        say(both, older if outlived else newer, word, step)
        if not outlived:
            say(alone, only, word, step)
    assert both.outcome("unit") == alone.outcome("unit")
    assert both.statuses(["unit"])["unit"] == alone.statuses(["unit"])["unit"]
    assert both.actor("unit") == alone.actor("unit")
    assert both.end_attempt("unit") == alone.end_attempt("unit")
    emitted = [step for _, word, step in words if word == "progress"]
    assert [event.data["step"] for event in both.wait("", TRAININGS, 0.0)] == emitted  # they happened, and are kept


def test_a_new_attempt_is_nowhere_yet() -> None:
    mailbox = MailboxActor()
    for word in ("progress", "leave", "finish"):
        say(mailbox, mailbox.begin_attempt("unit"), word, 7)
    mailbox.begin_attempt("unit")
    assert mailbox.outcome("unit") is None
    assert mailbox.statuses(["unit"])["unit"] == UnitStatus(step_seconds=0.5)
    assert mailbox.statuses(["unit"])["unit"].current_step is None


@pytest.mark.parametrize("raises", [False, True])
def test_the_mailbox_ends_with_the_block_however_that_ends(monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    killed: list[object] = []
    mailbox = SimpleNamespace()
    mailbox.wait = SimpleNamespace(remote=lambda *_asked: [])
    mailbox.wake = SimpleNamespace(remote=lambda _box: None)
    mailbox.leave = SimpleNamespace(remote=lambda: killed.append(mailbox))
    started = SimpleNamespace(options=lambda **_settings: SimpleNamespace(remote=lambda _namespace: mailbox))
    monkeypatch.setattr(
        module,
        "ray",
        SimpleNamespace(
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "5d" * 28),
            get=lambda value: value,
            wait=lambda those, **_limit: (those, []),
            remote=lambda **_settings: lambda _kind: started,
        ),
    )

    def use(mail: EventMailbox) -> None:
        assert mail.handle is mailbox
        assert killed == []
        if raises:
            raise TrainingError("diverged")

    with (
        pytest.raises(TrainingError) if raises else contextlib.nullcontext(),
        open_mailbox(lambda _event: None, interval=60.0) as mail,
    ):
        use(mail)
    assert killed == [mailbox]


def test_what_was_seen_of_losses_grows_with_what_is_held() -> None:
    mailbox = MailboxActor()
    assert mailbox.losses_per_hour() == loss_rate(0, 0)
    hold = {"hold": "a", "unit": "unit", "pool": "low_memory", "workers": 2}
    mailbox.push(Event("workers_held", "submodels", data=hold, time=time.time() - 5 * HOUR))
    assert mailbox.losses_per_hour() == pytest.approx(loss_rate(0, 10), rel=1e-3)
    mailbox.count_loss()
    assert mailbox.losses_per_hour() == pytest.approx(loss_rate(1, 10), rel=1e-3)


def test_a_training_hears_of_losses_and_waits_for_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, answers = [0.0], list[float](), list[float | Exception]()

    def get(_answer: object) -> float:
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return answers[-1]

    handle = SimpleNamespace(losses_per_hour=SimpleNamespace(remote=lambda: asked.append(now[0])))
    monkeypatch.setattr(
        worker_mailbox, "ray", SimpleNamespace(wait=lambda those, **_limit: (those if answers else [], []), get=get)
    )
    latest = loss_rate_reader(handle, 0.1, lambda: now[0])
    for now[0], said, known, times in (
        (1.0, [], 0.1, []),
        (60.0, [], 0.1, [60.0]),
        (600.0, [], 0.1, [60.0]),
        (601.0, [0.02], 0.02, [60.0, 601.0]),
        (602.0, [], 0.02, [60.0, 601.0]),
        (603.0, [RayActorError()], 0.02, [60.0, 601.0]),
        (661.0, [], 0.02, [60.0, 601.0, 661.0]),
    ):
        answers[:] = said
        assert (latest(), asked) == (known, times)


@pytest.mark.parametrize(
    ("answer", "ends"),
    [(True, True), (False, False), (ActorUnavailableError("busy", b"5" * 16), False), (ActorDiedError(), True)],
)
def test_a_training_whose_mailbox_has_ended_saves_and_ends(
    monkeypatch: pytest.MonkeyPatch, answer: bool | RayActorError, ends: bool
) -> None:
    """Before: it trained on, on a slot that was paid for, and its result reached no one."""

    def get(_answer: object) -> bool:
        if isinstance(answer, RayActorError):
            raise answer
        return answer

    handle = SimpleNamespace(is_ending=SimpleNamespace(remote=lambda attempt: attempt))
    monkeypatch.setattr(worker_mailbox, "ray", SimpleNamespace(wait=lambda those, **_limit: (those, []), get=get))
    must_end = stop_reader(handle, "attempt")
    assert [must_end(), must_end()] == [False, ends]
