"""Families that are not supported although people ask for them, each with the reason."""

from collections.abc import Mapping

_GEMMA3 = (
    "its layers have four norms and GELU, and alternate between windows and the whole text, with other positions in "
    "each, which no supported family has"
)

REFUSED: Mapping[str, str] = {
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "smollm3": (
        "every fourth of its layers has no rotary positions, "
        "and all attention layers of the supported families have them"
    ),
}
"""Reason by `model_type`. It completes the sentence "is not supported, because ..."."""
