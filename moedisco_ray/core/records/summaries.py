"""The outputs of a run's stages as typed records: their summaries, `clusters/report.json` and `evaluation.json`.

Writers build these records, and readers (the report, the model card, the command line, the service) open files as these
records. A reader accepts what an earlier or later version wrote: a part that it does not know stays in the record.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moedisco_ray.core.meanings import add_meanings

Contribution = Literal["finished", "checkpoint", "seed"]


class Record(BaseModel):
    """Base of all records."""

    # Commands that read no records need not wait until their checks are built.
    model_config = ConfigDict(frozen=True, extra="allow", json_schema_extra=add_meanings, defer_build=True)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; parts that were never set are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class UnitRecord(Record):
    """One training of a stage: the seed or one of its members, a sub-model, or the fine-tune."""

    name: str
    steps: int
    planned_steps: int
    tokens: int
    """Number of tokens that the training processed."""
    loss: float | None
    """Training loss at the end (nats per token); null before the first step."""
    seconds: float
    """Seconds in the training loop."""
    workers: float
    """Mean number of workers of the training."""
    held: dict[str, float]
    """Worker-seconds that the training used, by pool key."""
    contribution: Contribution
    """What the merge uses: the finished sub-model, its last checkpoint, or the seed that it started from."""
    reason: str | None
    """Why the training is unfinished; null if it is finished."""


class SyncRecord(Record):
    """One sync point, at which the backbones of sub-models, or all weights of the seed's members, were combined."""

    members: dict[str, int]
    """Number of tokens that each member of the sync was trained on since its last sync point, by name."""
    late: list[str]
    """Names of the members that the sync did not wait for."""
    bytes: dict[str, int] = Field(default_factory=dict)
    """Size of the weights that each member sent (bytes), by name."""


class CorpusSource(Record):
    """Counts of the text that was read from one source."""

    documents: int
    tokens: int
    bytes: int
    validation_documents: int
    files: int
    empty_files: int
    dropped_rows: int = 0
    """Number of rows that the source's `map` dropped."""
    skipped_rows: int = 0
    """Number of rows with conversations, completions or token ids that could not be read."""


class SkippedFile(Record):
    """A file that was not read."""

    source: str
    path: str
    reason: str


class OwnedText(Record):
    """Figures of the text that stays with its data owner."""

    documents: int
    tokens: int
    """Tokens of one pass over the training text, as packed."""
    bytes: int
    """Bytes of training text."""
    validation_documents: int = 0


class Departure(Record):
    """Something that left a data owner's storage for the run."""

    owner: str
    what: str
    bytes: int


class CorpusSummary(Record):
    """Summary of the corpus stage."""

    documents: int = 0
    validation_documents: int = 0
    duplicates: int = 0
    """Number of documents that were dropped because their text equals another document's."""
    near_duplicates: int = 0
    """Number of documents that were dropped because they are similar to another one (`corpus.near_duplicates`)."""
    tokens: int = 0
    """Number of packed training tokens in one pass over the corpus."""
    validation_tokens: int = 0
    bytes: int = 0
    """Size of the training text in bytes."""
    vocab_size: int = 0
    sources: dict[str, CorpusSource] = Field(default_factory=dict)
    skipped_files: int = 0
    """Number of files that could not be read, in sources with `on_error: skip`."""
    passed_over_files: int = 0
    """Number of files that were not read because their source holds tables."""
    skipped: list[SkippedFile] = Field(default_factory=list)
    """The first of the files that `skipped_files` and `passed_over_files` count."""
    cut_conversations: int = 0
    """Number of conversations, with copies, that exceed a training sequence and lose `cut_tokens` at the end."""
    cut_tokens: int = 0
    warnings: list[str] = Field(default_factory=list)
    owners: dict[str, OwnedText] = Field(default_factory=dict)
    """Text that stays with its data owner; no other figure includes it."""
    left: list[Departure] = Field(default_factory=list)
    """What left the owners' storages."""


