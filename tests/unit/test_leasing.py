"""What the mailbox of a run keeps while no driver works on it, without Ray."""

from __future__ import annotations

import errno
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray.mailbox_actor import TRAININGS, MailboxActor, TakenOverError, UnderWay, mark_of
from moedisco_ray.policies.leasing import (
    GONE_SECONDS,
    LEASE_SECONDS,
    SAVE_SECONDS,
    SILENT_SECONDS,
    STOPPED_SECONDS,
    Kept,
    kept,
    seat_stays,
)

SECONDS = st.floats(0, 10_000)


@given(SECONDS, st.none() | SECONDS, st.booleans(), st.booleans())
def test_nothing_ends_under_a_driver_and_nothing_stays_for_ever_without_one(
    unseen: float, ending: float | None, stopped: bool, training: bool
) -> None:
    found = kept(unseen, ending, stopped=stopped, training=training)
    if unseen <= (STOPPED_SECONDS if stopped else GONE_SECONDS):
        assert found == Kept()
        return
    assert not found.others
    assert not found.trainings or training
    if unseen > LEASE_SECONDS or stopped:
        assert found.asks_to_end
        assert found.mailbox == (training and (ending is None or ending <= SAVE_SECONDS))
    elif ending is None:
        assert found.mailbox
        assert found.trainings == training


class Run:
    """The mailbox of a run with two trainings on seats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: StopFile = NEVER) -> None:
        self.now = 0.0
        self.left: set[str] = set()
        self.mailbox = MailboxActor("", lambda: self.now)
        monkeypatch.setattr(self.mailbox, "_end_seats", self._end)
        self.mailbox.take_over("first", stop, ())
        self.attempts = {unit: self.mailbox.begin_attempt(unit) for unit in ("one", "two")}
        for unit, attempt in self.attempts.items():
            self.mailbox.push(Event("workers_held", "submodels", data=hold_of(unit), time=100.0))
            self.mailbox.set_workers(
                unit, attempt, ("node",), None, UnderWay(attempt, f"seat of {unit}", "low_memory", "here", "node")
            )

    def _end(self, but: Collection[str]) -> None:
        self.left = {*but}

    def after(self, seconds: float) -> Kept:
        """What stays after some more seconds; the mailbox looks for its driver every second."""
        for _ in range(int(seconds)):
            self.now += 1
            found = self.mailbox.without_driver()
        return found

    def pass_on(self, driver: str = "first") -> list[Event]:
        """The driver stores all events."""
        events = self.mailbox.wait(driver, TRAININGS, 0.0)
        self.mailbox.serve(driver, "drop", TRAININGS, len(events))
        return events


def hold_of(unit: str) -> dict[str, object]:
    return {"hold": f"hold of {unit}", "unit": unit, "pool": "low_memory", "workers": 1}


def test_seats_that_train_stay_for_a_lease_and_are_asked_to_save_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.mailbox.set_outcome("one", run.attempts["one"], b"")
    assert run.after(GONE_SECONDS) == Kept()
    assert run.after(1) == Kept(others=False)
    assert run.left == {"seat of two"}
    released = [event.data["hold"] for event in run.pass_on() if event.type == "workers_released"]
    assert released == ["hold of one"]  # its slot is free, and not paid for any more
    assert not run.mailbox.is_ending(run.attempts["two"])
    assert run.after(LEASE_SECONDS - GONE_SECONDS).trainings
    assert run.mailbox.is_ending(run.attempts["two"])
    assert not run.after(SAVE_SECONDS + 1).mailbox
    assert run.left == set()


def test_a_mailbox_that_was_stopped_does_not_take_its_driver_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: it ended at once, and the run with it, before it read the driver's messages."""
    run = Run(monkeypatch)
    run.now += 10 * LEASE_SECONDS  # the driver's messages of this time are still unread
    assert run.mailbox.without_driver() == Kept()
    run.mailbox.renew("first")
    assert run.after(GONE_SECONDS) == Kept()
    assert run.after(1) != Kept()
    run.mailbox.renew("first")
    run.now += 10 * LEASE_SECONDS
    assert run.mailbox.without_driver() == Kept()


