from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from moedisco_ray.core.config.adapters import check_adapters
from moedisco_ray.core.config.apart import check_apart
from moedisco_ray.core.config.architecture import Architecture
from moedisco_ray.core.config.base import Section
from moedisco_ray.core.config.effects import NoEffect
from moedisco_ray.core.config.extent import check_extent
from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.model import Model
from moedisco_ray.core.config.optimizer import Optimizer
from moedisco_ray.core.config.owners import check_owners
from moedisco_ray.core.config.places import WritesTo, as_location
from moedisco_ray.core.config.pools import AnyPool, LowMemoryPool, Pools
from moedisco_ray.core.config.residence import check_residence
from moedisco_ray.core.config.sections import (
    Checkpoint,
    Clusters,
    Corpus,
    Evaluation,
    Export,
    Finetune,
    Merge,
    Recipe,
    Submodels,
    Tokenizer,
    Tokens,
    Tracking,
)
from moedisco_ray.core.config.sources import Source
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.store.locations import Location, is_uri, joined, working_directory

TagKey = Annotated[str, Field(max_length=63, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,62}$")]
TagValue = Annotated[str, Field(max_length=63, pattern=r"^[^\x00-\x1f\x7f]*$")]
MOST_TAGS = 16
Tags = Annotated[dict[TagKey, TagValue], Field(max_length=MOST_TAGS)]
"""Labels of a run."""

SecretName = Annotated[
    str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,50}(TOKEN|KEY|KEY_ID|SECRET|PASSWORD|USERNAME)$", examples=["HF_TOKEN"])
]
"""Name of a secret, which is that of its environment variable: other variables could change what a driver may do."""
MOST_SECRETS = 8
"""Maximum number of secrets of a run: the answer of a control service holds all of them."""

_MOST_SHOWN = 8
"""Maximum number of cluster counts that an error suggests."""

_CARRIES_STATE = "does not hold in recurrent layers, which carry a state from one document to the next; set it to false"
"""Why a model with recurrent layers cannot train with `within_documents`."""


