"""The cluster stage on Ray gives the bits of the one in this process."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clustering_corpus import run_config, write_corpus, write_model

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stop_file import NEVER
from moedisco_ray.execution.ray.clustering import build_clusters
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.stages.clustering.build import LocalWorkers
from moedisco_ray.stages.clustering.build import build_clusters as build_here

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def one_thread():
    """Many threads round a sum in another order than one, which is what Ray gives its workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files_under(directory):
    return {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}


def test_the_artifact_is_that_of_the_pure_path(one_thread, tmp_path):
    corpus, model = write_corpus(tmp_path / "corpus", parts=2), write_model(tmp_path / "model")
    config = run_config(vectors="hidden_state")
    here, there = tmp_path / "here", tmp_path / "there"
    pure = build_here(config, corpus, model, here, LocalWorkers())
    meter = Meter()
    with Seats("vectors") as seats:
        assert (
            build_clusters(
                config, corpus_dir=corpus, model_dir=model, directory=there, emit=meter.update, stop=NEVER, seats=seats
            )
            == pure
        )
        # as many as there are slots and parts
        assert seats.idle("low_mem_gpu") == 2
    assert meter.worker_seconds.keys() == {"low_memory"}
    assert not meter.open
    ours, theirs = files_under(here), files_under(there)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if name.endswith(".npz"):
            with np.load(path) as a, np.load(theirs[name]) as b:
                assert all(np.array_equal(a[key], b[key]) for key in a)
        elif name.endswith(".parquet"):
            assert pq.read_table(path).equals(pq.read_table(theirs[name])), name
        else:
            assert path.read_bytes() == theirs[name].read_bytes(), name


def test_fewer_documents_than_clusters_is_told(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=5, parts=1)
    with pytest.raises(CorpusError, match=r"clusters.count"):
        build_clusters(
            run_config(count=6),
            corpus_dir=corpus,
            model_dir=tmp_path,
            directory=tmp_path,
            emit=Meter().update,
            stop=NEVER,
            seats=Seats("vectors"),
        )
