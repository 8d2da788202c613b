"""Members that combine ranges get the bits of one process that combines everything."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.policies.sync_points import SyncMembers, range_bounds, token_weights
from moedisco_ray.training.sync import combine as combining
from moedisco_ray.training.sync import layout as layouts
from moedisco_ray.training.sync.combine import combine, common_tensors
from moedisco_ray.training.sync.files import SyncPoint
from moedisco_ray.training.sync.layout import Layout

Tensors = dict[str, Tensor]
OUTER = Outer(lr=0.7, momentum=0.9)


# --- the outer step as one process made it, tensor by tensor


def next_momentum(
    start: Tensors, members: Sequence[Tensors], weights: Sequence[float], momentum: Tensors | None
) -> Iterator[tuple[str, Tensor]]:
    for key in start:
        after = torch.zeros_like(start[key], dtype=torch.float64)
        if momentum is not None:
            after = OUTER.momentum * momentum[key].double()
        for weight, member in zip(weights, members, strict=True):
            after += weight * (start[key].to(member[key].dtype).double() - member[key].double())
        yield key, after.float()


def next_common(start: Tensors, momentum: Tensors | None, after: Tensors) -> Iterator[tuple[str, Tensor]]:
    for key in start:
        delta = (1 + OUTER.momentum) * after[key].double()
        if momentum is not None:
            delta -= OUTER.momentum * momentum[key].double()
        yield key, (start[key].double() - OUTER.lr * delta).float()


# --- the same on files, range by range


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4).filter(
    lambda shapes: any(0 not in shape for shape in shapes)
)
DTYPES = st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=4, max_size=4)


def drawn(seed: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{i}": torch.randn(shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }


def synced(
    point: SyncPoint, copies: Mapping[str, Tensors], tokens: Mapping[str, int], start: Tensors, order: Sequence[int]
) -> None:
    """Publish in one order, combine ranges in another one, some twice, and complete the sync point."""
    ranges = max(order) + 1
    arrivals = {
        name: point.publish(name, copies[name], ranges, tokens[name]) for name in sorted(copies, key=lambda n: n[::-1])
    }
    roster = point.record_roster(SyncMembers(tuple(copies)), arrivals, ranges)
    files: dict[str, Entry] = {}
    for place in order:
        files |= combine(
            point, place, point.roster(), Layout.of(next(iter(copies.values()))), start, OUTER, {"model_type": "any"}
        )
    point.complete(roster, files)
    point.clean_up()


@settings(max_examples=25)  # each writes dozens of files
@given(
    seed=st.integers(0, 99),
    shapes=SHAPES,
    dtypes=DTYPES,
    tokens=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    order=st.integers(1, 6).flatmap(
        lambda n: st.tuples(st.permutations(range(n)), st.lists(st.integers(0, n - 1), max_size=2))
    ),
    chunk=st.integers(1, 50),
)
def test_any_division_into_ranges_in_any_order_gives_the_bits_of_one_process(
    seed: int,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    tokens: list[int],
    order: tuple[list[int], list[int]],
    chunk: int,
) -> None:
    names = [f"member-{(k * 7) % 5}" for k in range(len(tokens))]
    common, momentum = drawn(seed, shapes, [torch.float32] * 4), None
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "SYNC_ELEMENTS", chunk)
        for number in (1, 2, 3):
            copies = {name: drawn(seed + 100 * number + k, shapes, dtypes) for k, name in enumerate(names)}
            after = dict(next_momentum(common, list(copies.values()), token_weights(tokens), momentum))
            expected = dict(next_common(common, momentum, after))
            point = SyncPoint(Path(folder), number)
            synced(point, copies, dict(zip(names, tokens, strict=True)), common, [*order[0], *order[1]])
            found = dict(common_tensors(point))
            assert list(found) == list(expected)
            for key, tensor in expected.items():
                assert found[key].shape == tensor.shape
                assert torch.equal(found[key], tensor)
            common, momentum = expected, after


@given(elements=st.integers(0, 10_000), ranges=st.integers(1, 70))
def test_ranges_are_equal_and_cover_everything_once(elements: int, ranges: int) -> None:
    bounds = range_bounds(elements, ranges)
    assert [a for a, _ in bounds] + [elements] == [0] + [b for _, b in bounds]
    sizes = [b - a for a, b in bounds]
    assert max(sizes) - min(sizes) <= 1


@given(shapes=SHAPES, dtypes=DTYPES, cut=st.tuples(st.floats(0, 1), st.floats(0, 1)), chunk=st.integers(1, 50))
def test_segments_are_a_range_in_order_with_one_dtype_each(
    shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], cut: tuple[float, float], chunk: int
) -> None:
    tensors = drawn(0, shapes, dtypes)
    layout = Layout.of(tensors)
    flat_N = torch.cat([tensor.reshape(-1).float() for tensor in tensors.values()])
    start, stop = sorted(round(part * layout.elements) for part in cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "SYNC_ELEMENTS", chunk)
        segments = list(layout.segments(start, stop))
    assert [each.start for each in segments] + [stop] == [start] + [each.stop for each in segments] or start == stop
    data = b"".join(bytes(layouts.as_bytes(tensor)) for tensor in tensors.values())
    for segment in segments:
        assert 0 < segment.stop - segment.start <= chunk
        expected_N = flat_N[segment.start : segment.stop]
        assert torch.equal(layout.read(tensors, segment), expected_N)
        end = layout.offset(segment.start) + len(expected_N) * segment.dtype.itemsize
        stored_N = torch.frombuffer(bytearray(data[layout.offset(segment.start) : end]), dtype=segment.dtype)
        assert torch.equal(stored_N.float(), expected_N)


# --- kills, damage, and a run at a URI


def test_a_process_killed_while_it_writes_a_range_leaves_nothing_that_counts(tmp_path: Path) -> None:
    start, point = drawn(0, [(50, 3)], [torch.float32]), SyncPoint(tmp_path, 1)
    copies = {name: drawn(k, [(50, 3)], [torch.float32]) for k, name in enumerate("ab", start=1)}
    arrivals = {name: point.publish(name, tensors, 2, 1 + k) for k, (name, tensors) in enumerate(copies.items())}
    point.record_roster(SyncMembers(("a", "b")), arrivals, 2)

    def combined(place: int) -> dict[str, Entry]:
        return combine(point, place, point.roster(), Layout.of(start), start, OUTER, {"model_type": "any"})

    def dies(*_arguments: object) -> tuple[Tensor, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    child = os.fork()
    if not child:
        combining.outer_step = dies  # type: ignore[attr-defined]
        combined(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name[:5] for path in point.path("common").iterdir()] == [".0001"]  # a file that did not appear
    point.complete(point.roster(), {**combined(1), **combined(0)})
    after = dict(next_momentum(start, list(copies.values()), token_weights([1, 2]), None))
    assert torch.equal(dict(common_tensors(point))["t0"], dict(next_common(start, None, after))["t0"])


# --- damage, and a run at a URI


@pytest.mark.parametrize("kind", ["members/a.bin", "common/0001.bin", "momentum/0001.bin", "sync.json"])
def test_no_range_is_combined_from_a_damaged_file(tmp_path: Path, kind: str) -> None:
    start = drawn(0, [(8, 8)], [torch.float32])
    points = [SyncPoint(tmp_path, number) for number in (1, 2)]
    copies = {"a": drawn(1, [(8, 8)], [torch.float32]), "b": drawn(2, [(8, 8)], [torch.float32])}
    synced(points[0], copies, {"a": 1, "b": 2}, start, [0, 1, 2])
    arrivals = {name: points[1].publish(name, tensors, 3, 1) for name, tensors in copies.items()}
    points[1].record_roster(SyncMembers(("a", "b")), arrivals, 3)
    damaged = next(path for path in (points[1].path(kind), points[0].path(kind)) if path.exists())
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamagedError, match=damaged.name):
        combine(points[1], 1, points[1].roster(), Layout.of(start), start, OUTER, {})
    assert not points[1].path("common/0001.bin").exists()


def test_at_a_uri_nothing_is_kept_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path / "cache"))
    start = drawn(0, [(40,), (3, 5)], [torch.float32] * 2)
    copies = {name: drawn(k, [(40,), (3, 5)], [torch.bfloat16] * 2) for k, name in enumerate("ab")}
    made = []
    for store, home in (
        (RunStore.of(f"file://{tmp_path}/uri"), tmp_path / "uri"),
        (RunStore.of(tmp_path / "run"), tmp_path / "run"),
    ):
        for number in (1, 2):
            point = SyncPoint(store.directory / "checkpoints/seed/sync", number, store)
            synced(point, copies, {"a": 1, "b": 2}, start, [1, 0, 2])
        made.append(dict(common_tensors(point)))
        assert (home / "checkpoints/seed/sync/sync-0002/common/0001.bin").exists()
        assert not (home / "checkpoints/seed/sync/sync-0002/members").exists()
    assert all(torch.equal(made[0][key], made[1][key]) for key in start)
    assert not list((tmp_path / "cache").rglob("*.bin"))
