"""The sections of a run configuration, in pipeline order. A docstring under a field is what `moedisco schema` says of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from moedisco_ray.core.config.base import LARGEST, MOST_CLUSTERS, Section
from moedisco_ray.core.config.effects import NoEffect, Resolved
from moedisco_ray.core.config.places import ReadsFrom, WritesTo
from moedisco_ray.core.config.pools import PoolName

Share = Annotated[float, Field(ge=0, lt=1)]

_SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")
MOST_SOURCES = 1000
_SLICE_TOKENS = 65_536
"""Validation tokens of a look at the held-out loss during training: enough to see the curve, and cheap."""
_ROUNDING = 1e-9
"""Shares whose sum differs from 1 by no more than this add up to 1."""


class Source(Section):
    """Text from one place."""

    path: Annotated[str, ReadsFrom(uris=True, run_part="corpus")]
    """A file, a folder, a glob, or any URI that a pyarrow file system reads (`s3://`, `gs://`). `embedded` is the text that
    the installed packages carry. On a control service, `run://RUN/corpus` is the text of a finished run by id or name. A run's
    corpus keeps its split: what that run held out stays held out, and the rest training text, whatever `seed` and
    `validation_fraction`."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Names a domain: the report then says how clusters and experts relate to it."""
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "datasets"] = "auto"
    """`datasets` is a folder that Hugging Face `save_to_disk` wrote; `auto` goes by the file endings and refuses unknown ones;
    in a folder with tables or JSON Lines it passes over plain text, and lists it. In `tsv` quotation marks are text."""
    text_column: str = "text"
    """The column of JSONL, CSV, TSV, Parquet and datasets that holds the text."""
    documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What one document is in plain text. `auto`: about one sequence, cut at blank lines, or at line ends, sentence ends or between
    words where a paragraph is longer. `file`: a whole file. `paragraph`: the text between blank lines. `line`: a line; lines are
    independent, so that neighbours may be on different sides of the validation split."""
    exclude: tuple[str, ...] = Field((), max_length=256)
    """Globs of files to leave out: by name (`*.log`), or, with a slash, by the path below the source's folder (`drafts/**`)."""
    on_error: Literal["fail", "skip"] = "fail"
    """A file that is binary, not UTF-8, damaged or of an unknown ending ends the run, or is left out as a whole; the report then
    counts and lists it."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often each document is seen per pass over the corpus; 0.5 keeps half the documents."""


