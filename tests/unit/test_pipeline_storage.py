"""A run whose checkpoints lie in a storage of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from s3_standin import s3_server
from small_run import same_outcome, small_config

from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_takeover import begin
from moedisco_ray.execution import export_run, pipeline
from moedisco_ray.execution.checkpoint_folder import made_storage
from moedisco_ray.execution.local_backend import LocalBackend

TOKENS = {"total": 60_000, "seed_share": 0.0, "finetune_share": 0.4}


@pytest.mark.slow
def test_a_run_saves_to_its_storage_goes_on_from_there_and_leaves_nothing(tmp_path: Path) -> None:
    undisturbed = pipeline.run(small_config(tmp_path / "undisturbed", tokens=TOKENS), backend=LocalBackend())
    storage = tmp_path / "storage"
    config = small_config(tmp_path / "stopped", tokens=TOKENS, checkpoint={"every": "auto", "storage": str(storage)})
    stop = StopFile(tmp_path / "stop")

    def ask(event: Event) -> None:
        if event.type == "progress" and event.unit == "finetune" and event.data["step"] >= 10:
            stop.request("budget")

    with pytest.raises(RunStopped, match="budget"):
        pipeline.run(config, (ask,), backend=LocalBackend(), stop=stop)
    theirs = storage / "small-of-another-run" / "step"
    theirs.mkdir(parents=True)
    assert list(storage.glob("small-*/finetune-*/small-finetune/steps/step-*"))
    assert not list(config.directory.glob("checkpoints/**/step-*"))
    events: list[Event] = []
    pipeline.run(config, (events.append,), backend=LocalBackend())
    assert next(event.data["step"] for event in events if event.type == "progress") > 10
    same_outcome(config.directory, undisturbed)
    assert list(storage.rglob("*")) == [theirs.parent, theirs]


def test_two_runs_of_one_name_and_settings_share_no_checkpoints(tmp_path: Path) -> None:
    one, other = (
        small_config(tmp_path / place, checkpoint={"storage": "s3://bucket/folder?scheme=http"})
        for place in ("one", "other")
    )
    for config in (one, other):
        pipeline.claim(config, redo=False)
    mine, again, others = (made_storage(config, RunStore.of(config.location)) for config in (one, one, other))
    assert mine == again  # a later driver of the same run
    assert mine != others
    assert str(mine).startswith("s3://bucket/folder/small-")
    assert str(mine).endswith("?scheme=http")


def test_a_run_at_a_uri_finds_its_checkpoints_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server("runs") as server:
        output = f"s3://runs/team?endpoint_override={server}&scheme=http"
        config = small_config(tmp_path, checkpoint={"storage": str(tmp_path / "storage")}).model_copy(
            update={"output": output}
        )
        stores = []
        for machine in ("driver", "next-driver", "another"):
            monkeypatch.setenv(CACHE, str(tmp_path / machine))
            stores.append(RunStore.of(config.location))
        driver, following, another = stores
        driver.directory.mkdir(parents=True)
        driver.remote.write("config.json", config.model_dump_json().encode())
        mine = made_storage(config, driver)
        assert str(mine).startswith(str(tmp_path / "storage"))  # not at the run's URI
        begin(following, (), fresh=True)
        assert made_storage(config, following) == mine
        assert export_run.context_of(config, another).own_storage == mine


def test_an_export_changes_nothing_in_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint={"storage": str(tmp_path / "storage")})
    pipeline.claim(config, redo=False)
    before = sorted(config.directory.rglob("*"))
    export_run.context_of(config, RunStore.of(config.location))
    assert sorted(config.directory.rglob("*")) == before
