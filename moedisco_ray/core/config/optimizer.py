"""How one training updates its weights: optimizer, learning-rate schedule, batches, precision and memory."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moedisco_ray.core.config.base import LARGEST, Section
from moedisco_ray.core.config.effects import Resolved
from moedisco_ray.core.config.pool import Pool

Precision = Literal["fp32", "bf16"]

MOST_RANK = 4096
"""Maximum rank of an adapter; a larger one has no fewer parameters than the matrices of large models."""


def precision_on(*, bf16: bool) -> Precision:
    """Default precision on cards with bf16, and on others."""
    return "bf16" if bf16 else "fp32"


class Optimizer(Section):
    """Settings of one training: optimizer, learning-rate schedule, batches and precision."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` trains the layers' weight matrices with Muon, each expert's matrices separately, and all other weights
    with AdamW at the same learning rate. Weights, gradients and optimizer state then take a quarter less memory,
    because Muon stores one moment where AdamW stores two."""
    lr: float = Field(1e-3, gt=0)
    schedule: Literal["constant", "cosine", "wsd", "run_cosine"] = "constant"
    """Schedule of the learning rate. `cosine` lowers it to a tenth of `lr` over the whole training, `wsd` (warm-up,
    stable, decay) over the last fifth of the steps. `run_cosine` is one cosine over all tokens of the run: if
    `submodels` and `finetune` both have it, with the same `lr` and `warmup`, each training begins at the rate at which
    the one before ended."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the steps during which the learning rate rises linearly from 0, at the start of the training; with
    `run_cosine`, share of the run's tokens, at its start. A later phase then has no warm-up, even if it begins with a
    new optimizer state."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay: each step multiplies the weights, but not norms and biases, by 1 - rate x this."""
    batch_tokens: int = Field(16_384, gt=0, le=LARGEST)
    """Number of tokens in one step, over all workers."""
    micro_batch: int | None = Field(None, ge=1, le=LARGEST)
    """Number of sequences in one forward pass of a worker. Null means the worker's whole share of the batch, or, on a
    GPU, as much of it as fits the memory. A smaller value needs less memory and gives the same result."""
    precision: Annotated[Literal["auto", "fp32", "bf16", "pure_bf16"], Resolved("precision")] = "auto"
    """`fp32` and `bf16` are the arithmetic of the forward and backward pass, over fp32 weights, gradients and optimizer
    state (16 bytes per parameter). `pure_bf16` stores these in bf16 too, with stochastic rounding (8 bytes). `auto` is
    bf16 on a GPU of compute capability 8.0 or more, and fp32 on older GPUs (T4, V100) and on a CPU. A training in bf16
    may compute its few products in fp32 with TF32; a training in fp32 never does."""
    within_documents: bool = False
    """Let each token attend only to its own document, not to the other documents that are packed into the same
    sequence. The demo reaches 4 to 7 % fewer bits per byte with it if a sequence holds six documents
    (`benchmarks/RESULTS.md`). A document begins with the tokenizer's BOS token, or, if it adds none, with the EOS token
    of the document before. Conversations, and all text of a training that has some, are kept apart without this setting
    too, unless layers are recurrent. On a GPU that computes in bf16 this needs no more memory. Otherwise, and in
    families with latent attention, layers get a mask, and keys and values are copied for every head."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass, which needs less memory and takes a third more time. Null means that
    this is done only on a GPU whose memory is too small without it."""
    moments: Literal["auto", "full", "fp8"] = "auto"
    """How AdamW's two moments are stored. `full` uses the dtype of the weights. `fp8` uses 8-bit numbers with one scale
    for each block of 128: 2 bytes per parameter for both moments. `auto` means `fp8` on a GPU whose memory is too small
    for `full`, and `full` otherwise."""
    offload_moments: bool | None = None
    """Keep AdamW's moments in the machine's main memory and update the weights in parts. The result is the same, but
    training is slower. The model must be on one worker. Null means that this is done only on a GPU whose memory is too
    small without it."""
    block_steps: int | None = Field(None, ge=0, le=LARGEST)
    """Number of steps for which one block (a decoder layer, the embedding or the head) is trained before the next one,
    in a seeded order (block coordinate descent). Only the block that is trained has gradients and moments. Blocks need
    AdamW and a model on one worker. With 0, all weights are trained in every step. Null means 100 on a GPU whose memory
    is too small without blocks, and 0 otherwise."""

    compile: bool | None = None
    """Compile the decoder layers with `torch.compile`, which fuses small operations; of layers with several experts
    only attention and norms are compiled, and with `gradient_checkpointing` nothing. Null means that a training of half
    an hour or more on one GPU tries it in its first step, and keeps it if loss and gradient are the same up to rounding
    and the micro-batch takes less time; its log says so. With true, the first step waits for the compiler, and every
    machine that trains needs gcc (on a CPU, g++). Losses differ from those without `compile` by rounding. A resumed
    training still equals an uninterrupted one bit for bit on CPUs of one kind. Plans count neither the time nor the
    memory that it saves."""

    @model_validator(mode="after")
    def _only_adamw_saves_memory(self) -> Self:
        if self.name == "muon":
            settings = {
                "moments": self.moments == "fp8",
                "offload_moments": self.offload_moments,
                "block_steps": self.block_steps,
            }
            for setting, value in settings.items():
                if value:
                    raise ValueError(
                        f"{setting} {getattr(self, setting)} needs the optimizer adamw; leave it out with muon"
                    )
        return self

    @property
    def state(self) -> Precision:
        """Dtype of weights, gradients and optimizer state."""
        return "bf16" if self.precision == "pure_bf16" else "fp32"

    def arithmetic(self, *, bf16: bool) -> Precision:
        """Dtype in which the forward and backward pass compute, on cards with bf16 or on others."""
        match self.precision:
            case "auto":
                return precision_on(bf16=bf16)
            case "pure_bf16":
                return "bf16"
            case precision:
                return precision

    def on(self, pool: Pool) -> Self:
        """The settings with fp32 in place of `auto`, on GPUs that have no bf16; all other settings as they are."""
        if self.precision != "auto" or not pool.gpu or pool.bf16:
            return self
        return self.model_copy(update={"precision": precision_on(bf16=False)})


