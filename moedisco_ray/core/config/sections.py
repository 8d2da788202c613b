"""The sections of a run configuration, in pipeline order. `moedisco schema` shows the docstring under a field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moedisco_ray.core.config.base import LARGEST, MOST_CLUSTERS, Section
from moedisco_ray.core.config.effects import NoEffect, Resolved
from moedisco_ray.core.config.key_of import KeyOf
from moedisco_ray.core.config.optimizer import Lora, Optimizer
from moedisco_ray.core.config.places import ReadsFrom, WritesTo, as_model, check_storage
from moedisco_ray.core.config.pool import PoolName
from moedisco_ray.core.config.sources import CorpusSource, Source, Sources
from moedisco_ray.core.registry import BACKBONE_RULES, ROUTER_METHODS, TRACKERS

Recipe = Literal["auto", "joint", "grown", "members"]
TrainingStageName = Literal["seed", "submodels", "finetune"]
"""A stage that trains, in their order."""

_SLICE_TOKENS = 65_536
"""Number of validation tokens that each measurement during training uses: enough for a curve, and cheap."""
_ROUNDING = 1e-9
"""Rounding error up to which a sum of shares counts as equal to 1."""


class Corpus(Section):
    """The training text."""

    sources: Sources[CorpusSource] = Field(min_length=1)
    """Sources of the text. A source that is listed twice counts once."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of each source's documents that is held out, chosen by a hash of their text. Parts of a long document are
    held out together. So are neighbouring documents of plain text, in groups of up to `max_document_tokens`, unless
    `documents` is `line`."""
    sequence_length: int = Field(1024, ge=16, le=LARGEST)
    """Tokens per training sequence."""
    max_document_tokens: int | None = Field(None, ge=16, le=LARGEST)
    """Maximum length of a document (tokens); longer documents are cut at blank lines, line ends or sentence ends. Null
    means 8 times `sequence_length`."""
    near_duplicates: float | None = Field(None, ge=0.3, le=1)
    """Drop a document if its similarity to another one is at least this value, such as 0.8. The similarity is the
    Jaccard index of the documents' sets of five consecutive words, estimated by MinHash. The document from the earlier
    source is kept. With null, only documents whose text is equal are dropped."""

    def of_owner(self, owner: str | None) -> dict[int, CorpusSource]:
        """The sources of a data owner, or for None the sources without an owner, by their position in `sources`."""
        return {i: source for i, source in enumerate(self.sources) if source.owner == owner}

    @property
    def document_tokens(self) -> int:
        """Maximum length of a document (tokens), with the default resolved."""
        return self.max_document_tokens or 8 * self.sequence_length


class Tokenizer(Section):
    """The tokenizer."""

    path: Annotated[Path | str, ReadsFrom(run_part="model"), AfterValidator(as_model)] | None = None
    """Directory with a tokenizer that transformers can read, or the model of a finished run, as in `model.init`. Null
    means the tokenizer of the model in `model.init`; a run that starts from random weights trains a tokenizer on the
    corpus."""
    replace: bool = False
    """Replace the tokenizer of the model in `model.init` by the tokenizer in `path`, or, without `path`, by one that is
    trained on the corpus. The model then has to learn its embedding again."""
    train_vocab_size: int = Field(8192, ge=300, le=LARGEST)
    """Size of the byte-level BPE vocabulary to train."""


class Tokens(Section):
    """Number of training tokens, and how the phases share them."""

    total: int = Field(20_000_000, gt=0, le=LARGEST)
    """Number of training tokens of all phases together. A phase trains as many whole batches as its share holds;
    sub-models divide theirs in proportion to the tokens of their clusters. Each training needs at least one batch."""
    seed_share: float = Field(0.2, ge=0, le=1)
    """Share of the tokens that first trains one common model of a sub-model's shape on the whole corpus; the paper uses
    0."""
    finetune_share: float = Field(0.15, ge=0, le=1)
    """Share of the tokens that trains the merged MoE; the sub-models train on the rest. 0 skips the fine-tune. If
    nothing is left for sub-models, none are trained: the value 1 is joint training, and 1 - seed_share is sparse
    upcycling of the seed."""

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Self:
        if self.seed_share + self.finetune_share > 1 + _ROUNDING:
            raise ValueError(
                f"seed_share {self.seed_share} and finetune_share {self.finetune_share} are more than 1 together; "
                "lower one"
            )
        return self

    @property
    def decoupled(self) -> bool:
        """Whether sub-models are trained, each on its own cluster."""
        return self.seed_share + self.finetune_share < 1 - _ROUNDING

    @property
    def seed(self) -> int:
        """Number of tokens of the seed phase."""
        return int(self.total * self.seed_share)

    @property
    def finetune(self) -> int:
        """Number of tokens of the fine-tune."""
        return int(self.total * self.finetune_share) if self.decoupled else self.total - self.seed

    @property
    def submodels(self) -> int:
        """Number of tokens of all sub-models together."""
        return self.total - self.seed - self.finetune


class Clusters(Section):
    """Clustering of the documents."""

    count: Annotated[int, Field(ge=1, le=MOST_CLUSTERS)] | Literal["auto"] = 4
    """Number of clusters, and of sub-models. It must divide the number of experts. `auto` means the smallest such
    number, from two on, whose sub-models fit the low-memory pool: larger sub-models reach a lower loss for the same
    dollars. A larger number takes fewer hours, if there is a slot for each. The number is decided when a run begins,
    and recorded in its `config.json`."""
    vectors: Literal["mean_token", "tfidf_svd", "hidden_state", "random"] = "hidden_state"
    """Document vectors that k-means clusters: mean token embedding (the paper), tf-idf reduced to 64 dimensions by an
    SVD, or mean hidden state of the seed model. `random` is no k-means: it assigns documents by a hash of their text
    (an ablation in the paper)."""
    capacity: float | None = Field(1.05, ge=1)
    """Maximum number of tokens in a cluster, as a multiple of the mean over clusters. Null means no limit, as in the
    paper."""

    @property
    def number(self) -> int:
        """The number in `count`; for `auto`, call `plan.with_cluster_count` first."""
        if self.count == "auto":
            raise RuntimeError("clusters.count auto is not decided yet")
        return self.count


class Outer(Section):
    """Outer optimizer of a sync: SGD with Nesterov momentum on the mean change of the members' weights (DiLoCo).

    The default is plain averaging.
    """

    lr: float = Field(1.0, gt=0)
    """Outer learning rate on the mean change of the weights."""
    momentum: float = Field(0.0, ge=0, lt=1)


_MAY_DO_WITH_LESS = NoEffect(
    "it says when a run may continue without some sub-models; it may be changed while the run waits for machines, and "
    "the stage's summary says what each sub-model contributed"
)
_SYNC_PATIENCE = 600.0
"""Maximum time that a sync waits for late sub-models, in seconds: one that lost its machine takes minutes to continue
elsewhere."""


_ONLY_REFUSES = NoEffect("it decides whether sub-models are trained, and changes nothing in them")


class Submodels(Section):
    """Training of the sub-models; the seed phase uses the same optimizer and the same syncs."""

    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    sync_every: int | None = Field(None, ge=1, le=LARGEST)
    """Number of steps between two syncs. A sync combines the sub-models' backbones and leaves each one's experts
    unchanged. In a seed phase with several members it combines all weights. A sub-model with fewer steps in total syncs
    after proportionally fewer steps. With null, only the merge combines the backbones, as in the paper."""
    outer: Outer = Outer()
    sync_bits: Literal[4] | None = None
    """Bits per weight that a member sends and receives at a sync. Null sends weights in the dtype in which they train.
    With 4, it sends what its weights have changed by since the last sync, and receives what the common weights change
    by, in codes of 4 bits with a scale for every 256 weights: an eighth of the bytes of fp32. Both sides keep what the
    codes lose and add it to what they send at the next sync. A member then needs 12 bytes of main memory per weight
    that it exchanges, for common weights, for what its codes have lost, and for a checkpoint's copy of that; 8 bytes
    with `memory: streamed`, which makes no copy."""
    seed_members: Annotated[int | None, Resolved("seed_members")] = Field(1, ge=1, le=MOST_CLUSTERS)
    """Number of members that train the seed at the same time, one worker each. More members take fewer hours and reach
    a higher loss (`docs/results.md`). They start from the same model, share the batches of the seed phase evenly, and
    combine all weights every `sync_every` steps and after the last step. Each member trains on `batch_tokens` in every
    step, so 8 members make an eighth of the steps that one would make; dividing `batch_tokens` by 8 restores the number
    of steps. Null means one member for each cluster of text without an owner. There are never more members than the
    seed phase has batches. Without `sync_every`, the seed has one member."""
    keep_optimizer_state: bool = True
    """Whether each sub-model continues with the seed's optimizer state; with false it starts with a new one. A seed
    with several members keeps the state of its first member: all members train on shares of the same shuffled text, so
    their states are alike."""
    quorum: Annotated[int | None, _MAY_DO_WITH_LESS] = Field(None, ge=1, le=MOST_CLUSTERS)
    """Number of finished sub-models at which the merge may start without the others. Null means all sub-models. Once
    the quorum is reached, the run waits for the others until the phase has taken 1.5 x max(time of the quorum, expected
    time of the longest sub-model). A missing sub-model contributes its last checkpoint, or its initial weights, and the
    report says so. With a quorum, a sync waits at most 10 minutes after half of the sub-models have arrived. A run with
    a missing sub-model is not reproducible."""

    start_loss: Annotated[float | None, _ONLY_REFUSES] = Field(0.05, ge=0, allow_inf_nan=False)
    """How much more a sub-model of a trained MoE may lose before its training than the MoE, on the text of its own
    cluster (nats per token). The run ends if it is more, before any training. Null allows any. The text of data owners
    is not measured."""

    @model_validator(mode="after")
    def _bits_are_of_syncs(self) -> Self:
        if self.sync_bits is not None and self.sync_every is None:
            raise ValueError(
                f"sync_bits {self.sync_bits} needs syncs, at which members exchange weights; set submodels.sync_every, "
                "or leave sync_bits out"
            )
        return self

    @property
    def sync_patience(self) -> float | None:
        """Maximum wait of a sync after half of the sub-models have arrived (s); None if it waits for all."""
        return None if self.quorum is None else _SYNC_PATIENCE


class Merge(Section):
    """The merge of the sub-models into one MoE."""

    backbone: Annotated[str, KeyOf(BACKBONE_RULES)] = "token_weighted"
    """How the mean of the sub-models' backbones weights them: all equally, or each by the number of tokens that it was
    trained on."""
    router: Annotated[str | None, KeyOf(ROUTER_METHODS)] = None
    """How the merge makes the routers. `kept` concatenates the rows that the sub-models trained, and changes nothing
    else: of a trained MoE, which it is meant for, sub-models that learnt nothing become the same MoE again. For this,
    each sub-model has the experts of the MoE that its cluster's text selects most; it has neighbours if some text stays
    with data owners, and if the MoE's router limits each token to some groups of experts. `ridge` computes the rows
    from data: each cluster's experts begin with the cluster's share of the tokens, nine tokens of ten select experts of
    one cluster only, where groups have enough of them, and if top-k weights are not normalised, experts keep their
    output scale. `random` initialises them randomly, as in the paper, and adjusts none of these. Null means `kept` in a
    run that starts from an MoE, and `ridge` in others."""
    calibration_tokens: int = Field(65_536, gt=0, le=LARGEST)
    """Number of training tokens from which the routers are computed. On this number, but at most 65,536, it is also
    measured which experts of a trained MoE the clusters select."""

    def method(self, *, from_moe: bool) -> str:
        """How the merge makes the routers.

        Args:
            from_moe: Whether the run starts from a trained MoE.
        """
        return self.router or ("kept" if from_moe else "ridge")

    def from_data(self, *, from_moe: bool) -> bool:
        """Whether the merge computes routers, expert loads and output scales from data."""
        return self.method(from_moe=from_moe) not in ("kept", "random")


class Parallel(Section):
    """How the workers of the fine-tune share the model.

    Workers beyond `expert` times `replicate` divide the weights further.
    """

    expert: int | None = Field(None, ge=1, le=LARGEST)
    """Number of workers among which the experts of each layer are divided; tokens travel to the worker that has their
    expert. A number that does not divide the workers and the experts is lowered to one that does. Null means all GPUs
    of a node, and 1 for workers without a GPU."""
    replicate: int | None = Field(None, ge=1, le=LARGEST)
    """Number of replicas of the model, which exchange only gradients. Null means one per node if a node's memory is
    enough for a replica, and 1 otherwise."""


class Finetune(Section):
    """The fine-tune of the merged MoE."""

    pool: Annotated[PoolName, Resolved("precision")] = "high_memory"
    """Pool whose workers train the MoE together, each with a shard of it: the few large workers of `high_memory`, or
    all workers of `low_memory`."""
    optimizer: Optimizer = Optimizer(lr=3e-4, schedule="cosine", warmup=0.03)
    lora: Lora = Lora()
    parallel: Parallel = Parallel()
    load_balance: float = Field(0.01, ge=0)
    """Weight of the load-balance loss over the global batch; sub-models with several experts use it too."""
    z_loss: float = Field(0.001, ge=0)
    """Weight of the router z-loss; sub-models with several experts use it too."""
    keep_optimizer_state: bool = True
    """Whether to continue with the sub-models' optimizer state, or with the seed's if there are no sub-models; with
    false, the fine-tune starts with a new one."""


class Checkpoint(Section):
    """Checkpoints of the trainings, which are written while training continues."""

    every: Annotated[int, Field(ge=1, le=LARGEST)] | Literal["auto"] = "auto"
    """Number of steps between checkpoints. `auto` chooses the interval that costs least time, computed from the
    measured duration of a save and the measured rate of lost workers."""
    max_failures: int = Field(3, ge=0, le=LARGEST)
    """Maximum number of times that a failed worker is restarted from its last checkpoint. A lost machine does not count
    as a failure."""
    storage: Annotated[str, WritesTo("checkpoints"), AfterValidator(check_storage)] | None = None
    """A folder, or any URI that a pyarrow file system writes (`s3://BUCKET/FOLDER`, `gs://`). The run writes to
    STORAGE/NAME-ID. With null, checkpoints stay in the run directory. Credentials come from the machines' environment
    or role. A control service allows only its storage roots, and adds a folder for each run: STORAGE/RUN_ID."""

    @property
    def steps(self) -> int | None:
        """Number of steps between checkpoints; None for `auto`."""
        return None if self.every == "auto" else self.every


_ONLY_LOOKS = NoEffect("it measures a model while it is trained, and changes nothing in it")


class Evaluation(Section):
    """What a run measures during training and at its end."""

    max_tokens: int = Field(1_000_000, gt=0, le=LARGEST)
    """Maximum number of validation tokens to evaluate on, in whole documents."""
    every_tokens: Annotated[int | None, _ONLY_LOOKS] = Field(None, gt=0, le=LARGEST)
    """Number of training tokens between two measurements of the held-out loss, for the seed and the MoE. Null means no
    measurements."""
    stages: bool = True
    """Also measure the seed, each sub-model on its own cluster's text, and the merged model. A trained model that the
    run starts from is always measured, unless `tokenizer.replace` gives it other tokens."""
    sources: Sources[Source] = ()
    """Text that is never trained on, to evaluate the finished model. Each source contributes an equal share of
    `max_tokens`, read in the order of its files. Documents that are in the corpus are left out."""
    lm_eval: tuple[Annotated[Path, ReadsFrom()], ...] = Field((), max_length=64)
    """Task files for EleutherAI's lm-eval (`pip install 'moedisco-ray[lm-eval]'`): JSON Lines, either with `query`,
    `choices` and `gold` (the index of the right choice, from 0), or with `context` and `continuation`. Each task is
    named after its file."""
    prompts: tuple[Annotated[str, Field(max_length=2000)], ...] = Field(("The", "import "), max_length=64)
    """Prompts that the finished model continues by 48 tokens, as samples in the report."""

    @property
    def slice_tokens(self) -> int:
        """Number of validation tokens that each measurement during training uses."""
        return min(self.max_tokens, _SLICE_TOKENS)


class Export(Section):
    """The directory of the finished model."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the weights. `auto` means the dtype of the model in `model.init`; for a run that starts from random
    weights, it means the dtype of the training."""
    keep_apart: Annotated[Literal["auto", "always", "never"], Resolved("keep_apart")] = "auto"
    """Whether the run's model is its sub-models as they are, behind a router that reads the text so far (c-BTM, arXiv
    2303.14177), and not the MoE merged from them. `auto` measures both in a run with sub-models that starts from a
    trained model, and keeps them apart if the merged model is more than 0.005 nats per token worse on the validation
    text of any cluster; a run from random weights is merged. A cluster without a validation document does not count.
    `always` measures and keeps them apart; `never` merges and measures no ensemble. Both need sub-models. All
    sub-models run for every token. `moedisco export RUN_DIR` writes the merged model in any case, and `--to ensemble`
    the sub-models."""


class Tracking(Section):
    """Experiment trackers; each needs its library (`pip install 'moedisco-ray[NAME]'`)."""

    trackers: dict[
        Annotated[str, KeyOf(TRACKERS)], Literal[True] | Annotated[str, Field(min_length=1, max_length=256)]
    ] = Field({}, max_length=16)
    """Name of the project or experiment by tracker: `wandb` (Weights & Biases), `mlflow` (its server is that of the
    environment variable MLFLOW_TRACKING_URI), or true for the name of the run. `tensorboard` takes true alone and
    writes to RUN_DIR/tensorboard."""
