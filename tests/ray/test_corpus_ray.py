from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moedisco_ray.config import check_config
from moedisco_ray.corpus import build
from moedisco_ray.errors import CorpusError
from moedisco_ray.on_ray.corpus import build_corpus

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
]


def sentences(name, count):
    return [f"{name} says: {i} is {'odd' if i % 2 else 'even'} and {i * i} is its square." for i in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.txt").write_text("\n\n".join(sentences(f"text{i}", 40)))
    (folder / "running.txt").write_text(" ".join(sentences("running", 300)) + "\n\n" + "\n".join(sentences("more", 300)))
    rows = [json.dumps({"text": text}) for text in [*sentences("rows", 60), *sentences("text0", 10)]]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    pq.write_table(pa.table({"body": sentences("table", 60)}), folder / "table.parquet", row_group_size=7)
    datasets.Dataset.from_dict({"content": sentences("saved", 60)}).save_to_disk(str(folder / "saved"), num_shards=2)
    return check_config({
        "name": "t",
        "corpus": {"sequence_length": 32, "validation_fraction": 0.1, "sources": [
            {"path": str(folder / "text"), "documents": "paragraph", "name": "text", "weight": 1.5},
            {"path": str(folder / "rows.jsonl"), "name": "rows"},
            {"path": str(folder / "running.txt"), "name": "running"},
            {"path": f"file://{folder}/table.parquet", "text_column": "body"},
            {"path": str(folder / "saved"), "text_column": "content", "name": "saved"},
        ]},
        "tokenizer": {"train_vocab_size": 350},
    })


def contents(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def pure(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pure")
    return build(config, directory), contents(directory)


@pytest.mark.parametrize("blocks", [None, 1, 3])
def test_ray_makes_the_same_bytes_as_a_plain_loop_whatever_the_blocks(ray_cluster, config, pure, tmp_path, blocks):
    summary = build_corpus(config, tmp_path, blocks)
    assert (summary, contents(tmp_path)) == pure
    assert summary["duplicates"] == 10
    assert set(summary["sources"]) == {"text", "rows", "running", "source-3", "saved"}
    assert all(source["documents"] > 40 for source in summary["sources"].values())


@pytest.mark.parametrize("mistake", [
    ("x.txt", b"\0\1", {}, r"corpus\.sources\.0\.path: .*x\.txt.*is binary"),
    ("x.bin", b"text", {}, r"corpus\.sources\.0\.path: .*x\.bin.*has the unknown ending \.bin"),
    ("x.jsonl", b'{"body": 1}', {}, r"corpus\.sources\.0\.text_column: 'text': .*it has body"),
    ("x.txt", b" \n", {}, r"corpus\.sources\.0\.path: .*holds no documents"),
    ("x.txt", b"a b\nc d\ne f", {"documents": "line"}, r"clusters\.count: 4: fewer documents than clusters"),
])
def test_the_users_mistake_arrives_as_itself(ray_cluster, tmp_path, mistake):
    name, content, options, message = mistake
    (tmp_path / name).write_bytes(content)
    (tmp_path / "draft").mkdir()
    config = check_config({"name": "t", "corpus": {"sources": [{"path": str(tmp_path / name), **options}]}})
    with pytest.raises(CorpusError, match=message) as raised:
        build_corpus(config, tmp_path / "draft")
    assert type(raised.value) is CorpusError
    assert "\n" not in str(raised.value)
