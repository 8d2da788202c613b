from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_sources import scattered

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError, CorpusError
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.corpus import build, input_identity
from moedisco_ray.stages.corpus import stage as corpus
from moedisco_ray.stages.corpus.documents import DOCUMENTS, document_id
from moedisco_ray.stages.text.tokenizer import Encoder, save_trained, train_bpe

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "seven", "grey", "hills", "nobody"]


def sentences(count, seed):
    generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
    return [" ".join(generator.choice(WORDS, 12)) + f" {i}." for i in range(count)]


def run_config(sources, **sections):
    corpus = {"sources": sources, "sequence_length": 32, "validation_fraction": 0.1, **sections.pop("corpus", {})}
    return check_config({"name": "t", "corpus": corpus, "tokenizer": {"train_vocab_size": 320}, **sections})


@pytest.fixture
def sources(tmp_path):
    first, second = sentences(300, 0), sentences(200, 7)
    (tmp_path / "lines.txt").write_text("\n".join([*first, *first[:10]]))
    rows = [{"body": text, "n": 1} for text in [*second, *first[:5]]]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [
        {"path": str(tmp_path / "lines.txt"), "documents": "line", "name": "lines", "weight": 2.5},
        {"path": str(tmp_path / "rows.jsonl"), "text_column": "body", "weight": 0.5},
    ]


def make(config, directory, **options):
    directory.mkdir()
    return build(config, directory, **options)


def contents(directory):
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def read(directory):
    return pa.concat_tables([pq.read_table(path) for path in sorted(directory.glob("part-*.parquet"))])


def test_the_artifact_holds_what_the_summary_says(sources, tmp_path):
    summary = make(run_config(sources), tmp_path / "corpus")
    names = sorted(path.name for path in (tmp_path / "corpus").iterdir())
    assert names == ["shards", "tokenizer", "train", "validation"]
    train, validation = read(tmp_path / "corpus" / "train"), read(tmp_path / "corpus" / "validation")
    assert train.schema.equals(DOCUMENTS)
    assert validation.schema.equals(DOCUMENTS)
    ids = train["id"].to_pylist()
    assert ids == sorted(ids) == [document_id(text) for text in train["text"].to_pylist()]
    assert not set(ids) & set(validation["id"].to_pylist())
    assert set(validation["copies"].to_pylist()) == {1}

    by_source = {name: train.filter(pa.compute.equal(train["source"], name)) for name in ("lines", "source-1")}
    assert summary["duplicates"] == 15
    assert summary["documents"] == len(train) == sum(source["documents"] for source in summary["sources"].values())
    assert summary["validation_documents"] == len(validation) > 0
    assert set(by_source["lines"]["copies"].to_pylist()) == {2, 3}
    assert set(by_source["source-1"]["copies"].to_pylist()) == {1}
    lines_held_out = validation["source"].to_pylist().count("lines")
    assert len(by_source["lines"]) + lines_held_out == 300
    assert 60 < summary["sources"]["source-1"]["documents"] < 120  # half of 200, less the held out
    assert summary["bytes"] == sum(len(text.encode()) for text in train["text"].to_pylist())

    encoder = Encoder(tmp_path / "corpus" / "tokenizer")
    assert summary["vocab_size"] == encoder.vocab_size <= 320
    encoded = [ids.tolist() for ids in encoder.encode(train["text"].to_pylist())]
    assert train["tokens"].to_pylist() == encoded
    stream = TokenStream([tmp_path / "corpus" / "shards"], 32)
    copies = train["copies"].to_pylist()
    assert summary["tokens"] == sum((len(ids) + 1) * n for ids, n in zip(encoded, copies, strict=True))
    assert summary["tokens"] == sum(source["tokens"] for source in summary["sources"].values())
    # Every copy of the first pass comes before any of the second.
    assert stream.window(0).tolist() == [token for ids in encoded for token in [*ids, encoder.eos]][:33]


def test_the_result_does_not_depend_on_how_the_reading_is_cut(sources, tmp_path):
    config = run_config(sources)
    summary = make(config, tmp_path / "a")
    backwards = make(config, tmp_path / "b", unit_bytes=700, engine=scattered)
    assert backwards == summary
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_seed_holds_out_other_documents(sources, tmp_path):
    make(run_config(sources), tmp_path / "a")
    make(run_config(sources, seed=1), tmp_path / "b")
    first, second = (set(read(tmp_path / name / "validation")["id"].to_pylist()) for name in "ab")
    assert first != second


