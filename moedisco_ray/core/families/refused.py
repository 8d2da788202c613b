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
    "afmoe": (
        "its layers have four norms, and alternate between windows and the whole text, the latter without "
        "rotary positions, which no supported family has"
    ),
    "deepseek_v32": _INDEXER,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "glm_moe_dsa": _INDEXER,
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_moe": (
        "its shared expert must be as large as one routed expert, so that no start could be divided, and its published "
        "configuration has a list with the number of experts per token of each layer"
    ),
    "kimi_linear": (
        "most of its layers are Kimi Delta Attention, and the recurrent layers of the supported families are Gated "
        "DeltaNet"
    ),
    "lfm2_moe": (
        "most of its layers are short convolutions, and the recurrent layers of the supported families are Gated "
        "DeltaNet"
    ),
    "llama4_text": "its router scales the input of its experts, and those of the supported families scale their output",
    "nemotron_h": _MAMBA,
    "olmo3": (
        "most of its layers attend within a window, and its relative flex_olmo attends to the whole text in every layer"
    ),
    "phi3": (
        "its queries, keys and values are stored as one tensor, and its gate and up projection as another, which no "
        "dense start of a supported family has"
    ),
    "smollm3": (
        "every fourth of its layers has no rotary positions, "
        "and all attention layers of the supported families have them"
    ),
}
"""Reason by `model_type`. It completes the sentence "is not supported, because ..."."""
