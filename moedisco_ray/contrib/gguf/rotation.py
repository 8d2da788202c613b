"""Rotary positions in a GGUF file: their base, and how they are scaled to longer texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import Family
from moedisco_ray.models.hf import from_values

_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}),
}
"""Parameters that a GGUF file holds, by kind of scaling."""
_GENERAL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_SECTIONS = {"mrope_section", "mrope_interleaved"}
"""Parameters that matter to images alone."""
_LATENT_SCALES = {"mscale", "mscale_all_dim"}
_TRUNCATES = ("truncate", True)
"""The only rounding of `yarn` that llama.cpp has."""


def rotation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a `config.json`, of transformers 4 or 5."""
    return dict(from_values(config).rope_parameters)


def check_rotation(family: Family, config: Mapping[str, Any]) -> None:
    """Check that llama.cpp scales positions as transformers does.

    Raises:
        CheckpointError: It does not.
    """
    rotation = {
        name: value for name, value in rotation_of(config).items() if value is not None and (name, value) != _TRUNCATES
    }
    kind = rotation.get("rope_type", "default")
    if family.gguf is None or kind not in ("default", *family.gguf.scaled_rotation):
        raise CheckpointError(
            "rope_type", kind, f"llama.cpp does not scale positions of {family.name} this way; use `--to hf`"
        )
    known = _GENERAL | _FIELDS[kind] | (_SECTIONS if family.gguf.has_sections else set())
    if family.attention.latent and kind == "yarn":
        if rotation.get("mscale") != rotation.get("mscale_all_dim") or not rotation.get("mscale"):
            found = {name: rotation.get(name) for name in sorted(_LATENT_SCALES)}
            raise CheckpointError("rope_parameters", found, "llama.cpp needs the same factor for both; use `--to hf`")
        known |= _LATENT_SCALES
    if strange := sorted(rotation.keys() - known):
        raise CheckpointError(
            "rope_parameters", strange[0], "is a parameter that GGUF files do not have; use `--to hf`"
        )


def add_rotation(writer: gguf.GGUFWriter, rotation: Mapping[str, Any]) -> None:
    """Add the parameters of the rotary position embedding; those of `llama3` are a tensor, added elsewhere."""
    writer.add_rope_freq_base(float(rotation["rope_theta"]))
    kind = rotation.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(float(rotation["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rotation["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(rotation.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rotation.get("beta_slow") or 1))
        if rotation.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * float(rotation["mscale_all_dim"]))


def add_sections(writer: gguf.GGUFWriter, frequencies: int) -> None:
    """Divide the frequencies evenly among time, height and width, as in Qwen3.5; llama.cpp supports nothing else."""
    writer.add_rope_dimension_sections([(frequencies + 2) // 3, (frequencies + 1) // 3, frequencies // 3, 0])