class ClusterSize(Record):
    """Size of a cluster."""

    documents: int
    tokens: int


class ClusterSummary(Record):
    """Summary of the cluster stage; empty in a run without sub-models."""

    clusters: list[ClusterSize] = Field(default_factory=list)
    inertia: float | None = None
    """Mean squared distance to the centroids; null unless k-means made the clusters."""
    iterations: int | None = None
    silhouette: float | None = None
    nmi: float | None = None
    """Normalised mutual information between cluster and source; null if there is only one source."""
    balance: float | None = None
    """Number of tokens in the largest cluster, as a multiple of the mean over clusters."""
    warnings: list[str] = Field(default_factory=list)
    held: dict[str, float] = Field(default_factory=dict)
    """Worker-seconds that the document vectors took, by pool key."""


class ClusterEntry(ClusterSize):
    """A cluster and what it is about."""

    terms: list[str] = Field(default_factory=list)
    """The cluster's most typical words."""
    examples: list[str] = Field(default_factory=list)
    """Beginnings of the documents nearest to the cluster's centroid."""
    owner: str | None = None
    """Data owner of the cluster's text; null: it has none."""


class ClusterMap(Record):
    """A sample of documents, projected onto their vectors' first two principal directions; one list per column."""

    x: list[float] = Field(default_factory=list)
    y: list[float] = Field(default_factory=list)
    cluster: list[int] = Field(default_factory=list)
    source: list[str] = Field(default_factory=list)


class ClusterReport(Record):
    """Content of `clusters/report.json`."""

    clusters: list[ClusterEntry] = Field(default_factory=list)
    map: ClusterMap = ClusterMap()
    warnings: list[str] = Field(default_factory=list)


class TrainingSummary(Record):
    """Summary of a training stage: seed, sub-models or fine-tune."""

    units: list[UnitRecord] = Field(default_factory=list)
    syncs: list[SyncRecord] = Field(default_factory=list)
    """Sync points; empty if the trainings had none."""
    left: list[Departure] = Field(default_factory=list)
    """What left the data owners' storages."""


class MergeSummary(Record):
    """Summary of the merge stage."""

    weights: list[float] = Field(default_factory=list)
    """Weight of each sub-model in the mean of the backbones."""
    layers: list[dict[str, Any]] = Field(default_factory=list)
    """Accuracy, expert loads and output scale of each layer's router."""
    tensors: int = 0
    """Number of tensors of the merged model; `merge.json` says where each came from."""
    left: list[Departure] = Field(default_factory=list)
    """What left the data owners' storages."""


class Figures(Record):
    """How well a model predicts some documents."""

    loss: float | None = None
    """Mean loss (nats per token); null if there were no tokens."""
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


class ClusterFigures(Figures):
    """How well a model predicts the documents of one cluster."""

    cluster: int


class SourceFigures(Figures):
    """How well a model predicts the documents of one source."""

    source: str


class RouterRecord(Record):
    """What the router of one layer does with the validation text."""

    layer: int
    load: list[float]
    """Share of the top-k selections that each expert gets."""
    dead: int = 0
    """Number of experts whose load is less than 1 % of an even share."""
    token_entropy: float | None = None
    """Mean entropy of the router's probabilities for a token (nats)."""
    load_entropy: float | None = None
    """Entropy of `load` (nats)."""
    similarity: float | None = None
    """Mean over experts of the cosine of their weights with those of the closest other expert; 1 for copies."""
    nmi_cluster: float | None = None
    nmi_source: float | None = None


class StageFigures(Figures):
    """How well the models that a training stage made predict the validation text."""

    units: list[Figures] = Field(default_factory=list)
    """Figures of each sub-model on its own cluster."""


class StartFigures(Figures):
    """How well the model that the run started from predicts some text."""

    clusters: list[ClusterFigures] = Field(default_factory=list)
    sources: list[SourceFigures] = Field(default_factory=list)


