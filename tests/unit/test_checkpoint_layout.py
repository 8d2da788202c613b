"""The metadata of checkpoints as JSON: what torch planned comes back, and any other form is refused."""

from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from moedisco_ray.training.checkpoints.layout import layout_bytes, read_layout
from moedisco_ray.training.checkpoints.manifest import Checksum

FILES = dict.fromkeys(("__0_0.distcp", "__1_0.distcp"), Checksum(size=1000, block_bytes=1000, blocks=(64 * "0",)))
CHUNK = {"offsets": [0, 0], "shape": [2, 3], "file": "__0_0.distcp", "start": 0, "length": 10}
TENSOR = {"dtype": "float32", "shape": [2, 3], "chunks": [CHUNK]}


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[TensorStorageMetadata, list[tuple[torch.Size, _StorageInfo]]]:
    """A tensor that was cut along its first axis, and where its chunks are stored."""
    shape = torch.Size(draw(st.lists(st.integers(1, 5), max_size=3)))
    cuts = sorted(draw(st.sets(st.integers(1, shape[0] - 1)))) if shape and shape[0] > 1 else []
    bounds = [0, *cuts, shape[0]] if shape else [0, 1]
    chunks, places = [], []
    for begin, end in itertools.pairwise(bounds):
        offsets = torch.Size([begin, *[0] * (len(shape) - 1)] if shape else [])
        chunks.append(ChunkStorageMetadata(offsets, torch.Size([end - begin, *shape[1:]] if shape else [])))
        start, length = draw(st.integers(0, 500)), draw(st.integers(1, 500))
        places.append((offsets, _StorageInfo(draw(st.sampled_from(sorted(FILES))), start, length)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks), places


@given(st.dictionaries(st.text(min_size=1), stored_tensors(), max_size=4))
def test_what_torch_planned_comes_back(stored: dict[str, Any]) -> None:
    tensors = {name: tensor for name, (tensor, _) in stored.items()}
    places = {
        MetadataIndex(name, offsets): place for name, (_, all_places) in stored.items() for offsets, place in all_places
    }
    written = [WriteResult(index, place.length, place) for index, place in places.items()]
    back = read_layout(layout_bytes(Metadata(tensors), written), FILES)
    assert back.state_dict_metadata == tensors
    assert back.storage_data == places


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "load"},
        {"dtype": "torch.float32"},
        {"shape": [2, 2]},
        {"shape": [2]},
        {"shape": [-2, 3]},
        {"shape": ["2", 3]},
        {"chunks": []},
        {"more": 1},
        {"chunks": [{**CHUNK, "file": "../__0_0.distcp"}]},
        {"chunks": [{**CHUNK, "file": "elsewhere"}]},
        {"chunks": [{**CHUNK, "start": 995}]},
        {"chunks": [{**CHUNK, "length": 0}]},
        {"chunks": [{**CHUNK, "offsets": [1, 0]}]},
        {"chunks": [{**CHUNK, "transform_descriptors": ["zstd"]}]},
    ],
)
def test_another_form_is_refused(change: dict[str, Any]) -> None:
    read_layout(json.dumps({"version": 1, "tensors": {"w": TENSOR}}).encode(), FILES)
    with pytest.raises(ValueError, match=r"validation error|outside the checkpoint's files"):
        read_layout(json.dumps({"version": 1, "tensors": {"w": {**TENSOR, **change}}}).encode(), FILES)


def test_another_version_or_a_pickle_is_refused() -> None:
    for data in (b'{"version": 2, "tensors": {}}', b"{}", pickle.dumps(Metadata({})), b""):
        with pytest.raises(ValueError, match="validation error"):
            read_layout(data, FILES)


def test_only_tensors_are_stored() -> None:
    with pytest.raises(TypeError, match=r"optimizer\.lr is no tensor"):
        layout_bytes(Metadata({"optimizer.lr": BytesStorageMetadata()}), [])
