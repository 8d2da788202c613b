"""The 4-bit codec of sync points: its error, its size, and that what it loses is not lost over many sync points."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.policies.sync_points import BLOCK, BLOCK_BYTES, SyncMembers, coded_bytes, range_bounds, token_weights
from moedisco_ray.training.sync import coded
from moedisco_ray.training.sync.codec import NoCodesError, decode, encode
from moedisco_ray.training.sync.coded import CodedWeights, combine_coded
from moedisco_ray.training.sync.combine import common_tensors
from moedisco_ray.training.sync.files import SyncPoint
from moedisco_ray.training.sync.layout import Layout
from moedisco_ray.training.sync.outer_step import outer_update

Tensors = dict[str, Tensor]
OUTER = Outer(lr=0.7, momentum=0.6)
SHAPES = {"a": (40, 33), "b": (7,), "c": (3, 500)}
ROUNDING = 1 + 1e-6


def values(seed: int, elements: int, exponent: float = 0.0) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * 10**exponent


# --- one block


def test_a_block_by_hand() -> None:
    given_N = torch.tensor([14.0, -14.0, 1.0, 3.0, -5.0, 0.0])
    codes_C = encode(given_N)
    # The scale is 14 / 7 = 2; halves are rounded to the even code: 7, -7, 0, 2, -2, 0.
    assert codes_C[:4].view(torch.float32).item() == 2.0
    assert codes_C[4:7].tolist() == [15 + 16 * 1, 8 + 16 * 10, 6 + 16 * 8]
    assert codes_C[7:].tolist() == [8 + 16 * 8] * (BLOCK // 2 - 3)
    assert decode(codes_C, 6).tolist() == [14.0, -14.0, 0.0, 4.0, -4.0, 0.0]


@given(seed=st.integers(0, 999), elements=st.integers(1, 3 * BLOCK), exponent=st.floats(-30, 30))
def test_a_code_is_at_most_half_a_scale_away(seed: int, elements: int, exponent: float) -> None:
    given_N = values(seed, elements, exponent)
    codes_C = encode(given_N)
    assert codes_C.dtype == torch.uint8
    assert len(codes_C) == coded_bytes(elements) == -(-elements // BLOCK) * BLOCK_BYTES
    found_N = decode(codes_C, elements)
    for first in range(0, elements, BLOCK):
        block_N, decoded_N = given_N[first : first + BLOCK], found_N[first : first + BLOCK]
        assert (block_N - decoded_N).abs().max() <= block_N.abs().max() / 14 * ROUNDING


def test_the_codes_of_a_block_do_not_depend_on_the_others() -> None:
    given_N = values(0, 5 * BLOCK - 9)
    cut = torch.cat([encode(given_N[: 2 * BLOCK]), encode(given_N[2 * BLOCK :])])
    assert torch.equal(cut, encode(given_N))


def test_blocks_of_zeros_and_of_the_smallest_numbers_have_codes() -> None:
    for smallest in (0.0, 1e-45, 1e-44, 1e-38):
        given_N = torch.full((BLOCK,), smallest)
        found_N = decode(encode(given_N), BLOCK)
        assert found_N.isfinite().all()
        assert (found_N - given_N).abs().max() <= smallest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    given_N = values(0, 600)
    given_N[300] = value
    with pytest.raises(NoCodesError, match="not finite"):
        encode(given_N)


@given(seed=st.integers(0, 99), syncs=st.integers(1, 40))
def test_over_many_sync_points_only_the_last_residual_is_missing(seed: int, syncs: int) -> None:
    residual_N, exact_N, sent_N = torch.zeros(500), torch.zeros(500).double(), torch.zeros(500).double()
    largest = 0.0
    for sync in range(syncs):
        change_N = values(seed + 1000 * sync, 500).clamp(-3, 3)
        largest = max(largest, float(change_N.abs().max()))
        wanted_N = change_N + residual_N
        decoded_N = decode(encode(wanted_N), 500)
        residual_N = wanted_N - decoded_N
        exact_N += change_N
        sent_N += decoded_N
    torch.testing.assert_close(sent_N + residual_N, exact_N, rtol=0, atol=1e-5)
    # r <= (v + r) / 14 for the largest |v|, so r <= v / 13, after however many sync points
    assert residual_N.abs().max() <= largest / 13 * ROUNDING


# --- sync points on files


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


class Members:
    """Members of sync points whose weights change by noise; all of them are combined unless some are late."""

    def __init__(self, home: Path, ranges: int, dtype: torch.dtype = torch.float32, outer: Outer = OUTER) -> None:
        self.home, self.ranges, self.outer, self.dtype = home, ranges, outer, dtype
        self.start, self.names, self.tokens = drawn(0), ("a", "b", "c"), {"a": 3, "b": 1, "c": 2}
        self.models = {name: self.begun() for name in self.names}
        self.coded = {name: self.made(name) for name in self.names}
        self.number = 0

    def begun(self) -> Tensors:
        return {key: each.to(self.dtype, copy=True) for key, each in self.start.items()}

    def made(self, name: str) -> CodedWeights:
        """What a member keeps, as it begins."""
        return CodedWeights(Layout.of(self.models[name]), lambda: self.start)

    def restarted(self, name: str) -> None:
        """Lose what a member has in memory, and load its checkpoint."""
        saved = {key: tensor.clone() for key, tensor in self.coded[name].saved.items()}
        self.coded[name] = self.made(name)
        for key, tensor in self.coded[name].saved.items():
            tensor.copy_(saved[key])

    def train(self) -> None:
        for place, name in enumerate(self.names):
            noise = drawn(100 + 10 * self.number + place)
            for key, tensor in self.models[name].items():
                tensor.sub_((0.1 * noise[key] - 0.02).to(self.dtype))

    def publish(self) -> SyncPoint:
        self.number += 1
        point = SyncPoint(self.home, self.number)
        for name in self.names:
            self.coded[name].publish(point, name, self.models[name], self.ranges, self.tokens[name])
        return point

    def combine(self, point: SyncPoint, order: Sequence[int], late: tuple[str, ...] = ()) -> None:
        ready = tuple(name for name in self.names if name not in late)
        arrivals = {each.name: each for each in point.arrivals(self.names)}
        roster, files = point.record_roster(SyncMembers(ready, late), arrivals, self.ranges), dict[str, Entry]()
        for turn, place in enumerate(order):
            name = self.names[turn % 3]
            common_N = self.coded[name].common(point.previous)
            layout = Layout.of(self.models[name])
            files |= combine_coded(point, place, roster, layout, common_N, self.outer, {"model_type": "any"})
        point.complete(roster, files)

    def load(self, point: SyncPoint) -> None:
        for name in self.names:
            self.coded[name].load(point, self.models[name], took_part=point.has_combined(name))
        point.clean_up()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_ranges_in_any_order_and_restarts_give_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members that live add updates; restarted ones read the common weights."""
    read, of = [], common_tensors
    monkeypatch.setattr(coded, "common_tensors", lambda point: read.append(point) or of(point))
    one, other = Members(tmp_path / "one", 1, dtype), Members(tmp_path / "other", 3, dtype)
    dice = random.Random(0)
    for _ in range(4):
        for group, order in ((one, [0, 0]), (other, [2, 0, 1, 2])):
            group.train()
            point = group.publish()
            if group is other:
                other.restarted(dice.choice(other.names))
            group.combine(point, order)
            if group is other:
                other.restarted(dice.choice(other.names))
            else:
                assert not read
            group.load(point)
            if group is one:
                assert not read
                expected = flat(one.models["a"])
        assert read or point.number == 1  # before it, common weights are those of the start
        assert all(torch.equal(flat(model), expected) for group in (one, other) for model in group.models.values())
        assert torch.equal(flat(dict(of(point))).to(dtype), expected)
        for name in one.names:
            assert torch.equal(one.coded[name].residual_N, other.coded[name].residual_N)
        read.clear()


