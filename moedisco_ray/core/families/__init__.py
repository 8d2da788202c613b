"""Model families: one page per `model_type`, and the list of all pages.

Another package can add a family: it declares a `Family`, and names it in an entry point of the group
`moedisco_ray.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from moedisco_ray.core.families import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    hy_v3,
    llama_moe,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe_text,
    qwen3_moe,
    qwen3_next,
    sarvam_mla,
    solar_open,
)
from moedisco_ray.core.families.declaration import PARTS, Attention, Family, Gguf, Initial, Part, SharedExpert, Value
from moedisco_ray.core.families.recurrence import Recurrence
from moedisco_ray.core.families.refused import REFUSED
from moedisco_ray.core.families.router import Router

__all__ = [
    "DECLARATIONS",
    "FAMILIES",
    "PARTS",
    "REFUSED",
    "Attention",
    "Family",
    "FamilyName",
    "Gguf",
    "Initial",
    "Part",
    "Recurrence",
    "Router",
    "SharedExpert",
    "Value",
    "language_model",
    "unsupported",
]

GROUP = "moedisco_ray.families"
"""Group of the entry points that name families of other packages."""
PAGES = (
    mixtral,
    qwen2_moe,
    qwen3_moe,
    olmoe,
    flex_olmo,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    dots1,
    solar_open,
    ernie4_5_moe,
    granitemoe,
    phimoe,
    qwen3_next,
    qwen3_5_moe_text,
    llama_moe,
    glm4_moe_lite,
    minimax_m2,
    hy_v3,
    sarvam_mla,
)
"""The families of this package."""
_OWN: Mapping[str, Family] = {page.FAMILY.name: page.FAMILY for page in PAGES}

DECLARATIONS: Mapping[str, Family] = {
    **_OWN,
    **{family.name: family for entry in entry_points(group=GROUP) if (family := entry.load()).name not in _OWN},
}
"""Every family by its `model_type`. Those of this package come first, also where several take the same dense start."""
FAMILIES: tuple[str, ...] = tuple(DECLARATIONS)


_COMPOSITES = {
    kind: family.composite
    for family in DECLARATIONS.values()
    if family.composite is not None
    for kind in family.composite.kinds
}
_SHARED = ("quantization_config", "tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")
"""Fields of a composite model that hold for its language model too, unless that has its own."""


def language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `config.json`; of a composite model, those of its language model."""
    kind, text = str(config.get("model_type")), config.get("text_config")
    composite = _COMPOSITES.get(kind)
    if composite is None or not isinstance(text, Mapping):
        return dict(config)
    return {name: config[name] for name in _SHARED if name in config} | composite.held(kind, text)


def unsupported(name: object) -> str:
    """The message for a `model_type` that is not declared; its subject is the name."""
    reason = REFUSED.get(str(name))
    return f"is not supported{f', because {reason}' if reason else ''}; use one of {', '.join(FAMILIES)}"


def _known(name: str) -> str:
    if name in REFUSED and name not in DECLARATIONS:
        raise ValueError(unsupported(name))
    if name not in DECLARATIONS:
        *others, last = map(repr, FAMILIES)
        raise PydanticCustomError("literal_error", "must be {expected}", {"expected": f"{', '.join(others)} or {last}"})
    return name


FamilyName = Annotated[str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(FAMILIES)})]
"""Name of a declared family."""
