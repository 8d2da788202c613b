"""The sections of a run configuration, in pipeline order. A docstring under a field is what `moedisco schema` says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from moedisco_ray.config.base import Section

Share = Annotated[float, Field(ge=0, lt=1)]

_SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")


class Source(Section):
    """Text from one place."""

    path: str
    """A file, a folder, a glob, or any URI that a pyarrow file system reads (`s3://`, `gs://`). `embedded` is the text that
    the installed packages carry."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Names a domain: the report then says how clusters and experts relate to it."""
    format: Literal["auto", "text", "jsonl", "parquet", "datasets"] = "auto"
    """`datasets` is a folder that Hugging Face `save_to_disk` wrote; `auto` looks at the files' endings."""
    text_column: str = "text"
    """The column of JSONL, Parquet and datasets that holds the text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one document is in plain text: a whole file, a part between blank lines, or a line."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often each document is seen per pass over the corpus; 0.5 keeps half the documents."""


class Corpus(Section):
    """What to train on."""

    sources: tuple[Source, ...] = Field(min_length=1)
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of documents held out, chosen by the hash of their text."""
    sequence_length: int = Field(1024, ge=16)
    """Tokens per training sequence."""


class Tokenizer(Section):
    """Where the tokeniser comes from."""

    path: Path | None = None
    """A directory with `tokenizer.json` (or `vocab.json` and `merges.txt`); null: train one on the corpus."""
    train_vocab_size: int = Field(8192, ge=300)
    """Size of the byte-level BPE vocabulary to train."""


class Tokens(Section):
    """How many tokens are trained on, and where they go."""

    total: int = Field(20_000_000, gt=0)
    seed_share: Share = 0.2
    """Trains one common dense model on everything first; 0 is the paper."""
    finetune_share: float = Field(0.15, gt=0, lt=1)
    """Trains the merged MoE; what is left is the sub-models'."""

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.seed_share + self.finetune_share >= 1:
            raise ValueError(
                f"seed_share {self.seed_share} and finetune_share {self.finetune_share} leave no tokens for the sub-models; "
                "lower one")
        return self

    @property
    def seed(self) -> int:
        """Tokens of the seed phase."""
        return int(self.total * self.seed_share)

    @property
    def finetune(self) -> int:
        """Tokens of the merge fine-tune."""
        return int(self.total * self.finetune_share)

    @property
    def submodels(self) -> int:
        """Tokens of all sub-models together."""
        return self.total - self.seed - self.finetune


class Clusters(Section):
    """How documents are grouped."""

    count: int = Field(4, ge=1)
    """Clusters, and so sub-models. Must divide the number of experts."""
    vectors: Literal["mean_token", "tfidf_svd", "hidden_state"] = "hidden_state"
    """Document vectors: mean token embedding (the paper), tf-idf with SVD, or mean hidden state of the seed model."""
    dimensions: int = Field(64, ge=2)
    """Components of the SVD, for `tfidf_svd`."""
    capacity: float | None = Field(1.05, ge=1)
    """Most tokens a cluster may hold, as a multiple of the mean; null: no limit, as the paper."""
    overlap: float = Field(0.0, ge=0, le=1)
    """General documents added to each cluster's training text, as a share of its own."""
    restarts: int = Field(4, ge=1, le=64)
    iterations: int = Field(50, ge=1)
    sample: int = Field(10_000, ge=16)
    """Documents that k-means++ seeding, the tf-idf vocabulary, the silhouette and the 2-D map are computed on."""


class Optimizer(Section):
    """One recipe of the one training loop."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    """Cosine decays to a tenth of `lr`."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    batch_tokens: int = Field(16_384, gt=0)
    """Tokens per step over all workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences per forward pass of one worker; null: the worker's whole share. Smaller needs less memory, same result."""
    state: Literal["fp32", "bf16"] = "fp32"
    """`fp32`: 16 bytes per parameter for weights, gradients and moments. `bf16`: 8 bytes, with stochastic rounding."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; auto: bf16 on a GPU, fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class Submodels(Section):
    """The independent, parallel phase; the seed phase trains with the same recipe."""

    optimizer: Optimizer = Optimizer()
    max_failures: int = Field(3, ge=0)
    """How often a worker that died is started again, from its last checkpoint."""


class Merge(Section):
    """How the sub-models become one MoE."""

    backbone: Literal["uniform", "token_weighted"] = "token_weighted"
    router: Literal["ridge", "centroid", "random", "concat"] = "ridge"
    """From data (`ridge`, `centroid`), at random, or the rows that the sub-models carried (`concat`)."""
    match_scale: bool = True
    """Where top-k weights are not normalised, rescale each layer's experts so that they keep their output scale."""
    calibration_tokens: int = Field(65_536, gt=0)
    """Tokens the router is computed on."""


