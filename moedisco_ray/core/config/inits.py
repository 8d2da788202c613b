"""The sections of `model.init`: the model that a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from moedisco_ray.core.config.base import MOST_EXPERTS, Section
from moedisco_ray.core.config.places import ReadsFrom, as_start
from moedisco_ray.core.store.hub import HUB, REVISION, is_hub, is_hub_name
from moedisco_ray.core.store.locations import Location

ModelPlace = Annotated[Path | str, ReadsFrom(run_part="model", hub=True), AfterValidator(as_start)]


class LocalInit(Section):
    """Base class of the `model.init` sections that name a model, in the setting whose name is `KEY`."""

    KEY: ClassVar[str]

    revision: str | None = Field(None, max_length=255, pattern=REVISION)
    """Branch, tag or commit of a model of the Hugging Face hub. Null means its main branch."""
    commit: SkipJsonSchema[Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None] = None
    """Commit that `revision` named when the run began: a record in the run's own `config.json`. It is no setting, and
    not in the schema."""

    @model_validator(mode="before")
    @classmethod
    def _name_with_a_revision(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("revision") is not None and is_hub_name(raw.get(cls.KEY)):
            return {**raw, cls.KEY: HUB + str(raw[cls.KEY])}
        return raw

    @model_validator(mode="after")
    def _revision_is_of_a_hub_model(self) -> Self:
        if not is_hub(getattr(self, self.KEY)) and (self.revision or self.commit) is not None:
            raise ValueError(
                f"revision belongs to a model of the Hugging Face hub, and {self.KEY} names none; remove it"
            )
        return self

    @property
    def setting(self) -> str:
        """Dotted path of the setting that holds the directory's path."""
        return f"model.init.{self.KEY}"

    @property
    def place(self) -> Location:
        """The Hugging Face directory to start from, the URI of a run's model, or a model of the hub at its revision."""
        found: Location = getattr(self, self.KEY)
        revision = self.commit or self.revision
        return f"{found}@{revision}" if is_hub(found) and revision is not None else found


class CheckpointInit(LocalInit):
    """Start from a Mixture-of-Experts model in Hugging Face format."""

    KEY: ClassVar[str] = "checkpoint"

    checkpoint: ModelPlace
    """A Hugging Face directory, a GGUF file, a model of the Hugging Face hub, or the URI of the model of a finished
    run: `OUTPUT/NAME/model`. The weights of a GGUF file (`FILE.gguf`, which needs moedisco-ray[gguf]) are dequantised
    to fp32, into the machine's cache; transformers reads those of qwen2_moe, qwen3_moe and qwen3_5_moe_text only. A
    model of the hub is written `hf://ORG/NAME`; `ORG/NAME` suffices if there is no directory of this name. The token
    for it is in the environment variable HF_TOKEN of each machine. A control service reads no GGUF files, and also
    accepts `run://RUN/model`: the model of the finished run with this id or name. Weights in MXFP4 (gpt-oss) or fp8
    (DeepSeek-V3) are read in bf16."""


class UpcycleInit(LocalInit):
    """Start from a dense model, whose MLP becomes every expert (Komatsuzaki et al., arXiv 2212.05055)."""

    KEY: ClassVar[str] = "upcycle"

    upcycle: ModelPlace
    """A Hugging Face directory, a GGUF file, a model of the hub, or the model of a finished run, as in `checkpoint`. It
    holds a dense model that is related to the family (docs/families.md lists them), such as Qwen3 for qwen3_moe, or a
    model of the family with one expert, such as an earlier run's seed."""
    num_experts: int = Field(4, ge=1, le=MOST_EXPERTS)
    num_experts_per_tok: int = Field(2, ge=1, le=MOST_EXPERTS)
    """Number of experts per token. Their router weights sum to one, so that the MoE initially computes the same as the
    dense model. In deepseek_v2 they do so only if it equals `num_experts`."""
    split: int = Field(1, ge=1, le=MOST_EXPERTS)
    """Number of experts among which the hidden units of the MLP are divided (LLaMA-MoE, arXiv 2406.16554). It must
    divide `num_experts`: each group of `split` experts holds the whole MLP. If it divides `num_experts_per_tok` too,
    the experts of a group begin with equal router rows, so that a token selects whole groups, and the MoE initially
    computes the same as the dense model. Otherwise experts begin with rows of their own, and it computes something
    else."""
    reinitialise: float = Field(0.0, ge=0, le=1)
    """Share of each expert's hidden units that are drawn anew, so that experts differ before their training
    (Drop-Upcycling, arXiv 2502.19261, which uses 0.5). New weights have the mean and the standard deviation of those
    that they replace. The MoE then initially computes something else than the dense model. A seed phase trains the
    dense model as it is; its units are drawn anew after it. If the next training continues with the seed's optimizer
    state, so do new units, which have the scale of the old ones. `submodels.lora` would leave them untrained, and is
    refused."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if self.num_experts % self.split:
            raise ValueError(
                f"split {self.split} does not divide num_experts {self.num_experts}; set num_experts to a multiple of "
                f"{self.split}"
            )
        return self
