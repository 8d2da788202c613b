from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from corpus_sources import config_of, contents
from ray import cloudpickle

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.read_roots import ENVIRONMENT, ReadRoots
from moedisco_ray.core.store.run_store import SHARED
from moedisco_ray.execution.ray import tables
from moedisco_ray.execution.ray.corpus import build_corpus
from moedisco_ray.execution.ray.tables import RayEngine
from moedisco_ray.stages.corpus import build

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def sentences(name, count):
    return [f"{name} says: {i} is {'odd' if i % 2 else 'even'} and {i * i} is its square." for i in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return config_of(tmp_path_factory.mktemp("text"), "copy:copy", near_duplicates=0.7)


@pytest.fixture(scope="module")
def in_process(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("in_process")
    return build(config, directory), contents(directory)


@pytest.mark.parametrize("blocks", [7, pytest.param(200, marks=pytest.mark.slow)])
def test_ray_data_makes_the_same_bytes_as_one_process_whatever_the_blocks(
    ray_cluster, config, in_process, tmp_path, blocks
):
    summary = build(config, tmp_path, RayEngine("t", SHARED, blocks), unit_bytes=700)
    assert (summary, contents(tmp_path)) == in_process


@dataclasses.dataclass(frozen=True)
class DiesOnce:
    """Yields the tables of a unit; once in the test, its process is killed after the first."""

    read: Callable[[Any], Iterable[pa.Table]]
    marker: Path

    def __call__(self, unit):
        for table in self.read(unit):
            yield table
            if not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class DyingEngine(RayEngine):
    marker: Path = Path()

    def __call__(self, units, read, here=(), size=None):
        return super().__call__(units, DiesOnce(read, self.marker), here, size)


def test_a_killed_worker_changes_no_byte(ray_cluster, config, in_process, tmp_path):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    (tmp_path / "made").mkdir()
    summary = build(config, tmp_path / "made", DyingEngine("t", SHARED, 7, tmp_path / "died"), unit_bytes=700)
    assert (tmp_path / "died").exists()
    assert (summary, contents(tmp_path / "made")) == in_process


def test_files_without_documents_are_no_obstacle(ray_cluster, tmp_path, monkeypatch):
    """Before the first table of each unit had a schema: ArrowInvalid, Schema at index 1 was different."""
    monkeypatch.setattr(tables, "_SHUFFLED_BYTES", 1)  # a task of the shuffle for each block, as in a large corpus
    for i in range(4):
        texts = sentences(f"file {i}", 40 if i % 2 else 0)
        (tmp_path / f"{i:02d}.txt").write_text("\n".join(texts) or " \n")
    config = check_config(
        {
            "name": "t",
            "tokenizer": {"train_vocab_size": 350},
            "clusters": {"count": 2},
            "corpus": {
                "sequence_length": 32,
                "validation_fraction": 0.1,
                "sources": [{"path": str(tmp_path / "*.txt"), "documents": "line"}],
            },
        }
    )
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    summary = build(config, tmp_path / "here", unit_bytes=5000)
    assert build(config, tmp_path / "there", RayEngine("t", SHARED), unit_bytes=5000) == summary
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.parametrize(
    "mistake",
    [
        ("x.txt", b"\0\1", {}, r"corpus\.sources\.0\.path: .*x\.txt.*is binary"),
        ("x.txt", b"a b\nc d\ne f", {"documents": "line"}, r"clusters\.count: 4: fewer documents than clusters"),
    ],
)
def test_the_users_mistake_arrives_as_itself(ray_cluster, tmp_path, mistake):
    name, content, options, message = mistake
    (tmp_path / name).write_bytes(content)
    (tmp_path / "draft").mkdir()
    config = check_config({"name": "t", "corpus": {"sources": [{"path": str(tmp_path / name), **options}]}})
    with pytest.raises(CorpusError, match=message) as raised:
        build_corpus(config, tmp_path / "draft")
    assert type(raised.value) is CorpusError
    assert "\n" not in str(raised.value)


DRIVER = """
import json, os, sys
from pathlib import Path
from moedisco_ray.core.config import Source, check_config
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.corpus.reading import ReadUnit
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.run_store import SHARED
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.tables import RayEngine

data, home = Path(sys.argv[1]), Path(sys.argv[2])
settings = check_config({"name": "t", "output": str(home), "corpus": {"sources": [{"path": str(data)}]}})
(source,) = expand_sources(settings.corpus.sources, home, Limits(32, 256))
units = plan_units([(source, list_files(source.field, source.settings).files)])
def documents():
    return RayEngine("t", SHARED)(units, ReadUnit(1), []).grouped(1).written(lambda table: [len(table)])
settings.directory.mkdir()
with session.ray_cluster(settings):
    before = documents()
    (data / "a.txt").unlink()
    (data / "a.txt").symlink_to(data.parent / "secret.txt")
    del os.environ["MOEDISCO_READ_ROOTS"]     # the tasks must find them in their own environment
    try:
        after = documents()
    except CorpusError as error:
        after = str(error)
print(json.dumps([before, after]))
"""


@pytest.mark.slow
def test_a_link_that_leads_out_of_the_read_roots_is_refused_where_a_ray_task_opens_it(ray_cluster, tmp_path):
    """With the environment of a job as the service submits it; the driver only lists files, and would not notice."""
    (tmp_path / "data").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "data" / "a.txt").write_text("mine")
    (tmp_path / "secret.txt").write_text("secret")
    given = {ENVIRONMENT: ReadRoots([tmp_path / "data"], [tmp_path / "home"]).to_json()}
    environment = (
        os.environ
        | given
        | {
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": given}}),
        }
    )
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "data"), str(tmp_path / "home")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert before == [1]
    assert after.startswith(f"corpus.sources.0.path: '{tmp_path}/data/a.txt': ")
    assert "leads out of the directories" in after


