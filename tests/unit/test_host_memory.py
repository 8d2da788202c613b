"""Host memory of corpus, cluster and decompose stays below the plan's bounds, and is not far below them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import ctypes, functools, itertools, json, sys
from pathlib import Path
import pyarrow
import torch
from benchmarks import corpus_scale, true_sizes
from moedisco_ray.core.config import Architecture, check_config
from moedisco_ray.models import config_values, hf_config, random_weights, submodel_config
from moedisco_ray.plan.host_memory import cluster_memory, corpus_memory, decompose_memory
from moedisco_ray.plan import host_memory
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.stages.clustering.build import LocalWorkers, build_clusters
from moedisco_ray.stages.clustering.vectors import tfidf
from moedisco_ray.stages.corpus import documents
from moedisco_ray.stages.corpus.build import build
from moedisco_ray.stages.decompose import write_submodels
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe

torch.set_num_threads(1)
documents._FEW_RANGES = 1       # one task holds all text
host_memory.TERM_DIMENSIONS = tfidf.TERM_DIMENSIONS = 256   # vectors as long as those of hidden states
home = Path(sys.argv[1])
save_trained(train_bpe(itertools.islice(corpus_scale.sentences(1), 200), 4096), home / "tokenizer")

def measured(work):
    # What an earlier stage has left in Arrow's pool, up to 195 MB, would hide that much of this one.
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    before = true_sizes.own_mb()
    with true_sizes.own_memory() as peak:
        work()
    return (peak[0] - before) * 2**20

def run(name, size, hidden):
    place = home / name
    for folder in ("text", "corpus", "cluster"):
        (place / folder).mkdir(parents=True)
    corpus_scale.write_corpus(place / "text", size)
    config = check_config({
        "name": "memory", "corpus": {"sources": [{"path": str(place / "text")}], "sequence_length": 512},
        "tokenizer": {"path": str(home / "tokenizer")}, "tokens": {"total": size // 2},
        "model": {"config": {"num_experts": 8}},
        "clusters": {"count": 8, "vectors": "tfidf_svd"}})
    sizes = Architecture(hidden_size=hidden, num_hidden_layers=2, num_experts=8, moe_intermediate_size=hidden)
    whole = config_values(hf_config("qwen3_moe", sizes, 4096, 512, 0))
    part = count_parameters("qwen3_moe", submodel_architecture("qwen3_moe", sizes, 2), 4096)
    found = {}
    tokens = 0
    def corpus():
        nonlocal tokens
        tokens = build(config, place / "corpus")["tokens"]
    found["corpus"] = measured(corpus), corpus_memory(size)
    found["cluster"] = measured(lambda: build_clusters(
        config, place / "corpus", place, place / "cluster", LocalWorkers())), cluster_memory(config, tokens, 4096)
    found["decompose"] = measured(lambda: write_submodels(
        random_weights(whole, 0), whole, 2, place / "parts")), decompose_memory(part)
    return found

run("small", 1_000_000, 64)     # loads what libraries load at first use
print(json.dumps(run("large", 16_000_000, 1024)))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, int]]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path_factory.mktemp("home"))],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    figures: dict[str, tuple[float, int]] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", ["corpus", "cluster", "decompose"])
def test_a_stage_stays_below_its_bound(found: dict[str, tuple[float, int]], stage: str) -> None:
    measured, bound = found[stage]
    assert 0.3 * bound < measured < bound, f"{measured / 2**20:.0f} MiB of at most {bound / 2**20:.0f}"
