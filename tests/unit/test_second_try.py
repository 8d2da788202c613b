"""Merge and evaluation that run out of a card's memory are tried once more, with smaller batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import RunError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.calibration_text import in_smaller_batches
from moedisco_ray.stages.context import Context


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def context(tmp_path: Path, events: list[Event]) -> Context:
    config = check_config({"name": "x", "output": str(tmp_path), "corpus": {"sources": [{"path": "embedded"}]}})
    return Context(config, tmp_path, "0" * 64, events.append, LocalBackend())


ROOM = 8


def on_a_small_card(*, rows: int, error: type[Exception] = torch.OutOfMemoryError) -> int:
    """There is no room for more than eight rows."""
    if rows > ROOM:
        raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
    return rows


def warnings(events: Sequence[Event]) -> list[str]:
    return [event.data["message"] for event in events if event.type == "warning"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RunError])  # here, and on a worker of Ray
def test_a_second_call_has_smaller_arguments_and_a_warning(context: Context, events: list[Event], error: Any) -> None:
    """Before: the error ended the run."""
    found = context.call(None, Files(), on_a_small_card, rows=16, error=error, smaller={"rows": 4})
    assert found == 4
    [message] = warnings(events)
    assert message.startswith("on_a_small_card ran out of memory and is tried once more with less: CUDA out of memory")


def test_what_fits_is_called_once(context: Context, events: list[Event]) -> None:
    assert context.call(None, Files(), on_a_small_card, rows=8, smaller={"rows": 4}) == 8
    assert warnings(events) == []


@pytest.mark.parametrize(("rows", "smaller"), [(16, None), (40, {"rows": 10})])
def test_there_is_no_third_call(context: Context, rows: int, smaller: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        context.call(None, Files(), on_a_small_card, rows=rows, smaller=smaller)


def test_another_error_is_not_tried_again(context: Context, events: list[Event]) -> None:
    def fails(*, rows: int) -> int:
        raise RuntimeError(f"{rows} rows are wrong")

    with pytest.raises(RuntimeError, match="16 rows are wrong"):
        context.call(None, Files(), fails, rows=16, smaller={"rows": 4})
    assert warnings(events) == []


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5))
def test_smaller_batches_have_the_same_windows_in_their_order(sizes: list[int]) -> None:
    batches = [(np.arange(32 * n).reshape(n, 32) + 1000 * k, np.full(n, k)) for k, n in enumerate(sizes)]
    smaller = in_smaller_batches(batches)
    assert max(len(cluster_B) for _, cluster_B in smaller) <= -(-max(sizes) // 4)
    for whole, parts in zip(zip(*batches, strict=True), zip(*smaller, strict=True), strict=True):
        assert np.array_equal(np.concatenate(whole), np.concatenate(parts))