ROWS_OF_A_USER = """
def shouted(row):
    return {**row, "body": row["body"].upper()} if " is odd " in row["body"] else None

def broken(row):
    raise ValueError("no such column")
"""
DRIVER_WITH_MAP = """
import json, sys
from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.execution.ray import corpus, session

found = []
for text in sys.argv[1:]:
    settings = check_config(json.loads(text))
    settings.directory.mkdir()
    draft = settings.directory / "corpus"
    draft.mkdir()
    with session.ray_cluster(settings):
        try:
            found.append(corpus.build_corpus(settings, draft))
        except ConfigError as error:
            found.append(str(error))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_tasks_import_a_function_of_the_user_and_its_mistakes_arrive_as_one_line(ray_cluster, tmp_path, monkeypatch):
    """The module is in a folder that PYTHONPATH names where tasks run, as on the nodes of a cluster."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "rows_of_a_user.py").write_text(ROWS_OF_A_USER)
    rows = [{"body": text, "n": i} for i, text in enumerate(sentences("rows", 80))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"body": sentences("table", 120)}), tmp_path / "table.parquet", row_group_size=7)

    def settings(function):
        # One file fails: of two that are read at once, either may be the first.
        names = ("rows.jsonl",) if function == "broken" else ("rows.jsonl", "table.parquet")
        sources = [
            {"path": str(tmp_path / name), "text_column": "body", "name": name, "map": f"rows_of_a_user:{function}"}
            for name in names
        ]
        return {
            "name": function,
            "output": str(tmp_path),
            "tokenizer": {"train_vocab_size": 350},
            "clusters": {"count": 2},
            "corpus": {"sequence_length": 32, "validation_fraction": 0.1, "sources": sources},
        }

    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": path}}}),
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER_WITH_MAP, *(json.dumps(settings(name)) for name in ("shouted", "broken"))],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    summary, error = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "pure").mkdir()
    assert build(check_config(settings("shouted")), tmp_path / "pure") == summary
    assert contents(tmp_path / "shouted" / "corpus") == contents(tmp_path / "pure")
    assert {name: source["dropped_rows"] for name, source in summary["sources"].items()} == {
        "rows.jsonl": 40,
        "table.parquet": 60,
    }
    assert error.startswith(
        "corpus.sources.0.map: 'rows_of_a_user:broken': raises ValueError at rows_of_a_user.py:6 for a row of "
    )
    assert "\n" not in error
