"""Pages of mapped files are mapped at once, and tensors of any kind stay what they are."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moedisco_ray.models.mapped_pages import map_pages, read_soon

BYTES = 8 * 1024**2
LINUX = tuple(int(part) for part in platform.release().split(".")[:2]) if platform.system() == "Linux" else (0, 0)


def mapped_bytes(path: Path) -> int:
    """Size of the mapped pages of a file in this process."""
    regions = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(path))[1:]
    return sum(int(region.split("Rss:")[1].split()[0]) for region in regions) * 1024


@pytest.mark.skipif(LINUX < (5, 14), reason="Linux before 5.14 maps pages one after the other")
def test_all_pages_of_a_tensor_are_mapped_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(BYTES, dtype=torch.uint8)}, path)
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor("x")
        assert mapped_bytes(path) < BYTES / 2
        map_pages(tensor)
        assert mapped_bytes(path) >= BYTES
        assert int(tensor.sum()) == BYTES


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0),
        torch.empty(0),
        torch.tensor(1.0),
        torch.arange(12.0).view(3, 4).T,
        torch.empty(3, device="meta"),
    ],
)
def test_other_tensors_stay_as_they_are(tensor: torch.Tensor) -> None:
    assert map_pages(tensor) is tensor
    if tensor.device.type == "cpu":
        before = tensor.clone()
        read_soon([tensor])
        assert torch.equal(tensor, before)