class EnsembleFigures(Figures):
    """How well the sub-models as an ensemble predict the validation text."""

    clusters: list[ClusterFigures] = Field(default_factory=list)
    sources: list[SourceFigures] = Field(default_factory=list)


class ApartRecord(Record):
    """Whether a run's model is its sub-models as an ensemble, or merged; losses are those on the text of a cluster."""

    kept_apart: bool
    asked: bool = False
    """Whether the configuration asked for it, whatever was measured."""
    cluster: int | None = None
    """Cluster on which the merged model loses most; null if none was compared."""
    merged: float | None = None
    """Loss of the finished merged model there (nats per token), and of the ensemble as `apart`."""
    apart: float | None = None
    limit: float
    """Loss that the merge may cost (nats per token)."""
    documents: int = 0
    unmeasured: list[int] = Field(default_factory=list)
    """Clusters without a validation document, which do not count."""


class UnseenFigures(Figures):
    """How well a model predicts text that it was never trained on."""

    sources: list[SourceFigures] = Field(default_factory=list)
    trained_on: int = 0
    """Number of documents that were left out because the corpus contains them."""
    skipped: list[dict[str, Any]] = Field(default_factory=list)
    """`path` and `reason` of files that could not be read."""
    start: StartFigures | None = None
    """The model that the run started from, on the same text."""


class OwnerFigures(Figures):
    """How well the finished model predicts the held-out text of a data owner."""

    stages: dict[str, Figures] = Field(default_factory=dict)
    """Figures of earlier models: the seed, the owner's own sub-model (`submodels`) and the merged model."""


class TaskFigures(Record):
    """Results of lm-eval on one task file."""

    task: str
    examples: int
    acc: float | None
    """Share of examples that the model answers correctly, by the likelihood of each choice."""
    acc_stderr: float | None = None
    acc_norm: float | None = None
    """Share of examples that the model answers correctly if the likelihood of each choice is divided by the choice's
    length."""
    acc_norm_stderr: float | None = None
    chance: float | None = None
    """Expected accuracy of random guessing."""


class EvaluationRecord(Figures):
    """`evaluation/evaluation.json`: the finished model on the validation text, and whatever else was measured."""

    digest: str | None = None
    """SHA-256 of the texts and token ids: losses of equal digests can be compared; null in records without one."""
    clusters: list[ClusterFigures] = Field(default_factory=list)
    sources: list[SourceFigures] = Field(default_factory=list)
    routers: list[RouterRecord] = Field(default_factory=list)
    load_by_cluster: list[list[float]] = Field(default_factory=list)
    load_by_source: dict[str, list[float]] = Field(default_factory=dict)
    specialisation: dict[str, float | None] = Field(default_factory=dict)
    """Normalised mutual information between a document's main expert and its `cluster` or `source`."""
    stages: dict[str, StageFigures] = Field(default_factory=dict)
    start: StartFigures | None = None
    """The model that the run started from, before any training; null for random weights, and if it was not measured."""
    ensemble: EnsembleFigures | None = None
    """The sub-models as an ensemble (c-BTM, arXiv 2303.14177); null if it was not measured."""
    apart: ApartRecord | None = None
    """Whether the sub-models stay apart; null if they were not measured as an ensemble."""
    unseen: UnseenFigures | None = None
    xz_bits_per_byte: float | None = None
    """Bits per byte of the validation text if xz compresses it, as a figure that every language model should beat."""
    lm_eval: list[TaskFigures] = Field(default_factory=list)
    owners: dict[str, OwnerFigures] = Field(default_factory=dict)
    """Figures on the held-out text of data owners, measured on their own nodes."""

    @property
    def is_empty(self) -> bool:
        return not self.model_fields_set


class EvaluateSummary(Record):
    """Summary of the evaluate stage."""

    perplexity: float | None
    bits_per_byte: float | None
    documents: int
    tokens: int
    left: list[Departure] = Field(default_factory=list)
    """What left the data owners' storages."""
