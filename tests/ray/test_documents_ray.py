"""The corpus stage on Ray Data: the same bytes as in one process, whatever the blocks."""

from __future__ import annotations

import pytest
from corpus_sources import config_of, contents

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.run_store import SHARED
from moedisco_ray.execution.ray.documents import RayEngine
from moedisco_ray.stages.corpus.make import make

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return config_of(tmp_path_factory.mktemp("text"), "copy:copy", near_duplicates=0.7)


@pytest.fixture(scope="module")
def in_process(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("in_process")
    return make(config, directory), contents(directory)


@pytest.mark.parametrize("blocks", [1, 7, 200])
def test_ray_data_makes_the_same_bytes_as_one_process_whatever_the_blocks(
    ray_cluster, config, in_process, tmp_path, blocks
):
    summary = make(config, tmp_path, RayEngine("t", SHARED, blocks), unit_bytes=700)
    assert (summary, contents(tmp_path)) == in_process


@pytest.mark.parametrize(
    "mistake",
    [
        ("x.txt", b"\0\1", {}, r"corpus\.sources\.0\.path: .*x\.txt.*is binary"),
        ("x.jsonl", b'{"body": 1}', {}, r"corpus\.sources\.0\.text_column: 'text': .*it has body"),
        ("x.txt", b"a b\nc d\ne f", {"documents": "line"}, r"clusters\.count: 4: fewer documents than clusters"),
    ],
)
def test_the_users_mistake_arrives_as_itself(ray_cluster, tmp_path, mistake):
    name, content, options, message = mistake
    (tmp_path / name).write_bytes(content)
    (tmp_path / "draft").mkdir()
    config = check_config({"name": "t", "corpus": {"sources": [{"path": str(tmp_path / name), **options}]}})
    with pytest.raises(CorpusError, match=message) as raised:
        make(config, tmp_path / "draft", RayEngine("t", SHARED))
    assert type(raised.value) is CorpusError
    assert "\n" not in str(raised.value)
