"""What `ray list tasks` and `ray list actors` show of a whole run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from ray.util.state import list_actors, list_tasks
from ray.util.state.common import TaskState
from small_run import small_config
from waiting import until

from moedisco_ray.execution import pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

MOST_TASKS = 40


def test_ray_lists_a_run_s_work_and_little_else(dashboard: str, tmp_path: Path) -> None:
    """Before: 96 tasks of a demo, and actors whose names say neither run nor pool."""
    config = small_config(
        tmp_path, tokens={"total": 40_000, "finetune_share": 0.4}, pools={"low_memory": {"max_workers": 1}}
    )
    pipeline.run(config)
    units = [f"{config.name}-submodel-{k}" for k in range(config.cluster_count)]
    tasks = until(lambda: _with(units, list_tasks(dashboard, limit=1000)))
    names = sorted(task.name for task in tasks)
    assert len(tasks) <= MOST_TASKS, "\n".join(f"{count} {name}" for name, count in Counter(names).items())
    assert names.count(units[0]) == 1
    actors = [actor for actor in list_actors(dashboard, limit=1000, detail=True) if actor.class_name == "Seat"]
    assert {actor.name.rpartition("-")[0] for actor in actors} == {
        f"{config.name}-low_memory",
        f"{config.name}-high_memory",
    }
    assert all(actor.state == "DEAD" for actor in actors)
    causes = {str(actor.death_cause) for actor in actors}
    assert not [cause for cause in causes if "kill" in cause.lower()], causes
    mailboxes = [actor for actor in list_actors(dashboard, limit=1000) if actor.class_name == "MailboxActor"]
    assert [actor.name for actor in mailboxes] == [f"{config.name}-mailbox"]


def _with(units: list[str], tasks: list[TaskState]) -> list[TaskState] | None:
    """The tasks, once Ray lists those of all units."""
    return tasks if {*units} <= {task.name for task in tasks} else None
