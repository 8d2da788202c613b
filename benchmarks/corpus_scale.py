"""How the corpus and cluster stages grow with the text.

assignment   cluster synthetic documents whose vectors are in files of 100,000, balance the clusters, and write every
             document's cluster; the driver and the tasks are processes of their own, and the peak memory of each is
             measured
corpus       the whole corpus stage on one core, with a tokenizer that exists already, against `tokenizers` alone on the
             same texts
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.harness import by_arm, environment, interleave, ratios, spread, write_result
from moedisco_ray.core.config import check_config
from moedisco_ray.core.limits import BALANCE_DOCUMENTS, CENTROID_DOCUMENTS
from moedisco_ray.core.store.run_store import SHARED
from moedisco_ray.stages.clustering.balance import Assignment, Loads, fit_assignment
from moedisco_ray.stages.clustering.kmeans import fit_kmeans
from moedisco_ray.stages.clustering.packing import CountLoads, Part, loads_in
from moedisco_ray.stages.clustering.store import clusters_in, first_costs, first_vectors
from moedisco_ray.stages.corpus import build
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe

CLUSTERS, DIMENSIONS, FILE_DOCUMENTS, CAPACITY = 64, 64, 100_000, 1.05
VOCABULARY, SEQUENCE = 4096, 1024
ARM_MEGABYTES = 600
"""Text that an arm reads of each size, in as many rounds as that takes (MB)."""


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def write_vectors(file: int, files: int, centroids_KD: NDArray[np.float64], directory: Path) -> Path:
    """One vector file: documents around the centroids, in clusters of unequal size, with ids in the file's range."""
    generator = np.random.Generator(np.random.Philox(key=[0, file]))
    shares_K = np.random.default_rng(1).dirichlet(np.full(CLUSTERS, 3.0))
    near_ND = centroids_KD[generator.choice(CLUSTERS, FILE_DOCUMENTS, p=shares_K)]
    x_ND = near_ND + generator.normal(size=(FILE_DOCUMENTS, DIMENSIONS))
    low, high = (edge * 2**32 // files for edge in (file, file + 1))
    ids = np.sort(generator.integers(low, high, FILE_DOCUMENTS)).astype(">u4").view(np.uint8).reshape(-1, 4)
    rest = generator.integers(0, 256, (FILE_DOCUMENTS, 12)).astype(np.uint8)
    raw = np.concatenate([ids, rest], axis=1).tobytes()
    path = directory / f"part-{file:05d}.parquet"
    pq.write_table(
        pa.table(
            {
                "id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), FILE_DOCUMENTS, [None, pa.py_buffer(raw)]),
                "weight": generator.integers(50, 2000, FILE_DOCUMENTS),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.astype(np.float32).ravel()), DIMENSIONS),
            }
        ),
        path,
        row_group_size=8192,
    )  # as the stage writes them
    return path


def count_file(path: Path, rule: Assignment) -> tuple[Loads, float]:
    counted = pa.concat_tables(CountLoads(rule, SHARED)(Part(0, path, path)))
    return loads_in(counted, len(rule.prices_E)), peak_mb()


def assign_file(path: Path, rule: Assignment, directory: Path) -> tuple[NDArray[np.int64], float]:
    """Write the clusters of a file's documents; return the tokens of each cluster."""
    table = pq.read_table(path, columns=["id", "weight"])
    clusters_N = clusters_in(path, rule)
    pq.write_table(pa.table({"id": table["id"], "cluster": clusters_N.astype(np.int32)}), directory / path.name)
    return np.bincount(clusters_N, table["weight"].to_numpy(), minlength=CLUSTERS).astype(np.int64), peak_mb()


def measure_assignment(documents: int, workers: int) -> dict[str, Any]:
    centroids_KD = np.random.default_rng(2).normal(size=(CLUSTERS, DIMENSIONS)) * 0.6
    files = documents // FILE_DOCUMENTS
    peaks: list[float] = [0.0]
    passes = 0
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=50) as pool,
    ):
        vectors, assigned = Path(scratch) / "vectors", Path(scratch) / "assigned"
        vectors.mkdir()
        assigned.mkdir()
        write = functools.partial(write_vectors, files=files, centroids_KD=centroids_KD, directory=vectors)
        paths = list(pool.map(write, range(files)))
        before = peak_mb()

        def loads(rule: Assignment) -> Loads:
            nonlocal passes
            passes += 1
            answers, found = zip(*pool.map(functools.partial(count_file, rule=rule), paths), strict=True)
            peaks.extend(found)
            return Loads(*np.sum(answers, axis=0))

        started = time.perf_counter()
        sample = min(BALANCE_DOCUMENTS, documents)
        fit = fit_kmeans(first_vectors(paths, CENTROID_DOCUMENTS * CLUSTERS), CLUSTERS)
        clustered = time.perf_counter()
        costs = first_costs(paths, sample, None, fit.centroids_KD)
        rule, _ = fit_assignment(costs, loads, None, fit.centroids_KD, documents=documents, capacity=CAPACITY)
        fitted = time.perf_counter()
        tokens, found = zip(
            *pool.map(functools.partial(assign_file, rule=rule, directory=assigned), paths), strict=True
        )
        tokens_E = np.sum(tokens, axis=0)
        return {
            "documents": documents,
            "driver_peak_mb": peak_mb(),
            "driver_before_mb": before,
            "task_peak_mb": max(*peaks, *found),
            "load_passes": passes,
            "kmeans_seconds": clustered - started,
            "fit_seconds": fitted - clustered,
            "assign_seconds": time.perf_counter() - fitted,
            "largest_over_mean": float(tokens_E.max() / tokens_E.mean()),
        }