class Lora(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + (alpha / rank) B A replaces a frozen weight W; A and B train."""

    base: Literal["full", "nf4"] = "full"
    """How the frozen weights that have adapters are kept during a training. `full` uses the dtype of the arithmetic.
    `nf4` uses 4.13 bits per weight (QLoRA, arXiv 2305.14314), and each pass computes with the rounded weights. The
    adapters are merged into the weights of the start, which are not rounded. Needs a `rank` above 0."""

    rank: int = Field(0, ge=0, le=MOST_RANK)
    """Rank of the adapters, such as 16; 0 trains all weights. Each matrix of the layers (attention, experts, shared
    experts, dense MLPs) has an adapter, and each expert has its own. Everything else is frozen: embedding, head, norms,
    biases and routers. Frozen weights have neither gradients nor optimizer state, and are stored in the dtype of the
    arithmetic. At the end the adapters are merged into the weights, and are also stored apart, as a PEFT adapter.
    Adapters need a trained model, AdamW without `block_steps`, and one worker: in `submodels`, a start in `model.init`
    without a seed phase and without `sync_every`; in `finetune`, a trained MoE in `model.init.checkpoint` or
    sub-models, and a pool of one worker or with `memory: streamed`."""
    alpha: float = Field(16.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""

    @model_validator(mode="after")
    def _only_frozen_weights_are_rounded(self) -> Self:
        if self.base == "nf4" and not self.rank:
            raise ValueError(
                "base nf4 rounds frozen weights, and rank 0 freezes none; set rank, such as 16, or leave base out"
            )
        return self