def test_few_documents_have_a_validation_document_too(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(sentences(9, 3)))
    source = {"path": str(tmp_path / "x.txt"), "documents": "line"}
    summary = make(run_config([source], corpus={"validation_fraction": 1e-6}), tmp_path / "c")
    assert (summary["documents"], summary["validation_documents"]) == (8, 1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a b c\nd e f\ng h i", {}, r"clusters\.count: 4: fewer documents than clusters: 2 for training"),
        (" \n\n", {}, r"corpus\.sources\.0\.path: .*holds no documents"),
        ("\n".join("abcdefgh"), {"clusters": {"count": 2}}, r"corpus\.sequence_length: 32: there are only \d+ tokens"),
    ],
)
def test_too_little_text_ends_in_one_line(tmp_path, text, options, message):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(CorpusError, match=message):
        make(run_config([{"path": str(tmp_path / "x.txt"), "documents": "line"}], **options), tmp_path / "c")


def test_a_small_vocabulary_is_refused_before_text_is_read(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\0")
    config = run_config([{"path": str(tmp_path / "x.txt")}], model={"config": {"vocab_size": 300}})
    with pytest.raises(ConfigError, match=r"model\.config\.vocab_size"):
        make(config, tmp_path / "c")


def test_identity_follows_the_files(sources):
    config = run_config(sources)
    before = input_identity(config)["corpus"]
    assert input_identity(config)["corpus"] == before
    path = Path(sources[0]["path"])
    os.utime(path, ns=(1, 1))
    touched = input_identity(config)["corpus"]
    path.write_text(path.read_text() + "\nmore")
    os.utime(path, ns=(1, 1))
    assert len({before, touched, input_identity(config)["corpus"]}) == 3
    assert input_identity(run_config([{"path": "embedded"}])) == input_identity(run_config([{"path": "embedded"}]))


PEAK = """
import sys
from pathlib import Path
from moedisco_ray.core.config import check_config
from moedisco_ray.stages import tables
from moedisco_ray.stages.corpus import build, documents
folder = Path(sys.argv[1])
documents.RANGE_BYTES = tables.HELD_BYTES = 1 << 20
(folder / "made").mkdir()
build(check_config({
    "name": "t", "tokenizer": {"path": str(folder.parent / "tokenizer")},
    "corpus": {"sources": [{"path": str(folder / "x.txt"), "documents": "line"}]}}),
    folder / "made", unit_bytes=1 << 20)
status = Path('/proc/self/status').read_text().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) // 1024)
"""


# Not getrusage: on Linux a child's ru_maxrss starts at its parent's size, so it would measure pytest.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    # One thread and one allocator: what threads keep for later differs by tens of MB from run to run.
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "1",
    }
    save_trained(train_bpe(sentences(100, 0), 300), tmp_path / "tokenizer")
    peaks = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "x.txt").write_text("\n".join(sentences(size * 30_000, size)))  # 2 and 8 MB
        done = subprocess.run(
            [sys.executable, "-c", PEAK, folder], capture_output=True, text=True, check=True, env=environment
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 25, peaks


class Counted(LocalBackend):
    """A backend whose corpora have 1,000 tokens."""

    def build_corpus(self, config, directory, emit):
        return {"tokens": 1000}


@pytest.mark.parametrize(("total", "said"), [(4000, []), (100_000, ["the text is read 100 times; up to 4 are"])])
def test_a_text_that_will_be_read_too_often_is_said_once_its_tokens_are_counted(sources, tmp_path, total, said):
    """Before: a run began without a word, and its report said `read 100.0 times`."""
    events = []
    optimizer = {"optimizer": {"batch_tokens": 32}}
    config = run_config(sources, tokens={"total": total}, submodels=optimizer, finetune=optimizer)
    corpus.run(Context(config, tmp_path, "0" * 64, events.append, Counted()), Draft(tmp_path))
    assert [(event.type, event.data["message"][:39]) for event in events] == [("warning", text) for text in said]
