"""Families that are not supported although people ask for them, each with the reason."""

from collections.abc import Mapping

_INDEXER = (
    "its attention reads the tokens that an indexer selects, which transformers computes without gradients, so that no "
    "training could adapt it"
)
_MAMBA = "most of its layers are Mamba-2, and the recurrent layers of the supported families are Gated DeltaNet"
_GEMMA3 = (
    "its layers have four norms and GELU, and alternate between windows and the whole text, with other positions in "
    "each, which no supported family has"
)

REFUSED: Mapping[str, str] = {
    "deepseek_v32": _INDEXER,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "glm_moe_dsa": _INDEXER,
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_moe": (
        "its shared expert must be as large as one routed expert, so that no start could be divided, and its published "
        "configuration has a list with the number of experts per token of each layer"
    ),
    "lfm2_moe": (
        "most of its layers are short convolutions, and the recurrent layers of the supported families are Gated "
        "DeltaNet"
    ),
    "nemotron_h": _MAMBA,
    "smollm3": (
        "every fourth of its layers has no rotary positions, "
        "and all attention layers of the supported families have them"
    ),
}
"""Reason by `model_type`. It completes the sentence "is not supported, because ..."."""
