"""The commented example configurations of the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

PresetName = Literal["demo", "paper", "default"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


def preset_text(name: PresetName) -> str:
    """The YAML text of a preset, comments included."""
    return (files("moedisco_ray.core.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def local_gpus(
    driver: Path = Path("/proc/driver/nvidia/gpus"), compute: Path = Path("/sys/class/kfd/kfd/topology/nodes")
) -> int:
    """Number of GPUs that the NVIDIA or AMD driver lists; importing torch to count them would take seconds.

    Args:
        driver: Directory with one folder per NVIDIA GPU.
        compute: Directory with one folder per processor of AMD's driver; GPUs have a `gpu_id` other than 0.
    """
    nvidia = len(list(driver.iterdir())) if driver.is_dir() else 0
    amd = sum(path.read_text(encoding="ascii").strip() != "0" for path in compute.glob("*/gpu_id"))
    return nvidia + amd