def test_it_is_the_outer_step_on_decoded_changes_and_the_residuals_are_all_that_is_missing(tmp_path: Path) -> None:
    group, shares = Members(tmp_path, 2), token_weights([3, 1, 2])
    elements = len(flat(group.start))
    common_N, momentum_N = flat(group.start), torch.zeros(elements)
    kept = [torch.zeros(elements) for _ in group.names]
    lost_N, exact_N, applied_N = torch.zeros(elements).double(), torch.zeros(elements).double(), flat(group.start)
    deltas_N = torch.zeros(3, elements).double()
    sent_N = torch.zeros(3, elements).double()
    for _ in range(5):
        group.train()
        changes = [common_N - flat(group.models[name]) for name in group.names]
        wanted = [change_N + own_N for change_N, own_N in zip(changes, kept, strict=True)]
        decoded = [decode(encode(each), elements) for each in wanted]
        kept = [each - sent for each, sent in zip(wanted, decoded, strict=True)]
        deltas_N += torch.stack(changes)
        sent_N += torch.stack(decoded)
        update_N, momentum_N = outer_update(decoded, shares, momentum_N, OUTER)
        exact_N += update_N
        after_N = common_N + decode(encode((update_N + lost_N).float()), elements)
        lost_N = (common_N.double() + update_N + lost_N - after_N.double()).float().double()
        common_N = after_N
        point = group.publish()
        group.combine(point, [0, 1])
        group.load(point)
        assert torch.equal(flat(group.models["b"]), common_N)
        for name, own_N in zip(group.names, kept, strict=True):
            assert torch.equal(group.coded[name].residual_N, own_N)
    # Nothing has drifted: both differ by what is kept for the next sync point alone.
    torch.testing.assert_close(common_N.double() + lost_N, applied_N.double() + exact_N, rtol=0, atol=1e-6)
    torch.testing.assert_close(sent_N + torch.stack(kept), deltas_N, rtol=0, atol=1e-5)
    stored_N = torch.cat([torch.from_file(str(path), size=path.stat().st_size // 4) for path in ranges_of(point)])
    assert torch.equal(stored_N.double(), lost_N)


def ranges_of(point: SyncPoint) -> list[Path]:
    return sorted(point.path("residual").iterdir())


def test_a_member_writes_and_reads_less_than_15_percent_of_float32(tmp_path: Path) -> None:
    group = Members(tmp_path, 3)
    group.train()
    point = group.publish()
    exact = 4 * len(flat(group.start))
    assert all(point.path(f"members/{name}.bin").stat().st_size <= 0.15 * exact for name in group.names)
    group.combine(point, [0, 1, 2])
    assert sum(path.stat().st_size for path in point.path("update").iterdir()) <= 0.15 * exact
    assert sum(path.stat().st_size for path in point.path("common").glob("*.bin")) == exact


def test_without_momentum_none_is_stored(tmp_path: Path) -> None:
    group = Members(tmp_path, 2, outer=Outer(lr=1.0, momentum=0.0))
    for _ in range(2):
        group.train()
        point = group.publish()
        group.combine(point, [1, 0])
        group.load(point)
    assert sorted(path.name for path in point.path("").iterdir()) == ["common", "residual", "sync.json", "update"]


@pytest.mark.parametrize("restarts", [False, True])
def test_the_change_of_a_late_member_is_lost_with_its_residual(tmp_path: Path, restarts: bool) -> None:
    group = Members(tmp_path, 2)
    for late in ((), ("b",)):
        group.train()
        point = group.publish()
        group.combine(point, [0, 1], late)
        if restarts:
            group.restarted("b")
        group.load(point)
    assert torch.equal(flat(group.models["b"]), flat(group.models["a"]))
    assert not group.coded["b"].residual_N.any()
    assert group.coded["a"].residual_N.any()


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    group = Members(tmp_path, 2)
    group.models["a"]["c"][1, 2] = float("nan")
    with pytest.raises(NoCodesError):
        group.publish()
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("kind", ["members/a.bin", "residual/0001.bin", "momentum/0001.bin", "update/0001.bin"])
def test_a_damaged_file_of_codes_is_found(tmp_path: Path, kind: str) -> None:
    group = Members(tmp_path, 2)
    group.train()
    first = group.publish()
    group.combine(first, [0, 1])
    group.load(first)
    group.train()
    second, is_update = group.publish(), kind.startswith("update")
    if is_update:
        group.combine(second, [0, 1])
    damaged = next(path for path in (second.path(kind), first.path(kind)) if path.exists())
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # of the second range
    damaged.write_bytes(content)
    with pytest.raises(DamagedError, match=damaged.name):
        group.load(second) if is_update else group.combine(second, [0, 1])
    assert is_update or not second.path("common/0001.bin").exists()


@given(elements=st.integers(0, 10_000), ranges=st.integers(1, 70), block=st.integers(1, 300))
def test_ranges_begin_at_blocks(elements: int, ranges: int, block: int) -> None:
    bounds = range_bounds(elements, ranges, block)
    assert [a for a, _ in bounds] + [elements] == [0] + [b for _, b in bounds]
    assert all(a % block == 0 or a == elements for a, _ in bounds)
    blocks = [-(-(b - a) // block) for a, b in bounds]
    assert max(blocks) - min(blocks) <= 1
