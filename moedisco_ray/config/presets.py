"""Commented starting configurations, as the package carries them."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal, get_args

PresetName = Literal["demo", "paper", "default"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


def preset_text(name: PresetName) -> str:
    """The YAML text of a preset, comments included."""
    return (files("moedisco_ray.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