def test_a_stop_file_that_cannot_be_read_does_not_keep_seats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before: the error ended the thread that looks for a driver, and the seats stayed for ever."""

    def stale(_path: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    run = Run(monkeypatch, StopFile(tmp_path / "stop"))
    monkeypatch.setattr(Path, "exists", stale)
    assert run.after(GONE_SECONDS + 1) == Kept(others=False)
    assert not run.after(LEASE_SECONDS + SAVE_SECONDS).mailbox


@given(SECONDS, st.none() | SECONDS, st.booleans())
def test_no_seat_stays_for_ever_without_a_mailbox(silent: float, ended: float | None, works: bool) -> None:
    """Before: a seat whose mailbox had died with its machine kept its slot until a person noticed."""
    stays = seat_stays(silent, ended, works=works)
    if ended is not None:
        assert stays == (works and ended <= SAVE_SECONDS)
    else:
        assert stays == (silent <= SILENT_SECONDS)
        assert stays or silent > GONE_SECONDS + LEASE_SECONDS + SAVE_SECONDS  # one that is only slow may keep it


def test_a_stopped_run_needs_no_driver_to_end_its_seats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    run = Run(monkeypatch, stop)
    stop.request("cancelled")
    assert run.after(STOPPED_SECONDS) == Kept()  # the driver ends them itself
    assert run.after(1).asks_to_end
    assert all(run.mailbox.is_ending(attempt) for attempt in run.attempts.values())


def test_the_next_driver_finds_what_is_under_way_and_the_one_before_is_shut_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch)
    assert {unit: each.seat for unit, each in run.mailbox.take_over("second", NEVER, ()).items()} == {
        "one": "seat of one",
        "two": "seat of two",
    }
    assert not run.mailbox.renew("first")
    for asked in (
        lambda: run.mailbox.wait("first", TRAININGS, 0.0),
        lambda: run.mailbox.serve("first", "drop", TRAININGS, 1),
        lambda: run.mailbox.serve("first", "begin_attempt", "one"),
        lambda: run.mailbox.serve("first", "sync", "begin", 0),
    ):
        with pytest.raises(TakenOverError):
            asked()
    assert run.mailbox.renew("second")
    run.pass_on("second")
    run.mailbox.begin(["one", "two"], ["two"])
    assert [event.data["hold"] for event in run.pass_on("second")] == [
        "hold of one"
    ]  # its seat is not paid for any more
    assert set(run.mailbox.take_over("third", NEVER, ())) == {"two"}


def test_a_gang_ends_with_its_driver_and_is_not_paid_for_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.mailbox.begin_attempt("finetune")
    run.mailbox.push(Event("workers_held", "finetune", data=hold_of("finetune"), time=100.0))
    run.pass_on()
    run.mailbox.take_over("second", NEVER, ())
    assert [event.data["unit"] for event in run.pass_on("second")] == ["one", "two"]


def test_a_slot_is_paid_for_while_no_driver_lives_and_no_event_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    log = run.pass_on()
    monkeypatch.setattr("moedisco_ray.execution.ray.mailbox_actor.time.time", lambda: 160.0)
    run.mailbox.renew("first")
    progress = Event("progress", "submodels", "one", {"step": 7, "tokens": 7, "tokens_per_second": 1.0}, time=161.0)
    run.mailbox.push(progress, run.attempts["one"])
    log += run.mailbox.wait("first", TRAININGS, 0.0)  # stored, and then the driver died
    run.mailbox.push(Event("workers_released", data={"hold": "hold of one", "unit": "one"}, time=190.0))
    monkeypatch.setattr("moedisco_ray.execution.ray.mailbox_actor.time.time", lambda: 300.0)
    log.append(Event("run_started", time=299.0))
    run.mailbox.take_over("second", NEVER, [mark_of(event) for event in log])
    log += [*run.pass_on("second"), Event("heartbeat", time=310.0)]
    meter = Meter()
    for event in log:
        meter.update(event)
    assert log.count(progress) == 1
    assert meter.worker_seconds["low_memory"] == pytest.approx((190 - 100) + (310 - 100))
    held = run.mailbox.held()
    assert held["one"]["low_memory"] == pytest.approx(190 - 161)
    assert held["two"]["low_memory"] >= 300 - 161
