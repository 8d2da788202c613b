"""The optimizer steps of each training of a phase. The plan prices them and the run makes them."""

from __future__ import annotations

from collections.abc import Sequence

from moedisco_ray.core.config import Optimizer


def unit_steps(tokens: int, optimizer: Optimizer, sizes: Sequence[int] = (1,)) -> list[int]:
    """Divide the whole batches of a phase among its trainings, in proportion to their sizes.

    A training whose share is less than one step makes one. Each of the others makes its share of the remaining steps,
    rounded down, or up where the remainder is largest. So the steps sum to the phase's batches, unless there are fewer
    batches than trainings, which `RunConfig` refuses.

    Args:
        tokens: Training tokens of the phase.
        optimizer: Settings of the optimizer, with the tokens of a batch.
        sizes: Size of each training, such as the tokens of its cluster; their sum is above 0.

    Returns:
        Steps of each training. Where trainings are equal, those with one step more come first.
    """
    left, whole = max(tokens // optimizer.batch_tokens, len(sizes)), sum(sizes)
    steps = [1] * len(sizes)
    shared = sorted(range(len(sizes)), key=lambda k: -sizes[k])
    while left * sizes[shared[-1]] < whole:
        left, whole = left - 1, whole - sizes[shared.pop()]
    for k in shared:
        steps[k] = left * sizes[k] // whole
    for k in sorted(shared, key=lambda k: -(left * sizes[k] % whole))[: left - sum(steps[k] for k in shared)]:
        steps[k] += 1
    return steps
