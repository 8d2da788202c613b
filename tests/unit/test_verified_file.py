"""Files of checkpoints whose blocks are verified as they are read."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moedisco_ray.core.errors import StorageError
from moedisco_ray.training import World
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.checkpoints.manifest import BLOCK_BYTES, Checksum, HashingStream
from moedisco_ray.training.checkpoints.storage import Storage
from moedisco_ray.training.checkpoints.verified_file import VerifiedFile

MIB = 2**20
NAME = "__0_0.distcp"


def checksum_of(pieces: list[bytes], block_bytes: int) -> Checksum:
    stream = HashingStream(io.BytesIO(), block_bytes)
    for piece in pieces:
        stream.write(piece)
    return stream.checksum


@given(pieces=st.lists(st.binary(max_size=40), max_size=6), block_bytes=st.integers(1, 50))
def test_a_checksum_does_not_depend_on_how_the_bytes_were_written(pieces: list[bytes], block_bytes: int) -> None:
    data = b"".join(pieces)
    found = checksum_of(pieces, block_bytes)
    assert found == checksum_of([data], block_bytes)
    blocks = [data[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
    assert len(found.blocks) == len(blocks)
    assert all(found.matches(index, block) for index, block in enumerate(blocks))
    assert not any(
        found.matches(index, block + b"x") or found.matches(index, block[:-1]) for index, block in enumerate(blocks)
    )


@given(
    data=st.binary(max_size=200),
    block_bytes=st.integers(1, 60),
    steps=st.lists(
        st.tuples(st.integers(-20, 220), st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]), st.integers(0, 90))
    ),
)
def test_it_reads_as_any_file(data: bytes, block_bytes: int, steps: list[tuple[int, int, int]]) -> None:
    checksum = checksum_of([data], block_bytes)

    def block(index: int) -> bytes:
        positions = checksum.block(index)
        return data[positions.start : positions.stop]

    ours, theirs = io.BufferedReader(VerifiedFile(checksum, block), 16), io.BytesIO(data)
    for offset, whence, size in steps:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: theirs.tell(), io.SEEK_END: len(data)}[whence]
        if base + offset >= 0:
            assert ours.seek(offset, whence) == theirs.seek(offset, whence)
        assert ours.read(size) == theirs.read(size)
        assert ours.tell() == theirs.tell()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Storage, nn.Module, torch.optim.Optimizer]:
    """A checkpoint of 8 tensors of 16 MiB each."""
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters())
    storage = Storage(tmp_path / "steps", tmp_path / "key")
    checkpoint.write(storage, checkpoint.state_of(model, optimizer), Progress(step=1), 1, World())
    return storage, model, optimizer


def test_a_load_has_two_blocks_in_memory(saved: tuple[Storage, nn.Module, torch.optim.Optimizer]) -> None:
    storage, model, optimizer = saved
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tracemalloc.start()  # of Python's memory, without tensors
    try:
        checkpoint.load(storage, 1, model, optimizer, World())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected, strict=True))
    assert peak < 4 * BLOCK_BYTES < storage.manifest(1)[NAME].size


def test_a_worker_reads_the_blocks_of_its_part_only(
    saved: tuple[Storage, nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    storage, *_ = saved
    checksum = storage.manifest(1)[NAME]
    path = tmp_path / "steps" / "step-0000001" / NAME
    data = np.fromfile(path, np.uint8)
    data[checksum.size // 2] ^= 1
    data.tofile(path)
    damaged = checksum.size // 2 // BLOCK_BYTES
    with storage.open(1, NAME, checksum) as file:
        first = file.read(MIB)
        file.seek(-MIB, io.SEEK_END)
        last = file.read()
        assert (first, last) == (data[:MIB].tobytes(), data[-MIB:].tobytes())
    told = rf"{NAME} of checkpoint step-0000001 in .* is damaged; the checkpoint is deleted"
    with pytest.raises(StorageError, match=told), storage.open(1, NAME, checksum) as file:
        file.seek(damaged * BLOCK_BYTES)
        with pytest.raises(StorageError, match=told):
            file.read(1)  # and leaving the block raises the error again, whatever its reader made of it
    assert storage.steps() == []


def test_damage_in_the_middle_of_a_tensor_is_told_as_such(
    saved: tuple[Storage, nn.Module, torch.optim.Optimizer], tmp_path: Path
) -> None:
    storage, model, optimizer = saved
    path = tmp_path / "steps" / "step-0000001" / NAME
    data = np.fromfile(path, np.uint8)
    data[len(data) // 2] ^= 1
    data.tofile(path)
    with pytest.raises(
        StorageError, match=rf"{NAME} of checkpoint step-0000001 in .* is damaged; the checkpoint is deleted"
    ):
        checkpoint.load(storage, 1, model, optimizer, World())


@pytest.mark.parametrize("damage", ["short", "flipped"])
def test_a_block_that_reads_badly_once_costs_no_checkpoint(
    saved: tuple[Storage, nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    storage, model, optimizer = saved
    get, begins = Storage.get, list[int]()

    def badly_once(self: Storage, name: str, positions: range | None = None) -> bytes:
        data = get(self, name, positions)
        if positions is None or not name.endswith(NAME):
            return data
        begins.append(positions.start)
        if positions.start != 3 * BLOCK_BYTES or begins.count(positions.start) > 1:
            return data
        return data[:-1] if damage == "short" else bytes([data[0] ^ 1]) + data[1:]

    monkeypatch.setattr(Storage, "get", badly_once)
    checkpoint.load(storage, 1, model, optimizer, World())
    assert begins.count(3 * BLOCK_BYTES) == 2
    assert len(begins) == len(set(begins)) + 1, "no other block is read twice"
