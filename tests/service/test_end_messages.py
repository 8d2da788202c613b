"""A run's end is posted to the operator's URL, signed, until it has arrived."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from receiver import Receiver, receiving
from reconciling import Scene

from service.background.end_messages import LONGEST_DELAY, EndMessages, delay
from service.database import runs
from service.database.gauges import GIVE_UP_SECONDS
from service.database.session import Database
from service.domain.signatures import SIGNATURE_HEADER, sign
from service.domain.states import RunState
from service.errors import DatabaseUnavailable, LeaseLost

SECRET = "whsec"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene.on(database, tmp_path)


def ended(scene: Scene) -> str:
    run_id = scene.submit()
    scene.change(run_id, RunState.CANCELLED)
    return run_id


def test_the_end_of_a_run_is_posted_once_and_signed(scene, receiver):
    messages = EndMessages(scene.database, receiver.url, SECRET)
    waiting, run_id = scene.submit(), ended(scene)
    for _ in range(2):
        messages.round(scene.now)
    [(headers, body)] = receiver.got
    message = json.loads(body)
    assert (message["type"], message["time"]) == ("run.ended", scene.run(run_id).ended)
    assert (message["run"]["id"], message["run"]["owner"], message["run"]["state"]) == (run_id, "ann", "cancelled")
    assert headers["path"] == "/hook?x=1"
    assert headers[SIGNATURE_HEADER] == sign(SECRET, body, scene.now)
    assert waiting not in body.decode()


def test_what_was_not_accepted_is_posted_again_later_and_in_order(scene, receiver):
    messages = EndMessages(scene.database, receiver.url, SECRET)
    first = ended(scene)
    scene.now += 1
    second = ended(scene)
    receiver.answers = [500, 307]  # a redirect is not followed
    for seconds in (0, 1, 5, 10, 15, 20):
        messages.round(scene.now + seconds)
    assert receiver.runs == [(first, "cancelled")] * 3 + [(second, "cancelled")]


def test_a_message_that_is_refused_holds_up_no_other(scene, receiver):
    messages = EndMessages(scene.database, receiver.url, SECRET)
    first = ended(scene)
    scene.now += 1
    others = [ended(scene) for _ in range(2)]
    receiver.answers = [422, 204, 204, 422]
    for seconds in (0, 1, 5, 10, 20):
        messages.round(scene.now + seconds)
    posted = [run_id for run_id, _ in receiver.runs]
    assert sorted(posted[1:3]) == sorted(others)
    assert [posted[0], *posted[3:]] == [first] * 3


def test_a_receiver_that_is_away_for_a_day_is_given_up(scene, receiver):
    run_id = ended(scene)
    away = EndMessages(scene.database, "http://127.0.0.1:1/", SECRET)
    for hour in range(30):
        away.round(scene.now + 3600.0 * hour)
    messages = EndMessages(scene.database, receiver.url, SECRET)
    messages.round(scene.run(run_id).ended + GIVE_UP_SECONDS + 1)
    assert receiver.got == []
    messages.round(scene.run(run_id).ended + GIVE_UP_SECONDS)
    assert receiver.runs == [(run_id, "cancelled")]


def test_a_resumed_run_is_reported_again_when_it_ends_again(scene, receiver):
    messages = EndMessages(scene.database, receiver.url, SECRET)
    run_id = ended(scene)
    messages.round(scene.now)
    scene.change(run_id, RunState.QUEUED)
    messages.round(scene.now)
    scene.now += 1
    scene.change(run_id, RunState.CANCELLED)
    messages.round(scene.now)
    assert receiver.runs == [(run_id, "cancelled")] * 2


def test_a_message_is_not_lost_when_the_database_is_away_for_its_note(scene, receiver, monkeypatch):
    messages = EndMessages(scene.database, receiver.url, SECRET)
    ended(scene)

    def away(*_: object) -> None:
        raise DatabaseUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "posted", away)
        with pytest.raises(DatabaseUnavailable):
            messages.round(scene.now)
    messages.round(scene.now)
    assert [body for _, body in receiver.got] == [receiver.got[0][1]] * 2


@given(st.integers(0, 10**6))
def test_waits_grow_up_to_an_hour(failures):
    assert 0 < delay(failures) <= delay(failures + 1) <= LONGEST_DELAY


def test_a_process_that_lost_the_lease_posts_no_more_and_stores_what_was_accepted(scene: Scene, receiver: Receiver):
    first, second = ended(scene), ended(scene)
    checks, answers = iter([None, LeaseLost("gone")]), []

    def check() -> None:
        if (error := next(checks)) is not None:
            raise error

    messages = EndMessages(scene.database, receiver.url, SECRET, count=answers.append, check=check)
    with pytest.raises(LeaseLost):
        messages.round(scene.now)
    EndMessages(scene.database, receiver.url, SECRET).round(scene.now)
    assert [run for run, _ in receiver.runs] == [first, second]
    assert answers == ["accepted"]
