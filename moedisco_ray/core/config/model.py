"""The section `model`: which Mixture-of-Experts to train, and what it starts from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import model_validator

from moedisco_ray.core.config.architecture import Architecture, check_sizes
from moedisco_ray.core.config.base import Section
from moedisco_ray.core.config.effects import Resolved
from moedisco_ray.core.config.inits import CheckpointInit, LocalInit, UpcycleInit
from moedisco_ray.core.families import DECLARATIONS, FamilyName

_RANDOM_FAMILY = "qwen3_moe"
"""Family of a model with random weights, unless `model.family` names another one."""
_NOT_READ = "the model to start from was not read; `check_config` and `with_start` read it"


class Model(Section):
    """The Mixture-of-Experts to train."""

    family: Annotated[FamilyName | None, Resolved("family")] = None
    """Model family. Null means the family in the `config.json` of the model that `init` names, or, for random weights,
    qwen3_moe. A dense model becomes the first of its relatives: Llama and Mistral become mixtral (Llama with biases:
    qwen2_moe). docs/families.md lists the dense starts of each family."""
    config: Architecture | None = None
    """Sizes of the model. Leave them out if `init` names a model, which has its own; the run's `config.json` records
    them."""
    init: Literal["random"] | CheckpointInit | UpcycleInit = "random"

    @model_validator(mode="after")
    def _the_family_has_the_sizes(self) -> Self:
        if self.config is not None and not isinstance(self.init, LocalInit):
            family = DECLARATIONS[self.family or _RANDOM_FAMILY]
            check_sizes(self.config, family)
            normalised = family.router.normalised(self.config.norm_topk_prob)
            # the default; what is stored must be valid when it is read again
            if normalised != self.config.norm_topk_prob:
                object.__setattr__(self, "config", self.config.model_copy(update={"norm_topk_prob": normalised}))
        return self

    @property
    def known(self) -> bool:
        """Whether family and sizes are known; those of a start are not before `with_start` has read them."""
        return not isinstance(self.init, LocalInit) or (self.family is not None and self.config is not None)

    @property
    def family_name(self) -> FamilyName:
        """`family` with its default resolved."""
        if not self.known:
            raise RuntimeError(_NOT_READ)
        return self.family or _RANDOM_FAMILY

    @property
    def architecture(self) -> Architecture:
        """Sizes of the model: `config` with its default resolved."""
        if not self.known:
            raise RuntimeError(_NOT_READ)
        sizes = self.config or Architecture()
        if isinstance(self.init, LocalInit):
            return sizes
        return sizes.model_copy(
            update={"norm_topk_prob": DECLARATIONS[self.family_name].router.normalised(sizes.norm_topk_prob)}
        )

    @property
    def starts_from_moe(self) -> bool:
        """Whether the run starts from a trained MoE."""
        return isinstance(self.init, CheckpointInit)

    @property
    def experts_together(self) -> int:
        """Number of neighbouring experts that a sub-model keeps together: they are parts of one MLP of the start."""
        return self.init.split if isinstance(self.init, UpcycleInit) else 1
