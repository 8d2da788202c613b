"""The client against the real application, over real connections."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import api_client
import pytest
from running_service import RETRY, Running, until

from service.client import AsyncClient, RequestRefused, RetryPolicy, ServiceAway
from service.domain.policies import Policies, Policy
from service.domain.states import RunState

CONFIG = api_client.demo()


@pytest.fixture
def running(tmp_path):
    with api_client.service(tmp_path) as made:
        running = Running(made)
        running.start()
        yield running
        running.stop()


@pytest.fixture
def client(running):
    with running.client() as client:
        yield client


def test_runs_are_made_found_changed_and_ended(client):
    first = client.submit(CONFIG, priority=2, budget_dollars=5)
    assert (first.state, first.priority, first.money.budget_dollars) == (RunState.QUEUED, 2, 5.0)
    second = client.submit(CONFIG | {"tags": {"team": "a"}})
    assert [run.id for run in client.runs(page_size=1)] == [second.id, first.id]
    assert [run.id for run in client.runs(tags={"team": "a"}, states=[RunState.QUEUED], name="demo")] == [second.id]
    assert client.change(first.id, name="other", priority=-3).name == "other"
    assert client.change(first.id, budget_dollars=7).money.budget_dollars == 7
    assert client.change(first.id, priority=-2).money.budget_dollars == 7
    assert client.change(first.id, budget_dollars="none").money.budget_dollars is None
    assert client.change(first.id, budget_dollars=7).money.budget_dollars == 7
    assert client.cancel(first.id).state == RunState.CANCELLED
    assert client.resume(first.id).state == RunState.QUEUED
    again = client.retry(first.id, {"tokens.total": 7_000_000}, priority=1)
    assert (again.parent, again.config["tokens"]["total"], again.priority) == (first.id, 7_000_000, 1)
    assert again.money.budget_dollars == 7
    assert client.retry(first.id, budget_dollars="none").money.budget_dollars is None
    client.delete(first.id)
    with pytest.raises(RequestRefused) as caught:
        client.run(first.id)
    assert caught.value.status == 404


def test_the_same_key_makes_one_run(client):
    assert client.submit(CONFIG, idempotency_key="k" * 20).id == client.submit(CONFIG, idempotency_key="k" * 20).id
    assert len(list(client.runs())) == 1


def test_mistakes_name_their_field(client):
    with pytest.raises(RequestRefused, match=r"clusters\.count.*does not divide") as caught:
        client.submit(CONFIG | {"clusters": {"count": 3}})
    assert caught.value.field.startswith("config.clusters")
    with pytest.raises(RequestRefused, match="no such setting; did you mean 'seed'"):
        client.submit(CONFIG | {"sed": 1})
    with pytest.raises(RequestRefused) as caught:
        client.submit(CONFIG | {"sed": 1, "seed": "x"})
    assert [mistake.field for mistake in caught.value.problem.errors] == ["config.sed", "config.seed"]


def test_tokens_decide_who_may_do_what(running):
    with running.client("admin") as admin:
        made = admin.create_token("ci", "eve", ["read"], expires_in_days=None)
        assert made.expires is None
        with running.client(made.token) as eve:
            assert (eve.identity().owner, eve.identity().scopes) == ("eve", ["read"])
            with pytest.raises(RequestRefused) as caught:
                eve.submit(CONFIG)
            assert caught.value.status == 403
            admin.revoke_token(made.id)
            with pytest.raises(RequestRefused, match="set MOEDISCO_TOKEN"):
                eve.identity()
        assert made.id in [token.id for token in admin.tokens(page_size=1)]


def test_the_rest_of_the_service(running, client):
    assert {pool.resource for pool in client.pools().items} >= {"low_mem_gpu", "high_mem_gpu"}
    assert client.estimate(CONFIG).name == "demo"
    with running.client("admin") as admin:
        admin.set_policies(Policies(default=Policy(prices={"low_mem_gpu": 0.25}, dollars_per_month=None)))
        admin.set_policy("ann", Policy(highest_priority=10, active_runs=None))
        kept = admin.policies()
        assert (kept.of("ann").prices, kept.of("ann").active_runs, kept.of("bob").active_runs) == (
            {"low_mem_gpu": 0.25},
            None,
            2,
        )
        assert admin.quota("ann").highest_priority == 10
        admin.delete_policy("ann")
    assert client.quota().prices == {"low_mem_gpu": 0.25}


def test_figures_of_a_run(running, client):
    run_id = client.submit(CONFIG).id
    running.made.start(run_id)
    running.report(run_id, 1, 50)
    assert client.metrics(run_id, "loss", units=["submodel-0"]).series[0].value[0] == 3.0
    assert [(unit.unit, unit.step) for unit in client.units(run_id)] == [("submodel-0", 50)]
    assert client.report(run_id).name == "demo"
    with pytest.raises(RequestRefused):
        client.clusters(run_id)


def test_events_come_once_across_restarts_of_the_service(running, client):
    run_id = client.submit(CONFIG).id
    running.made.start(run_id)
    with running.client() as another, ThreadPoolExecutor() as pool:
        readers = [pool.submit(lambda reader: list(reader.events(run_id)), reader) for reader in (client, another)]
        for restart in range(3):
            running.report(run_id, 1 + 40 * restart, 20)
            running.stop()
            running.report(run_id, 21 + 40 * restart, 20)
            running.start()
        running.made.bring(run_id, RunState.SUCCEEDED)
        seen, watched = (reader.result(60) for reader in readers)
    assert watched == seen
    length = client.run(run_id).events
    assert [position for position, _ in seen] == list(range(length))
    assert [event.data["step"] for _, event in seen if event.type == "progress"] == list(range(1, 121))
    assert [event.data["state"] for _, event in seen if event.type == "state"] == [
        "queued",
        "starting",
        "running",
        "succeeded",
    ]
    assert list(client.events(run_id, length - 3, follow=False)) == seen[-2:]


def test_waiting_for_a_run(running, client):
    run_id = client.submit(CONFIG).id
    running.made.start(run_id)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.wait, run_id)
        running.report(run_id, 1, 5)
        assert not waiting.done()
        running.made.bring(run_id, RunState.FAILED)
        assert waiting.result(60).state == RunState.FAILED


def test_what_is_safe_outlives_a_restart(running, client):
    run_id = client.submit(CONFIG).id
    running.stop()
    starter = threading.Timer(0.3, running.start)
    starter.start()
    try:
        assert client.submit(CONFIG).id != run_id
    finally:
        starter.join()


def test_a_service_that_has_gone(running):
    running.stop()
    with (
        running.client(retry=RetryPolicy(seconds=0.05, first_wait=0.01)) as client,
        pytest.raises(ServiceAway, match=running.url),
    ):
        client.pools()


def test_logs_and_files(running, client, tmp_path):
    run_id = client.submit(CONFIG).id
    running.made.start(run_id)
    directory = running.made.directory(run_id)
    (directory / "ray.log").write_text("".join(f"line {n}\n" for n in range(500)))
    assert [log.name for log in client.logs(run_id)] == ["driver"]
    assert client.log(run_id, tail=2) == "line 498\nline 499\n"
    followed = []
    follower = threading.Thread(target=lambda: followed.extend(client.follow_log(run_id, tail=1)))
    follower.start()
    until(lambda: followed)
    with (directory / "ray.log").open("a") as log:
        log.write("more\n")
    until(lambda: len(followed) == 2)
    model = directory / "model"
    (model / "deep").mkdir(parents=True)
    files = {"config.json": b"{}", "deep/weights": bytes(3_000_000), "empty": b""}
    for name, content in files.items():
        (model / name).write_bytes(content)
    running.made.bring(run_id, RunState.SUCCEEDED)
    follower.join(60)
    assert followed == ["line 499", "more"]
    seen = []
    target = client.download(run_id, tmp_path / "got", lambda *progress: seen.append(progress))
    assert {
        path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()
    } == files
    assert seen[-1] == (3_000_002, 3_000_002)
    part = tmp_path / f".again.{run_id}.part"
    (part / "deep").mkdir(parents=True)
    (part / "deep" / "weights").write_bytes(bytes(1_000_000))
    client.download(run_id, tmp_path / "again")
    assert (tmp_path / "again" / "deep" / "weights").stat().st_size == 3_000_000
    assert client.fetch(run_id, "model/config.json", tmp_path / "config.json").read_bytes() == b"{}"
    with pytest.raises(RequestRefused):
        client.fetch(run_id, "model/none", tmp_path / "none")


def test_the_async_client_does_the_same(running, tmp_path):
    async def use():
        async with AsyncClient(running.url, running.made.plain["ann"], retry=RETRY) as client:
            runs = await asyncio.gather(*(client.submit(CONFIG | {"name": f"demo-{n}"}) for n in range(3)))
            await asyncio.gather(*(asyncio.to_thread(running.made.start, run.id) for run in runs))
            waiting = asyncio.gather(*(client.wait(run.id) for run in runs))
            for run in runs:
                directory = running.made.directory(run.id) / "model"
                directory.mkdir()
                (directory / "config.json").write_text(run.name)
                await asyncio.to_thread(running.made.bring, run.id, RunState.SUCCEEDED)
            assert {run.state for run in await waiting} == {RunState.SUCCEEDED}
            targets = await asyncio.gather(*(client.download(run.id, tmp_path / run.id) for run in runs))
            assert [(target / "config.json").read_text() for target in targets] == [run.name for run in runs]
            events = [event async for _, event in client.events(runs[0].id)]
            assert [event.data["state"] for event in events] == ["queued", "starting", "running", "succeeded"]
            assert len([run async for run in client.runs(page_size=2)]) == 3
            async with contextlib.aclosing(client.events(runs[0].id)) as few:
                assert (await anext(few))[0] == 0

    asyncio.run(use())
