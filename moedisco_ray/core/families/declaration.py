"""The form of a family's declaration: everything that this project knows about one `model_type` of transformers.

Decompose, merge, training, the plan and the export read declarations; none of them knows a family by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moedisco_ray.core.families.composite import Composite
from moedisco_ray.core.families.recurrence import Recurrence
from moedisco_ray.core.families.router import Router

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")
Initial = Literal["zeros", "ones", "log_uniform"]
"""How a random start fills a tensor; `log_uniform` is the logarithm of numbers that are uniform between 0.01 and 16."""
Value = bool | int | float | str | None
"""A value of `model.config.fields`."""

NORMS = r"(input|post_attention)_layernorm\.weight"
POST_NORMS = r"post_(attention|feedforward)_layernorm\.weight"
"""Norms of the output of the attention and of the experts, in families that do not normalise their input."""
ATTENTION = r"self_attn\.[qkvo]_proj\.weight"
ATTENTION_BIAS = r"self_attn\.[qkvo]_proj\.bias"
QK_NORM = r"self_attn\.[qk]_norm\.weight"
LATENT_ATTENTION = r"self_attn\.(q|q_a|q_b|kv_a|kv_b|o)_proj(_with_mqa)?\.(weight|bias)"
LATENT_NORM = r"self_attn\.(q|kv)_a_layernorm\.weight"
DENSE_MLP = r"mlp\.(gate|up|down)_proj\.weight"
"""MLP of a dense layer, which some families have between or before their MoE layers."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention of a family's layers.

    Attributes:
        latent: Whether keys and values are compressed (multi-head latent attention, DeepSeek-V2, arXiv 2405.04434).
        partial_rotation: Whether positions rotate only a part of each head, which copies queries, keys and the output.
        own_head_dim: Whether heads may have another size than hidden_size / num_attention_heads.
        biases: Projections that have a bias: `qkv`, `qkvo`, or none.
        bias_field: Configuration field that switches the biases; None: they always exist.
        qk_norm: Whether queries and keys are normalised per head, or over all heads.
        qk_norm_field: Configuration field that switches these norms; None: they always exist.
        sinks: Whether each head has a learnt logit that attends to nothing; such attention stores its scores.
        own_rotation: Whether every layer makes its own fp32 cosines and sines of the positions.
        output_gate: Whether a sigmoid of the layer's input multiplies the output, by rows of the query projection.
    """

    latent: bool = False
    partial_rotation: bool = False
    own_head_dim: bool = False
    biases: Literal["", "qkv", "qkvo"] = ""
    bias_field: str | None = None
    qk_norm: Literal["head", "full"] | None = None
    qk_norm_field: str | None = None
    sinks: bool = False
    own_rotation: bool = False
    output_gate: bool = False


@dataclasses.dataclass(frozen=True)
class SharedExpert:
    """The expert of a layer that every token passes through. It belongs to the backbone.

    Attributes:
        module: Name of the expert in the MoE block.
        stored: Name of the expert in checkpoints; None: the same.
        gate: Name of the layer whose sigmoid weights the expert; None: its weight is 1.
        size_field: Configuration field with the expert's hidden size; None: the size of `count_field` routed experts.
        count_field: Configuration field with the number of routed experts that the shared expert is as large as.
    """

    module: str
    stored: str | None = None
    gate: str | None = None
    size_field: str | None = None
    count_field: str | None = None

    @property
    def name(self) -> str:
        """Name of the expert in checkpoints, relative to the MoE block."""
        return self.stored or self.module

    @property
    def pattern(self) -> str:
        """Regular expression of the shared expert's tensors, relative to the layer."""
        gate = rf"|mlp\.{self.gate}\.weight" if self.gate else ""
        return rf"mlp\.{self.name}\.(gate|up|down)_proj\.weight{gate}"