class Finetune(Section):
    """The short training of the whole MoE."""

    optimizer: Optimizer = Optimizer(lr=3e-4, schedule="cosine", warmup=0.03)
    load_balance: float = Field(0.01, ge=0)
    """Weight of the load-balance loss over the global batch."""
    z_loss: float = Field(0.001, ge=0)
    """Weight of the router z-loss."""
    max_failures: int = Field(3, ge=0)


class Pool(Section):
    """Machines of one kind, as Ray sees them."""

    kind: ClassVar[Literal["low_memory", "high_memory"]]
    """Its key in `pools`."""

    resource: str = Field(pattern=r"^[A-Za-z_][\w.-]*$")
    """The custom resource that a node of this pool offers: one per worker it has room for."""
    gpu: int = Field(0, ge=0, le=1)
    """GPUs a worker holds; 0 trains on CPU."""
    memory_gb: float = Field(gt=0)
    price_per_hour: float = Field(ge=0)
    """Dollars per worker-hour."""
    speed: float = Field(gt=0)
    """Training speed relative to one A100-80GB."""


class LowMemoryPool(Pool):
    """Trains the seed model and the sub-models, one worker each."""

    kind = "low_memory"
    resource: str = Field("low_mem_gpu", pattern=r"^[A-Za-z_][\w.-]*$")
    gpu: int = Field(0, ge=0, le=1)
    memory_gb: float = Field(24, gt=0)
    price_per_hour: float = Field(0.35, ge=0)
    speed: float = Field(0.72, gt=0)
    max_workers: int = Field(8, ge=1)
    """Most sub-models that train at once."""


class HighMemoryPool(Pool):
    """Trains the merged MoE with all its workers at once."""

    kind = "high_memory"
    resource: str = Field("high_mem_gpu", pattern=r"^[A-Za-z_][\w.-]*$")
    gpu: int = Field(0, ge=0, le=1)
    memory_gb: float = Field(80, gt=0)
    price_per_hour: float = Field(2.28, ge=0)
    speed: float = Field(1.0, gt=0)
    workers: int = Field(1, ge=1)
    """Size of the gang: all of them, or none."""


class Pools(Section):
    """Where the work runs."""

    low_memory: LowMemoryPool = LowMemoryPool()
    high_memory: HighMemoryPool = HighMemoryPool()


class Checkpoint(Section):
    """Where and how often a trainer saves what it would need to go on; it trains on meanwhile."""

    every: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps; auto: as often as costs least, by what a save was measured to cost and how often workers were lost."""
    keep: int = Field(2, ge=1)
    storage: str | None = None
    """A folder, or any URI that a pyarrow file system writes (`s3://BUCKET/FOLDER`, `gs://`), for checkpoints in STORAGE/NAME;
    null: in the run directory."""

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints; None where that is to be measured."""
        return None if self.every == "auto" else self.every

    @field_validator("storage")
    @classmethod
    def _is_storage(cls, storage: str | None) -> str | None:
        scheme = re.match(r"([A-Za-z0-9+.-]+):", storage or "")
        if storage == "" or (scheme and (scheme[1] not in _SCHEMES or not re.match(r"[a-z]+://[^/?]", storage or ""))):
            raise ValueError(f"names no storage; give a folder, or a URI such as s3://BUCKET/FOLDER ({', '.join(_SCHEMES)})")
        return storage


class Evaluation(Section):
    """What is measured at the end."""

    max_tokens: int = Field(1_000_000, gt=0)
    """Most validation tokens to evaluate on."""
    prompts: tuple[str, ...] = ("The", "import ")
    """The finished model continues each of these, as a sample in the report."""
    sample_tokens: int = Field(48, ge=1)


class Tracking(Section):
    """Experiment trackers, each by its own library (`pip install 'moedisco-ray[NAME]'`)."""

    tensorboard: bool = False
    """Write to RUN_DIR/tensorboard."""
    wandb: str | None = None
    """A Weights & Biases project."""
    mlflow: str | None = None
    """An MLflow experiment; the server is MLFLOW_TRACKING_URI's."""
