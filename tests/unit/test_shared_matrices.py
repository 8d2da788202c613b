"""Workers of a gang share what Muon computes: nothing is computed twice, all have about as much, and no bit changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from gang_processes import processes
from hypothesis import given
from hypothesis import strategies as st
from shared_matrices_worker import compare

from moedisco_ray.plan.memory import _MUON_EXCHANGE_BYTES
from moedisco_ray.plan.muon_flops import newton_schulz_flops
from moedisco_ray.training.shared_matrices import owners

SHAPES = [(7, 5), (16, 16), (4, 9), (1, 6), (16, 16), (2, 8), (24, 3)]


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_gang_computes_each_matrix_once_with_the_bits_that_each_worker_computed(tmp_path: Path, workers: int) -> None:
    """Before: each of W workers computed all matrices, 14 in all for two workers.

    Before: updates, what was sent, what was received and the results were in memory together, 24 bytes per element.
    """
    arguments = (workers, tmp_path / "rendezvous", SHAPES, tmp_path / "found")
    gang = [processes().Process(target=compare, args=(rank, *arguments)) for rank in range(workers)]
    for process in gang:
        process.start()
    for process in gang:
        process.join(60)
    found = [(tmp_path / f"found.{rank}").read_text().split() for rank in range(workers)]
    assert [same for same, *_ in found] == ["True"] * workers
    assert sum(int(computed) for _, computed, _ in found) == len(SHAPES)
    assert max(float(memory) for *_, memory in found) < 1.1 * _MUON_EXCHANGE_BYTES


@given(
    shapes=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=20),
    workers=st.integers(1, 8),
)
def test_no_worker_has_more_to_compute_than_the_mean_and_one_matrix(
    shapes: list[tuple[int, int]], workers: int
) -> None:
    costs = [newton_schulz_flops(*shape) for shape in shapes]
    of_worker = owners(shapes, workers)
    loads = [0.0] * workers
    for cost, owner in zip(costs, of_worker, strict=True):
        loads[owner] += cost
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / workers + max(costs)