@dataclasses.dataclass(frozen=True)
class Gguf:
    """How llama.cpp runs a family, for GGUF files.

    Attributes:
        architecture: Name of the family in a GGUF file.
        fixed: Values that llama.cpp takes for granted, by configuration field; models with another value have no GGUF
            file.
        in_pairs: Whether llama.cpp rotates neighbouring pairs of a head's dimensions, where transformers rotates its
            two halves.
        reads_tied: Whether llama.cpp uses the embedding as the output layer if the file has no output layer.
        same: Configuration fields that must have the value of another one.
        scaled_rotation: Kinds of rotary scaling that llama.cpp computes as transformers does.
        needs_interval: Whether a file must say the interval of MoE layers, and the size of the shared expert.
        scales: Configuration fields with factors that a file must hold, and their keys in it, without the architecture.
        tiles_values: Whether llama.cpp orders the value heads of a recurrent layer by their number within the group of
            a key head, where transformers orders them by group.
        has_sections: Whether a file must divide the rotary frequencies among time, height and width, which are equal in
            a text.
    """

    architecture: str
    fixed: Mapping[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    in_pairs: bool = False
    reads_tied: bool = True
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scaled_rotation: tuple[str, ...] = ("linear", "yarn")
    needs_interval: bool = False
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tiles_values: bool = False
    has_sections: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: The Hugging Face `model_type`.
        num_experts_field: Configuration field with the number of routed experts.
        expert_size_field: Configuration field with an expert's hidden size.
        summed_size_field: Configuration field with the hidden size of all experts of a layer together, for checkpoints
            without `expert_size_field`; None: there is none.
        backbone: Regular expressions of the backbone's tensors, relative to the layer.
        router: How the router selects and weights experts.
        attention: The attention of every layer that has attention.
        recurrence: Layers with a recurrent state in place of attention; None: there are none.
        shared: The shared expert; None: there is none.
        block: Name of the MoE block in a checkpoint; models in memory call it `mlp`.
        projections: Checkpoint names of an expert's gate, up and down projection.
        expert_name: Form of the checkpoint names of an expert's tensors, without the block.
        stacks: Names of the tensors that hold all experts of a layer, along the first axis, in checkpoints and in
            memory; empty: checkpoints have one tensor per expert and projection.
        interleaved: Whether stacks are transposed, and the columns of gate and up alternate.
        renamed: Checkpoint names of the MoE block's tensors that have other names in memory, by these names, without
            the block.
        returns_scores: Whether the MoE block returns the router's scores too.
        expert_activations: Vectors of an expert's hidden size that autograd saves per token and expert.
        norms_in_fp32: Whether norms multiply by their weight in fp32.
        layer_norms: Whether norms are LayerNorms, with a bias, in place of RMSNorms.
        outside: Names of further backbone tensors outside the decoder layers.
        head_bias_field: Configuration field that gives the output head a bias; None: it never has one.
        initial: How random starts fill tensors whose name ends with a text, the first that fits, where this is not the
            rule: norms are one, biases zero, and other tensors normally distributed.
        separates_documents: Whether transformers hides other documents of a packed sequence when positions start again.
        fields: Configuration fields that only some families have, with defaults for a model with random weights.
        unsaid: Values of a checkpoint without some field in its `config.json`, where transformers has another default
            than a model with random weights.
        constants: Configuration fields that have one value here.
        embedding_factor: Configuration field with a factor on the embeddings, also the name of the attribute of
            transformers' model that holds it; None: there is none.
        logits_divisor: Configuration field with a number that divides the logits; None: there is none.
        choices: Supported values, by configuration field; models with another value are refused.
        dense: Dense models (`model_type`) whose MLP can become every expert, with the configuration fields that such an
            MoE needs.
        dense_layers_field: Configuration field with the number of dense layers before the MoE layers; None: there are
            none.
        dense_layers_list: Configuration field with the kind of each layer's MLP, `dense` or `sparse`, which
            transformers reads in place of their number; None: there is none.
        last_layer_field: Configuration field with the index of the last MoE layer, where -1 means the last layer;
            models with dense layers after it are refused. None: there is no such field.
        prediction_layers_field: Configuration field with the number of layers after the last one that predict further
            tokens, which transformers does not load, and which are left out here too; None: there are none.
        prediction_prefix: Prefix of the names of these layers' tensors; None: their names continue those of the decoder
            layers.
        own_tokenizer: Whether transformers reads every tokenizer next to such a model as that of the published models.
        derived: Ends of the names of stored tensors that follow from the configuration, and are not read.
        composite: Models that hold one of this family or of its dense relatives; None: there are none.
        architecture: Name of the model's class in published checkpoints, by which vLLM finds its own; None: that in
            transformers.
        gguf: How llama.cpp runs the family; None: it does not know the family, or computes something else, see
            `not_in_gguf`.
        not_in_gguf: What llama.cpp computes differently, as the end of a sentence with llama.cpp as subject.
        scalings: Kinds of rotary scaling that the family has, each with the parameters that it needs more than other
            families do; None: all kinds.
        module: Module whose import adds the family to transformers; None: transformers has it.
        in_transformers_4: Whether transformers 4.57 has the family.
    """

    name: str
    num_experts_field: str
    expert_size_field: str
    backbone: tuple[str, ...]
    router: Router = dataclasses.field(default_factory=Router)
    attention: Attention = dataclasses.field(default_factory=Attention)
    recurrence: Recurrence | None = None
    shared: SharedExpert | None = None
    summed_size_field: str | None = None
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_name: str = "experts.{expert}.{projection}.weight"
    stacks: tuple[str, ...] = ()
    interleaved: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    returns_scores: bool = False
    expert_activations: int = 4
    norms_in_fp32: bool = False
    layer_norms: bool = False
    outside: tuple[str, ...] = ()
    head_bias_field: str | None = None
    initial: Mapping[str, Initial] = dataclasses.field(default_factory=dict)
    separates_documents: bool = True
    fields: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    unsaid: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    embedding_factor: str | None = None
    logits_divisor: str | None = None
    choices: Mapping[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    dense: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    dense_layers_field: str | None = None
    dense_layers_list: str | None = None
    last_layer_field: str | None = None
    prediction_layers_field: str | None = None
    prediction_prefix: str | None = None
    own_tokenizer: bool = False
    derived: tuple[str, ...] = ()
    composite: Composite | None = None
    architecture: str | None = None
    gguf: Gguf | None = None
    not_in_gguf: str = "does not know it"
    scalings: Mapping[str, tuple[str, ...]] | None = None
    module: str | None = None
    in_transformers_4: bool = True

    @property
    def own_expert_size(self) -> bool:
        """Whether experts and dense layers have configuration fields of their own for their hidden size."""
        return self.expert_size_field != "intermediate_size"

    def projection(self, part: Part) -> str:
        """Name of a projection of an expert in a checkpoint."""
        return self.projections[PARTS.index(part)]

    def expert_size(self, config: Mapping[str, Any], experts: int | None) -> Any:
        """An expert's hidden size, from the values of a `config.json`; None if they do not say it.

        Args:
            config: Values of the `config.json`.
            experts: Number of routed experts.
        """
        size, total = config.get(self.expert_size_field), config.get(self.summed_size_field or "")
        return total // experts if size is None and experts and isinstance(total, int) else size

    def in_checkpoint(self, name: str) -> str:
        """Name in a checkpoint, relative to the layer, of a tensor with a name in memory relative to the MoE block."""
        return f"{self.block}.{self.renamed.get(name, name)}"

    def expert_axis(self, name: str) -> int:
        """The axis that counts experts, of a router's tensor or a stack of experts with this name."""
        correction = self.router.correction
        return self.router.correction_axis if correction is not None and name.endswith(correction) else 0

    def adds_one(self, key: str) -> bool:
        """Whether a tensor is a norm that multiplies by one plus its weight, and so starts at zero."""
        starts = [kind for end, kind in self.initial.items() if key.endswith(end)]
        return key.endswith("norm.weight") and starts[:1] == ["zeros"]

    def value(self, fields: Mapping[str, Any], name: str) -> Any:
        """A field of a model's configuration, or the family's default for it."""
        found = fields.get(name)
        return self.fields.get(name) if found is None else found

    def read_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The family's own fields in a `config.json`.

        Raises:
            ValueError: The kinds of layers do not alternate as in this family, or dense layers follow MoE layers.
        """
        found = {name: config[name] for name in self.fields if name in config}
        mlps = config.get(self.dense_layers_list or "")
        if self.dense_layers_field is not None and mlps is not None:
            found[self.dense_layers_field] = self._leading_dense(mlps)
        kinds = config.get("layer_types")
        if self.recurrence is not None and kinds is not None:
            layers = config.get("num_hidden_layers")
            if not isinstance(kinds, list) or len(kinds) != layers:
                raise ValueError(
                    f"layer_types: must be a list with a kind for each of {layers} layers; use another model"
                )
            field = self.recurrence.interval_field
            found[field] = self.recurrence.interval(kinds, int(self.value(config, field)))
        return found

    def _leading_dense(self, mlps: Any) -> int:
        count = mlps.index("sparse") if isinstance(mlps, list) and "sparse" in mlps else 0
        if mlps != self.dense_layer_kinds(count, len(mlps)):
            raise ValueError(f"{self.dense_layers_list}: dense layers must precede MoE layers; use another model")
        return count

    def dense_layer_kinds(self, dense: int, layers: int) -> list[str]:
        """The value of `dense_layers_list` for a number of dense layers, then MoE layers."""
        return ["dense"] * dense + ["sparse"] * (layers - dense)

    def check_choices(self, fields: Mapping[str, Any], layers: int) -> None:
        """Check the fields of a model's configuration that have a limited choice of values.

        Args:
            fields: The fields of the family that the configuration has.
            layers: Number of decoder layers.

        Raises:
            ValueError: A field has another value.
        """
        for name, values in self.choices.items():
            if name in fields and fields[name] not in values:
                allowed = " or ".join(map(repr, values))
                raise ValueError(
                    f"{name} {fields[name]!r}: {self.name} is supported with {allowed} only; use another model"
                )
        if self.recurrence is not None:
            self.recurrence.check({name: self.value(fields, name) for name in self.recurrence.fields}, layers)
        last = self.last_layer_field
        if last is not None and fields.get(last, -1) not in (-1, layers - 1):
            raise ValueError(
                f"{last} {fields[last]!r}: {self.name} is supported with {layers - 1} only; use another model"
            )

    def check_scaling(self, scaling: Mapping[str, Any] | None) -> None:
        """Check the scaling of rotary positions.

        Raises:
            ValueError: The family has no such scaling, or needs a further parameter.
        """
        if scaling is None or self.scalings is None:
            return
        needed = self.scalings.get(scaling["rope_type"])
        if needed is None:
            allowed = " or ".join(self.scalings)
            raise ValueError(
                f"rope_scaling.rope_type {scaling['rope_type']!r}: {self.name} has only {allowed}; use it, or remove "
                "rope_scaling"
            )
        if missing := [name for name in needed if scaling.get(name) is None]:
            raise ValueError(
                f"rope_scaling: rope_type {scaling['rope_type']!r} of {self.name} also needs {' and '.join(missing)}"
            )

    def has_biases(self, fields: Mapping[str, Any]) -> bool:
        """Whether a model with these configuration fields has biases in its attention."""
        field = self.attention.bias_field
        return bool(self.attention.biases) and (field is None or bool(self.value(fields, field)))

    def keeps_biases(self, dense: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether the MoE made of a dense model has biases of queries, keys and values, and of the attention output.

        Args:
            dense: The `config.json` of the dense model.
        """
        # Qwen2 always has biases, and no configuration field says so.
        has = dense.get("model_type") == "qwen2" or bool(dense.get("attention_bias"))
        return has and self.attention.biases != "", has and self.attention.biases == "qkvo"

    def fields_of_dense(self, dense: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration fields of the MoE of a dense model that the dense model has not, or has in another form.

        Args:
            dense: The `config.json` of the dense model.
        """
        field = self.attention.bias_field
        biases = {} if field is None else {field: any(self.keeps_biases(dense))}
        return {**self.dense[str(dense.get("model_type"))], **biases}

    def has_qk_norm(self, fields: Mapping[str, Any]) -> bool:
        """Whether a model with these configuration fields normalises queries and keys."""
        field = self.attention.qk_norm_field
        return self.attention.qk_norm is not None and (field is None or bool(self.value(fields, field)))

    def dense_layers(self, fields: Mapping[str, Any]) -> int:
        """Number of dense layers before the MoE layers of a model with these configuration fields."""
        return 0 if self.dense_layers_field is None else int(self.value(fields, self.dense_layers_field) or 0)

    def recurrent_layers(self, fields: Mapping[str, Any], layers: int) -> int:
        """Number of layers with a recurrent state, of all decoder layers of a model with these configuration fields."""
        return (
            0 if self.recurrence is None else layers - layers // int(self.value(fields, self.recurrence.interval_field))
        )