def sentences(seed: int) -> Iterator[str]:
    """Endless documents of about 2 KB: frequent and rare made-up words, as in a natural text."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 7]))
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    chances = 1.0 / np.arange(1, len(letters) + 1)
    words = np.array(
        ["".join(generator.choice(letters, n, p=chances / chances.sum())) for n in generator.integers(2, 10, 20_000)]
    )
    likely = 1.0 / np.arange(1, len(words) + 1)
    likely /= likely.sum()
    while True:
        for row in generator.choice(words, (256, 330), p=likely):
            yield " ".join(row) + "."


def write_corpus(directory: Path, size: int) -> None:
    """JSON Lines of `size` bytes in files of 50 MB."""
    texts = sentences(0)
    for number in itertools.count():
        room = min(size, 50_000_000)
        if room <= 0:
            return
        size -= room
        with (directory / f"text-{number:03d}.jsonl").open("w", encoding="utf-8") as file:
            while room > 0:
                room -= file.write(json.dumps({"text": next(texts)}) + "\n")


def measure_corpus(arm: str, megabytes: int, text: Path) -> dict[str, float]:
    """Tokenize the texts in one thread; the tokenizer is next to their directory."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = text.parent / "tokenizer"
    with tempfile.TemporaryDirectory() as scratch:
        started, cpu = time.perf_counter(), time.process_time()
        if arm == "stage":
            config = check_config(
                {
                    "name": "scale",
                    "corpus": {"sources": [{"path": str(text)}], "sequence_length": SEQUENCE},
                    "tokenizer": {"path": str(tokenizer)},
                }
            )
            tokens = build(config, Path(scratch))["tokens"]
        else:
            tokens = bare(sorted(text.iterdir()), tokenizer)
        spent, seconds = time.process_time() - cpu, time.perf_counter() - started
        return {"mb_per_core_second": megabytes / spent, "seconds": seconds, "tokens": tokens, "peak_mb": peak_mb()}


def bare(paths: list[Path], directory: Path) -> int:
    """Tokens of all texts, by the library alone."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = 0
    for path in paths:
        with path.open(encoding="utf-8") as file:
            while rows := list(itertools.islice(file, 512)):
                encoded = tokenizer.encode_batch_fast(
                    [json.loads(row)["text"] for row in rows], add_special_tokens=False
                )
                tokens += sum(len(encoding.ids) for encoding in encoded)
    return tokens


def corpus_cell(megabytes: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        write_corpus(text, megabytes * 1_000_000)
        save_trained(train_bpe(itertools.islice(sentences(1), 2000), VOCABULARY), text.parent / "tokenizer")
        found = interleave(__spec__.name, ["stage", "bare"], rounds, "--size", str(megabytes), "--text", str(text))
    speeds = by_arm(found, "mb_per_core_second")
    return {
        "mb_per_core_second": {arm: spread(values) for arm, values in speeds.items()},
        "stage_over_bare": ratios(speeds["stage"], speeds["bare"]),
        "peak_mb": statistics.median(result["peak_mb"] for result in found["stage"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["assignment", "stage", "bare"])
    parser.add_argument("--size", type=int, default=0, help="documents of the assignment, megabytes of the corpus")
    parser.add_argument("--text", type=Path, help="directory of the corpus")
    parser.add_argument("--documents", type=int, nargs="*", default=[1_000_000, 5_000_000])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[200, 800, 2000])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.arm == "assignment":
        print(json.dumps(measure_assignment(arguments.size, arguments.workers)))
        return
    if arguments.arm:
        print(json.dumps(measure_corpus(arguments.arm, arguments.size, arguments.text)))
        return
    result: dict[str, Any] = {
        **environment(shlex.join(["python", "-m", "benchmarks.corpus_scale", *sys.argv[1:]])),
        "setting": {
            "clusters": CLUSTERS,
            "dimensions": DIMENSIONS,
            "capacity": CAPACITY,
            "workers": arguments.workers,
            "text_per_arm": ARM_MEGABYTES,
            "vocabulary": VOCABULARY,
            "sequence_length": SEQUENCE,
        },
        "targets": {"driver_peak_mb": 1000, "stage_over_bare": 0.8},
        "assignment": [],
        "corpus": {},
    }
    for documents in arguments.documents:
        sizes = "--size", str(documents), "--workers", str(arguments.workers)
        result["assignment"] += interleave(__spec__.name, ["assignment"], 1, *sizes)["assignment"]
        write_result("corpus_scale", result)
    for megabytes in arguments.megabytes:
        result["corpus"][str(megabytes)] = corpus_cell(megabytes, max(1, ARM_MEGABYTES // megabytes))
        write_result("corpus_scale", result)


if __name__ == "__main__":
    main()