class RunConfig(Section):
    """The configuration of a run; the command line, the service and the driver validate it with this model."""

    name: Annotated[str, NoEffect("it names the run directory")] = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,62}$")
    """Name of the run and of its directory, OUTPUT/NAME."""
    seed: int = Field(0, ge=0, lt=2**31)
    deterministic: bool = False
    """Train on GPUs with slower kernels that give the same bits each time, on equal cards, driver, torch and gang, or
    end with an error. Without it, results on GPUs differ by rounding; those on equal CPUs never do."""
    recipe: Annotated[Recipe | None, NoEffect("the settings of the phases and of the pool say what it decided")] = None
    """Which way to train the model. `joint` trains the whole MoE in one phase, on the cards that cost least for it (own
    cards: on those that take least time). `grown` trains a seed with a part of the experts, and all experts from the
    middle on, without sub-models. `members` trains the whole MoE on a low-memory card of each machine, on a part of the
    fine-tune's batch each, from random weights or a trained MoE; they combine their changes in 4 bits every 16 steps,
    and how much higher the loss ends is not known. `auto` is `joint` wherever the MoE fits the cards of a pool, or the
    main memory next to one (`host_memory_gb`), or `grown` if that reaches the same loss for less; with data owners,
    adapters, or an ensemble to measure, and where nothing else fits, it is what `tokens` says. Null means what `tokens`
    says. A run keeps the way that it began with, and with `members` the settings of the sub-models."""
    tags: Annotated[Tags, NoEffect("they are labels for people")] = Field(default_factory=dict)
    """Labels by which to find the run: at most 16 pairs of a key and a value, each of at most 63 characters."""
    secrets: Annotated[tuple[SecretName, ...], NoEffect("they let the driver in elsewhere")] = Field(
        (), max_length=MOST_SECRETS
    )
    """Environment variables of the driver with secrets, which no configuration may hold: WANDB_API_KEY, HF_TOKEN. A
    control service sets them from the secrets of the run's project, or of its owner (`moedisco secrets set NAME`).
    Without a service, they must be set where the run starts. Workers on other machines do not get them."""
    corpus: Corpus
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    tokens: Tokens = Tokens()
    clusters: Clusters = Clusters()
    submodels: Submodels = Submodels()
    merge: Merge = Merge()
    finetune: Finetune = Finetune()
    pools: Annotated[
        Pools, NoEffect("they say where work runs and what it costs; the precision that follows counts")
    ] = Pools()
    checkpoint: Annotated[Checkpoint, NoEffect("a resumed training continues as an undisturbed one would")] = (
        Checkpoint()
    )
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    tracking: Annotated[Tracking, NoEffect("trackers only read a run's events")] = Tracking()
    output: Annotated[
        Path | str, WritesTo("runs"), AfterValidator(as_location), NoEffect("it is where the run directory is made")
    ] = Path("runs")
    """Folder or URI in which the run directory is created. Several machines need a folder that all of them share, or
    the URI of a file system that pyarrow can write to (`s3://BUCKET/FOLDER`, `gs://`, `abfs://`). With a URI, each
    machine keeps a working copy of the run below MOEDISCO_CACHE_DIR (default: `~/.cache/moedisco`). All working copies
    of a machine together take at most MOEDISCO_CACHE_GB (default: half of the disk). Credentials come from each
    machine's environment or instance role. A control service accepts only the locations that its operator allows."""

    @property
    def location(self) -> Location:
        """Path or URI of the run: OUTPUT/NAME."""
        return joined(self.output, self.name) if is_uri(self.output) else Path(self.output) / self.name

    @property
    def directory(self) -> Path:
        """The run directory on this machine. If the run is at a URI, this is the working copy."""
        return working_directory(self.location)

    @property
    def finetune_pool(self) -> AnyPool:
        """The pool that fine-tunes the whole MoE."""
        return self.pools.low_memory if self.finetune.pool == "low_memory" else self.pools.high_memory

    @property
    def trainings(self) -> tuple[tuple[str, Optimizer, AnyPool], ...]:
        """Each section with the settings of trainings: its name, its optimizer, and the pool that trains with it."""
        return (
            ("submodels", self.submodels.optimizer, self.pools.low_memory),
            ("finetune", self.finetune.optimizer, self.finetune_pool),
        )

    @property
    def owners(self) -> tuple[str, ...]:
        """Data owners, in the order of their clusters, which follow those of the text without an owner."""
        return tuple(self.pools.owners)

    @property
    def cluster_count(self) -> int:
        """Number of clusters, and of sub-models."""
        return self.clusters.number

    @property
    def shared_clusters(self) -> int:
        """Number of clusters of the text without an owner."""
        return self.cluster_count - len(self.owners)

    @property
    def seed_members(self) -> int:
        """Number of members that train the seed at the same time, with null resolved."""
        settings = self.submodels
        wanted = self.shared_clusters if settings.seed_members is None else settings.seed_members
        return (
            1
            if settings.sync_every is None
            else max(1, min(wanted, self.tokens.seed // settings.optimizer.batch_tokens))
        )

    @property
    def needed_pools(self) -> tuple[tuple[AnyPool, int], ...]:
        """The pools that the run uses, each with the number of workers that it needs at the same time."""
        return self.pools.needed(self.finetune.pool, seed=self.tokens.seed > 0)

    @property
    def has_own_cards(self) -> bool:
        """Whether GPUs that the run uses cost nothing per hour, because they belong to the user."""
        types = (each for pool, _ in self.needed_pools for each in pool.node_types)
        return any(each.gpu and not each.price_per_hour for each in types)

    @property
    def alone_with_the_seed(self) -> str | None:
        """The setting for which one worker must train the seed; None if several can."""
        recipe = self.submodels.optimizer
        if recipe.block_steps:
            return f"submodels.optimizer.block_steps {recipe.block_steps}"
        if recipe.offload_moments:
            return f"submodels.optimizer.offload_moments {recipe.offload_moments}"
        if self.pools.low_memory.mixed or self.pools.low_memory.memory == "streamed":
            return f"pools.low_memory.{'types' if self.pools.low_memory.mixed else 'memory streamed'}"
        return f"submodels.seed_members {self.seed_members}" if self.seed_members > 1 else None

    def owner_of(self, cluster: int) -> str | None:
        """The data owner of a cluster; None: its text has no owner."""
        return self.owners[cluster - self.shared_clusters] if cluster >= self.shared_clusters else None

    @property
    def measures_start(self) -> bool:
        """Whether the evaluation measures the model of the run's start: a trained one that keeps its tokenizer."""
        return isinstance(self.model.init, LocalInit) and not self.tokenizer.replace

    @property
    def vectors_pool(self) -> LowMemoryPool | None:
        """The pool that computes document vectors; None if CPU tasks on any node compute them."""
        return self.pools.low_memory if self._needs_a_trained_model else None

    @model_validator(mode="before")
    @classmethod
    def _is_not_too_large(cls, raw: Any) -> Any:
        return check_extent(raw)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.model.starts_from_moe:
            if self.tokens.seed_share and (self.clusters.count != 1 or self.tokens.decoupled):
                raise ValueError(
                    "tokens.seed_share must be 0 with model.init.checkpoint, because the seed phase trains a part of "
                    "the experts, unless recipe is members; to start from a dense model, use model.init.upcycle"
                )
        elif self.model.init == "random" and self._needs_a_trained_model and not self.tokens.seed_share:
            raise ValueError(
                "clusters.vectors 'hidden_state' needs a trained model: set tokens.seed_share above 0, "
                "or use tfidf_svd or mean_token"
            )
        count = self.clusters.count
        if self.submodels.quorum is not None and count != "auto" and self.submodels.quorum > count:
            raise ValueError(
                f"submodels.quorum {self.submodels.quorum} is more than the {count} sub-models of clusters.count; "
                "lower it, or leave it out to wait for all"
            )
        check_apart(self)
        check_adapters(self)
        if self.finetune_pool.mixed:
            raise ValueError("finetune.pool must have one node type; remove pools.low_memory.types")
        for where, optimizer, _ in self.trainings:
            self._batch_is_whole(where, optimizer)
        tuning = self.finetune.optimizer
        if self.finetune_pool.most_workers > 1 and (tuning.block_steps or tuning.offload_moments):
            setting = "block_steps" if tuning.block_steps else "offload_moments"
            raise ValueError(
                f"finetune.optimizer.{setting} {getattr(tuning, setting)} needs the whole MoE on one worker, and "
                f"finetune.pool has up to {self.finetune_pool.most_workers}; leave it out, or use a pool of one worker"
            )
        if self.finetune.keep_optimizer_state and self.finetune.optimizer.name != self.submodels.optimizer.name:
            raise ValueError(
                f"finetune.optimizer.name {self.finetune.optimizer.name} cannot continue from the state of "
                f"submodels.optimizer.name {self.submodels.optimizer.name}; "
                "use the same one, or set finetune.keep_optimizer_state=false"
            )
        self._gang_divides_the_batch()
        check_owners(self)
        check_residence(self)
        self._unseen_text_is_no_corpus()
        return self

    @model_validator(mode="after")
    def _seed_members_sync(self) -> Self:
        if self.submodels.sync_every is None and (self.submodels.seed_members or 1) > 1:
            raise ValueError(
                f"submodels.seed_members {self.submodels.seed_members} needs syncs, at which the members combine their "
                "weights; set submodels.sync_every, or leave seed_members out to train the seed with one member"
            )
        return self

    @model_validator(mode="after")
    def _the_seed_has_its_workers(self) -> Self:
        low, batch = self.pools.low_memory, self.submodels.optimizer.batch_tokens
        wanted, sequences = low.seed_workers, batch // self.corpus.sequence_length
        if not self.tokens.seed or wanted in ("auto", 1, (1, 1)):
            return self
        if self.clusters.count == "auto" and self.submodels.seed_members is None:
            return self  # checked again with the number of clusters
        shown = list(wanted) if isinstance(wanted, tuple) else wanted
        if (alone := self.alone_with_the_seed) is not None:
            raise ValueError(
                f"pools.low_memory.seed_workers {shown} would train the seed together, and {alone} needs one worker; "
                "set seed_workers to 1, or leave the other out"
            )
        if isinstance(wanted, tuple) and sequences % wanted[0]:
            raise ValueError(
                f"pools.low_memory.seed_workers {shown}: {wanted[0]} workers do not divide the batch of {sequences} "
                "sequences; choose another smallest number, or change submodels.optimizer.batch_tokens"
            )
        return self

    @property
    def _needs_a_trained_model(self) -> bool:
        return self.tokens.decoupled and self.clusters.vectors == "hidden_state"

    def _batch_is_whole(self, where: str, optimizer: Optimizer) -> None:
        if optimizer.batch_tokens % self.corpus.sequence_length:
            raise ValueError(
                f"{where}.optimizer.batch_tokens {optimizer.batch_tokens} is not a multiple of corpus.sequence_length "
                f"{self.corpus.sequence_length}"
            )

    def _gang_divides_the_batch(self) -> None:
        pool, sequences = self.pools.high_memory, self.finetune.optimizer.batch_tokens // self.corpus.sequence_length
        if pool.elastic and all(sequences % n for n in range(pool.fewest_workers, pool.most_workers + 1)):
            raise ValueError(
                f"pools.high_memory.workers [{pool.fewest_workers}, {pool.most_workers}] holds no number that divides "
                f"the fine-tune's batch of {sequences} sequences; widen it, or change finetune.optimizer.batch_tokens"
            )

    def _unseen_text_is_no_corpus(self) -> None:
        trained_on = {_place(source) for source in self.corpus.sources}
        for i, source in enumerate(self.evaluation.sources):
            if _place(source) in trained_on:
                raise ValueError(
                    f"evaluation.sources.{i}.path {source.path!r} is a source of the corpus, which is trained on; name "
                    "other text"
                )

    @model_validator(mode="after")
    def _the_model_fits(self) -> Self:
        if self.model.known:
            if (setting := _lost_documents(self)) is not None:
                raise ValueError(f"{setting} true {_CARRIES_STATE}")
            if self.clusters.count != "auto":
                model = self.model
                check_division(model.family_name, model.architecture, self.clusters.count, model.experts_together)
        return self

    @model_validator(mode="after")
    def _every_training_has_a_batch(self) -> Self:
        count = 1 if self.clusters.count == "auto" else self.clusters.count  # checked again with the number of clusters
        for phase, whose, section, units in (
            ("seed", "the seed", "submodels", 1),
            ("submodels", "the sub-models", "submodels", count),
            ("finetune", "the fine-tune", "finetune", 1),
        ):
            tokens, batch = getattr(self.tokens, phase), getattr(self, section).optimizer.batch_tokens
            if 0 < tokens < units * batch:
                least, other = (f"{units} batches", " or clusters.count") if units > 1 else ("one batch", "")
                raise ValueError(
                    f"tokens.total {self.tokens.total} leaves {tokens:,} tokens to {whose}, less than {least} of "
                    f"{batch:,}; raise it, or lower {section}.optimizer.batch_tokens{other}"
                )
        return self


def _place(source: Source) -> str:
    """Normalise a source's path without accessing the disk, which the caller may not be allowed to read."""
    apart = "://" in source.path or source.path == "embedded"
    return source.path.rstrip("/") if apart else os.path.normpath(Path(source.path).absolute())


def _lost_documents(config: RunConfig) -> str | None:
    """The setting `within_documents` if it is on and recurrent layers of the model mix documents anyway; else None."""
    for section, optimizer, _ in config.trainings:
        if optimizer.within_documents:
            family, sizes = DECLARATIONS[config.model.family_name], config.model.architecture
            if family.recurrent_layers(sizes.fields, sizes.num_hidden_layers):
                return f"{section}.optimizer.within_documents"
    return None


def check_division(family: str, sizes: Architecture, clusters: int, together: int = 1) -> None:
    """Check that the model can be divided into one sub-model per cluster.

    Args:
        family: Model family.
        sizes: Sizes of the model.
        clusters: Number of sub-models.
        together: Number of neighbouring experts that stay in one sub-model.

    Raises:
        ValueError: `clusters` does not divide the number of experts, or divides the router in a way that it does not
            support.
    """
    experts = sizes.num_experts
    if experts // together % clusters:
        nearest = sorted(divisors(experts // together), key=lambda n: abs(n - clusters))[:_MOST_SHOWN]
        fits = ", ".join(str(n) for n in sorted(nearest))
        what = (
            f"{experts} experts"
            if together == 1
            else f"{experts // together} groups of model.init.split {together} experts"
        )
        raise ValueError(f"clusters.count {clusters} does not divide the model's {what}; use one of {fits}")
    try:
        router = DECLARATIONS[family].router
        router.submodel_fields(sizes.router_fields(router), experts, experts // clusters)
    except ValueError as error:
        raise ValueError(f"clusters.count {clusters} {error}") from error


def divisors(number: int) -> list[int]:
    """All divisors of a positive whole number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]