def _each_once(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    return tuple(dict.fromkeys(sources))    # of equal documents only the first is kept anyway


def _not_too_many(sources: object) -> object:
    # Before each of them is looked at: a service validates what anyone sends.
    if isinstance(sources, list | tuple) and len(sources) > MOST_SOURCES:
        raise ValueError(f"are {len(sources)} sources, more than {MOST_SOURCES}; name folders or globs of many files")
    return sources


Sources = Annotated[
    tuple[Source, ...], Field(max_length=MOST_SOURCES), AfterValidator(_each_once), BeforeValidator(_not_too_many)]


class Corpus(Section):
    """What to train on."""

    sources: Sources = Field(min_length=1)
    """Where the text comes from. A source that is listed twice counts once."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of each source's documents that is held out, chosen by a hash of their text. The parts of a long document stay
    together, and so do neighbours in plain text, up to `max_document_tokens`, unless its documents are lines."""
    sequence_length: int = Field(1024, ge=16, le=LARGEST)
    """Tokens per training sequence."""
    max_document_tokens: int | None = Field(None, ge=16, le=LARGEST)
    """Most tokens of a document; a longer one is cut into parts at blank lines, line ends or sentence ends. Null: 8 sequences."""

    @property
    def document_tokens(self) -> int:
        """Most tokens of a document."""
        return self.max_document_tokens or 8 * self.sequence_length


class Tokenizer(Section):
    """Where the tokenizer comes from."""

    path: Annotated[Path, ReadsFrom(run_part="model")] | None = None
    """A directory with a tokenizer that transformers can read. Null: the tokenizer of the model that `model.init` names, or, with
    random weights, one that is trained on the corpus."""
    replace: bool = False
    """Replace the tokenizer of the model that `model.init` names, by the one in `path` or by one trained on the corpus. The model's
    embedding then belongs to other tokens, and must be learned again."""
    train_vocab_size: int = Field(8192, ge=300, le=LARGEST)
    """Size of the byte-level BPE vocabulary to train."""


class Tokens(Section):
    """How many tokens are trained on, and where they go."""

    total: int = Field(20_000_000, gt=0, le=LARGEST)
    seed_share: Share = 0.2
    """Trains one common dense model on everything first; 0 is the paper."""
    finetune_share: float = Field(0.15, ge=0, le=1)
    """Trains the whole MoE; what is left is the sub-models'. Where nothing is left there are none: 1 is joint training of the
    initial MoE, 1 - seed_share sparse upcycling of the seed. 0 leaves the MoE as it was merged."""

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Self:
        if self.seed_share + self.finetune_share > 1 + _ROUNDING:
            raise ValueError(
                f"seed_share {self.seed_share} and finetune_share {self.finetune_share} are more than 1 together; lower one")
        return self

    @property
    def decoupled(self) -> bool:
        """Whether there are sub-models to train, each on a cluster of its own."""
        return self.seed_share + self.finetune_share < 1 - _ROUNDING

    @property
    def seed(self) -> int:
        """Tokens of the seed phase."""
        return int(self.total * self.seed_share)

    @property
    def finetune(self) -> int:
        """Tokens of the whole MoE's training."""
        return int(self.total * self.finetune_share) if self.decoupled else self.total - self.seed

    @property
    def submodels(self) -> int:
        """Tokens of all sub-models together."""
        return self.total - self.seed - self.finetune


class Clusters(Section):
    """How documents are grouped."""

    count: int = Field(4, ge=1, le=MOST_CLUSTERS)
    """Clusters, and so sub-models. Must divide the number of experts."""
    method: Literal["kmeans", "likelihood", "random"] = "kmeans"
    """`kmeans` on document vectors (the paper); `likelihood`: a small language model per cluster, and each document where it is
    likeliest (SMALLTALK); `random`: by a hash of the text, the paper's ablation."""
    vectors: Literal["mean_token", "tfidf_svd", "hidden_state"] = "hidden_state"
    """Document vectors of `kmeans`: mean token embedding (the paper), tf-idf with SVD, or mean hidden state of the seed model."""
    dimensions: int = Field(64, ge=2, le=LARGEST)
    """Components of the SVD, for `tfidf_svd`."""
    capacity: float | None = Field(1.05, ge=1)
    """Most tokens a cluster may hold, as a multiple of the mean; null: no limit, as the paper."""
    overlap: float = Field(0.0, ge=0, le=1)
    """Documents of other clusters added to each cluster's training text, as a share of the number of its own."""
    restarts: int = Field(4, ge=1, le=64)
    sample: int = Field(10_000, ge=16, le=LARGEST)
    """Documents that k-means++ seeding, the tf-idf vocabulary, the language models of `likelihood`, the silhouette and the
    2-D map are computed on."""


Precision = Literal["fp32", "bf16"]


def precision_on(*, gpu: bool) -> Precision:
    """Precision that a GPU or a CPU computes with where the configuration leaves it open."""
    return "bf16" if gpu else "fp32"


class Optimizer(Section):
    """One recipe of the one training loop."""

    lr: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """Cosine comes down to a tenth of `lr`; wsd (warm-up, stable, decay) does so in the last fifth of the steps."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: float = Field(0.01, ge=0)
    batch_tokens: int = Field(16_384, gt=0, le=LARGEST)
    """Tokens per step over all workers."""
    micro_batch: int | None = Field(None, ge=1, le=LARGEST)
    """Sequences per forward pass of one worker; null: the worker's whole share. Smaller needs less memory, same result."""
    precision: Annotated[Literal["auto", "fp32", "bf16", "pure_bf16"], Resolved("precision")] = "auto"
    """`fp32` and `bf16` are the arithmetic of the forward and backward pass, over fp32 weights, gradients and optimizer state (16
    bytes per parameter). `pure_bf16` stores these in bf16 too, with stochastic rounding (8 bytes). `auto` is bf16 on a GPU and fp32
    on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @property
    def state(self) -> Precision:
        """Type of weights, gradients and optimizer state between steps."""
        return "bf16" if self.precision == "pure_bf16" else "fp32"

    def arithmetic(self, *, gpu: bool) -> Precision:
        """Type of the forward and backward pass on a GPU or a CPU."""
        match self.precision:
            case "auto":
                return precision_on(gpu=gpu)
            case "pure_bf16":
                return "bf16"
            case precision:
                return precision


class Outer(Section):
    """SGD with Nesterov momentum over rounds: how the common backbone follows the sub-models'."""

    lr: float = Field(0.7, gt=0)
    """Of the mean way that the backbones went in a round; 1, without momentum, is their plain average."""
    momentum: float = Field(0.9, ge=0, lt=1)


_MAY_DO_WITH_LESS = NoEffect(
    "it says when a run may continue without some sub-models; it may be changed while the run waits for machines, and the stage's "
    "summary says what each sub-model contributed")
_ROUND_PATIENCE = 600.0
"""Wait of a round for late sub-models (s): a lost one is back within minutes where machines are to be had."""


class Submodels(Section):
    """The parallel phase; the seed phase trains with the same recipe."""

    optimizer: Optimizer = Optimizer()
    sync_every: int | None = Field(None, ge=1, le=LARGEST)
    """Steps of the longest sub-model between two moments at which all backbones become one; experts stay private. Null, as the
    paper: never before the merge."""
    outer: Outer = Outer()
    keep_optimizer_state: bool = True
    """Adam's moments of the seed go on in the sub-models; false: each begins with none, and its first updates are signs."""
    quorum: Annotated[int | None, _MAY_DO_WITH_LESS] = Field(None, ge=1, le=MOST_CLUSTERS)
    """Sub-models that must be finished before the merge may start without the others; null: all. The others have had their time
    when the phase has lasted 1.5 times as long as the quorum took, or as the longest of them was expected to take. One that is
    missing contributes its last checkpoint, or the start that it began from, and the report says so. With a quorum, a round
    waits at most 10 minutes for the rest once half of the sub-models are there. The result then depends on when machines came
    and went."""

    @property
    def round_patience(self) -> float | None:
        """Seconds that a round waits for the rest once half of the sub-models are there; None: until all are."""
        return None if self.quorum is None else _ROUND_PATIENCE


class Merge(Section):
    """How the sub-models become one MoE."""

    backbone: Literal["uniform", "token_weighted", "ties", "dare", "auto"] = "token_weighted"
    """The sub-models' mean (`uniform`, `token_weighted`), or what `ties` or `dare` make of their deltas against their common
    start; `auto` takes the rule and scale whose merged model has the least loss on held-out training text."""
    auto_tokens: int = Field(32_768, gt=0, le=LARGEST)
    """Tokens `auto` measures on: of each cluster's text the windows that its sub-model would have trained on last, and has not
    unless it went through all of it. The validation text stays out of the choice."""
    router: Literal["ridge", "centroid", "random"] = "ridge"
    """`ridge` and `centroid` compute the routers from data: each cluster's experts begin with the cluster's share of the
    tokens, and where top-k weights are not normalised, experts keep their output scale. `random`, as the paper, does neither."""
    calibration_tokens: int = Field(65_536, gt=0, le=LARGEST)
    """Tokens the router is computed on."""

    @property
    def from_data(self) -> bool:
        """Whether routers, loads and scales are computed from data."""
        return self.router != "random"


class Finetune(Section):
    """The training of the whole MoE."""

    pool: Annotated[PoolName, Resolved("precision")] = "high_memory"
    """Whose workers train it together, sharded: the few large ones, or all of the many small ones."""
    optimizer: Optimizer = Optimizer(lr=3e-4, schedule="cosine", warmup=0.03)
    load_balance: float = Field(0.01, ge=0)
    """Weight of the load-balance loss over the global batch; also of sub-models that have several experts."""
    z_loss: float = Field(0.001, ge=0)
    """Weight of the router z-loss; of these too."""
    keep_optimizer_state: bool = True
    """Adam's moments of the sub-models, or of the seed where there are none, go on in the whole MoE; false: it begins with none."""


class Checkpoint(Section):
    """Where and how often a trainer saves what it would need to go on; it trains on meanwhile."""

    every: Annotated[int, Field(ge=1, le=LARGEST)] | Literal["auto"] = "auto"
    """Steps; auto: as often as costs least, by what a save was measured to cost and how often workers were lost."""
    max_failures: int = Field(3, ge=0, le=LARGEST)
    """How often a worker that failed starts again from its last checkpoint. Losing a machine is no failure."""
    storage: Annotated[str, WritesTo("checkpoints")] | None = None
    """A folder, or any URI that a pyarrow file system writes (`s3://BUCKET/FOLDER`, `gs://`), for checkpoints in STORAGE/NAME-ID,
    which is this run's alone; null: in the run directory. Credentials come from the machines' environment or role. A control
    service allows only its storage roots."""

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints; None where that is to be measured."""
        return None if self.every == "auto" else self.every

    @field_validator("storage")
    @classmethod
    def _is_storage(cls, storage: str | None) -> str | None:
        scheme = re.match(r"([A-Za-z0-9+.-]+):", storage or "")
        if storage == "" or (scheme and (scheme[1] not in _SCHEMES or not re.match(r"[a-z0-9]+://[^/?]", storage or ""))):
            raise ValueError(f"names no storage; give a folder, or a URI such as s3://BUCKET/FOLDER ({', '.join(_SCHEMES)})")
        return storage


_ONLY_LOOKS = NoEffect("it measures a model while it is trained, and changes nothing in it")


class Evaluation(Section):
    """What is measured at the end."""

    max_tokens: int = Field(1_000_000, gt=0, le=LARGEST)
    """Most validation tokens to evaluate on; whole documents are taken while they fit."""
    every_tokens: Annotated[int | None, _ONLY_LOOKS] = Field(None, gt=0, le=LARGEST)
    """Tokens of the seed's and of the whole MoE's training between two looks at their held-out loss; null: none is taken."""
    stages: bool = True
    """Also measure what came before the finished model: the seed, each sub-model on its own cluster's text, the merged model."""
    ensemble: bool = False
    """Also measure the trained sub-models as an ensemble that is never merged (c-BTM, arXiv 2303.14177)."""
    ensemble_top_k: int | None = Field(None, ge=1, le=MOST_CLUSTERS)
    """Sub-models of the ensemble that a token is predicted by, the nearest ones; null: all."""
    sources: Sources = ()
    """Text that is never trained on, to measure the finished model on beside the validation text: of each source, in the order of
    its files, an equal share of `max_tokens`. A document that the corpus trained on is left out. `weight` means nothing here."""
    lm_eval: tuple[Annotated[Path, ReadsFrom()], ...] = Field((), max_length=64)
    """Task files for EleutherAI's lm-eval (`pip install 'moedisco-ray[lm-eval]'`): JSON Lines, all of `query`, `choices` and `gold`
    (the right choice's place, from 0), or all of `context` and `continuation`. A task is called as its file."""
    lm_eval_limit: int | None = Field(None, ge=1, le=LARGEST)
    """Examples of each task file, the first ones; null: all."""
    prompts: tuple[Annotated[str, Field(max_length=2000)], ...] = Field(("The", "import "), max_length=64)
    """The finished model continues each of these, as a sample in the report."""
    sample_tokens: int = Field(48, ge=1, le=4096)

    @property
    def slice_tokens(self) -> int:
        """Most validation tokens that a look during training takes."""
        return min(self.max_tokens, _SLICE_TOKENS)


class Export(Section):
    """The finished model's directory."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the weights; auto: that of the model that `model.init` names, or, with random weights, what was trained in."""


class Tracking(Section):
    """Experiment trackers, each by its own library (`pip install 'moedisco-ray[NAME]'`)."""

    tensorboard: bool = False
    """Write to RUN_DIR/tensorboard."""
    wandb: str | None = Field(None, max_length=256)
    """A Weights & Biases project."""
    mlflow: str | None = Field(None, max_length=256)
    """An MLflow experiment; the server is MLFLOW_TRACKING_URI's."""
