"""Commented starting configurations, as the package carries them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

PresetName = Literal["demo", "paper", "default"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


def preset_text(name: PresetName) -> str:
    """The YAML text of a preset, comments included."""
    return (files("moedisco_ray.core.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def local_gpus(driver: Path = Path("/proc/driver/nvidia/gpus"), compute: Path = Path("/sys/class/kfd/kfd/topology/nodes")) -> int:
    """GPUs of this machine, as the NVIDIA or AMD driver lists them; asked of the kernel, since torch takes seconds to import.

    Args:
        driver: Where NVIDIA's driver has a folder per GPU.
        compute: Where AMD's driver has a folder per processor; the GPUs among them have a `gpu_id` that is not 0.
    """
    nvidia = len(list(driver.iterdir())) if driver.is_dir() else 0
    amd = sum(path.read_text(encoding="ascii").strip() != "0" for path in compute.glob("*/gpu_id"))
    return nvidia + amd
