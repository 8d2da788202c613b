"""LLaMA-MoE v1 for transformers, which does not have it (arXiv 2406.16554; https://github.com/pjlab-sys4nlp/llama-moe).

The model is a LLaMA whose MLPs are divided into experts. A token's logits are W2 tanh(W1 x), with one row of W2 per
expert and all of W1 in common. The k best logits are selected; the weights are their softmax, multiplied by
`score_scale_factor`.

In training, the original adds noise to the logits, whose size is learnt too. Here there is none. The weights of the
noise are kept as they are, so that the original's code reads a model that was trained here.

Everything else is transformers' LLaMA, in the frame of its Mixtral, which returns the logits of routers. In memory,
tensors have the names of other families. In files, they have those of the original. Importing this module registers the
model and these names.

Shapes: T tokens, D hidden, H hidden units of the router, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import use_experts_implementation
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moedisco_ray.core.families import PARTS


class LlamaMoEConfig(LlamaConfig):
    """Configuration of LLaMA-MoE, with the original's fields and two more that a sub-model needs.

    Attributes:
        intermediate_size: Hidden units of all experts of a layer together.
        size_experts: Hidden units of each expert, by layer; all must be equal.
        moe_intermediate_size: Hidden units of one expert. By default an even share of `intermediate_size`.
        gate_hidden_size: Hidden units of the router. By default the number of experts, which is all that the original
            knows.
    """

    model_type = "llama_moe"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts", "num_experts_per_tok": "num_selects"}
    base_model_tp_plan = None

    intermediate_size: int = 11_008
    num_experts: int = 16
    num_selects: int = 4
    size_experts: list[Any] | None = None
    score_scale_factor: float = 1.0
    moe_intermediate_size: int | None = None
    gate_hidden_size: int | None = None
    sliding_window: int | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.size_experts is not None and len({size for sizes in self.size_experts for size in sizes}) > 1:
            raise ValueError("size_experts: experts of different sizes are not supported")
        self.size_experts = None
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size, rest = divmod(self.intermediate_size, self.num_experts)
            if rest:
                raise ValueError(
                    f"intermediate_size {self.intermediate_size} is not a multiple of num_experts {self.num_experts}"
                )
        self.intermediate_size = self.num_experts * self.moe_intermediate_size
        self.gate_hidden_size = self.gate_hidden_size or self.num_experts
        super().__post_init__(**kwargs)


class LlamaMoERouter(MixtralTopKRouter):
    """The router: an MLP whose second layer has a row per expert."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        nn.Module.__init__(self)
        self.top_k, self.num_experts, self.hidden_dim = config.num_selects, config.num_experts, config.hidden_size
        self.scale = float(config.score_scale_factor)
        units = config.gate_hidden_size or config.num_experts
        self.hidden_weight = nn.Parameter(torch.empty(units, config.hidden_size))
        self.weight = nn.Parameter(torch.empty(config.num_experts, units))
        self.register_buffer("noise_weight", torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], and the weights and indices of the selected experts [T, K]."""
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE = functional.linear(torch.tanh(functional.linear(x_TD, self.hidden_weight)), self.weight)
        best_TK, index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        weight_TK = torch.softmax(best_TK, dim=-1, dtype=torch.float32).to(logits_TE.dtype)
        return logits_TE, weight_TK if self.scale == 1.0 else weight_TK * self.scale, index_TK


@use_experts_implementation
class LlamaMoEExperts(Qwen3MoeExperts):
    """The experts, stacked as those of other families.

    The module of the model has them, because transformers looks for the decorator there.
    """


class LlamaMoEBlock(nn.Module):
    """The MoE block."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        super().__init__()
        self.gate, self.experts = LlamaMoERouter(config), LlamaMoEExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The weighted sum of the selected experts' outputs, in the shape of the input."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weight_TK, index_TK = self.gate(x_TD)
        found: Tensor = self.experts(x_TD, index_TK, weight_TK)
        return found.reshape(hidden_states.shape)


class LlamaMoEDecoderLayer(MixtralDecoderLayer):
    """A decoder layer."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int) -> None:
        super(MixtralDecoderLayer, self).__init__()  # Mixtral's would make its own experts
        self.hidden_size = config.hidden_size
        self.self_attn, self.mlp = LlamaAttention(config, layer_idx), LlamaMoEBlock(config)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LlamaMoEPreTrainedModel(MixtralPreTrainedModel):
    """How new weights are drawn."""

    config_class = LlamaMoEConfig
    _no_split_modules: ClassVar[list[str]] = ["LlamaMoEDecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        **MixtralPreTrainedModel._can_record_outputs,  # noqa: SLF001 - a subclass
        "attentions": LlamaAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaMoEExperts | LlamaMoERouter):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, LlamaMoERouter):
            init.zeros_(module.noise_weight)


class LlamaMoEModel(LlamaMoEPreTrainedModel, MixtralModel):
    """The decoder."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LlamaMoEDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, MixtralForCausalLM):
    """The language model; its name is the one in published checkpoints."""

    def __init__(self, config: LlamaMoEConfig) -> None:
        MixtralPreTrainedModel.__init__(self, config)
        self.model = LlamaMoEModel(config)
        self.vocab_size, self.router_aux_loss_coef = config.vocab_size, config.router_aux_loss_coef
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_selects
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("llama_moe", LlamaMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(LlamaMoEConfig, LlamaMoEForCausalLM, exist_ok=True)
register_checkpoint_conversion_mapping(
    "llama_moe",
    [
        WeightRenaming("mlp.gate.gate_network.0.weight", "mlp.gate.hidden_weight"),
        WeightRenaming("mlp.gate.gate_network.2.weight", "mlp.gate.weight"),
        WeightRenaming("mlp.gate.weight_noise.weight", "mlp.gate.noise_weight"),
        *(
            WeightRenaming(rf"mlp.calculator.experts.weight_{part}.(\d+)", rf"mlp.experts.\1.{part}_proj.weight")
            for part in PARTS
        ),
        *get_checkpoint_conversion_mapping("qwen3_moe"),
    ],
    overwrite=True,
)
