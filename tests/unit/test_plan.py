import heapq
import itertools
import json
import math
import weakref
from collections import Counter

import pytest
import torch
import yaml
from drawn import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from docs.plans import planned
from moedisco_ray.core.config import FAMILIES, Architecture, LowMemoryPool, Optimizer, RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import specialise
from moedisco_ray.models.attention import attend_within_documents, document_arguments
from moedisco_ray.plan import (
    GIB,
    Plan,
    build_plan,
    count_parameters,
    fitted,
    planned_vocab_size,
    submodel_architecture,
    tokenizer_vocab_size,
    with_cluster_count,
    worker_memory,
)
from moedisco_ray.plan import memory as memory_module
from moedisco_ray.plan.activation_memory import (
    activation_bytes_per_token,
    frozen_bytes_per_token,
    layer_bytes_per_token,
)
from moedisco_ray.plan.attention_memory import needs_mask
from moedisco_ray.plan.build import _trained
from moedisco_ray.plan.cost import flops_per_token, mixed_cost, training_cost
from moedisco_ray.plan.fitting import Room, by_cost, choose, combinations
from moedisco_ray.plan.memory import largest_block
from moedisco_ray.policies.placement import Need, NodeType, place
from moedisco_ray.training import muon as muon_module
from moedisco_ray.training import optimizer as optimizer_module
from moedisco_ray.training.optimizer import adamw

VOCAB = 96
TOKENS = 128
# Qwen1.5-MoE-2.7B re-configured to four experts, as in the paper: a sub-model of it has 2.06 billion parameters.
QWEN = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 151_936,
}


def hf_config(family, architecture, vocab_size=VOCAB):
    sizes = architecture.model_dump(
        exclude={
            "num_experts",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "vocab_size",
            "head_dim",
            "max_position_embeddings",
            "rope_theta",
            "num_key_value_heads",
            "norm_topk_prob",
            "fields",
        }
    )
    sizes |= {"vocab_size": vocab_size, "num_key_value_heads": architecture.key_value_heads, "pad_token_id": None}
    page = DECLARATIONS[family]
    sizes |= {name: page.value(architecture.fields, name) for name in page.fields} | {
        page.num_experts_field: architecture.num_experts,
        page.expert_size_field: architecture.moe_intermediate_size,
    }
    if page.dense_layers_list is not None:
        layers = architecture.num_hidden_layers
        sizes[page.dense_layers_list] = page.dense_layer_kinds(page.dense_layers(architecture.fields), layers)
    if "intermediate_size" in page.fields:
        sizes["intermediate_size"] = sizes["intermediate_size"] or architecture.moe_intermediate_size
    if page.shared is not None and page.shared.size_field is not None:
        sizes["shared_expert_intermediate_size"] = (
            architecture.shared_expert_intermediate_size or architecture.moe_intermediate_size
        )
    if page.router.normalises == "by_setting":
        sizes["norm_topk_prob"] = architecture.norm_topk_prob
    if page.attention.own_head_dim:
        sizes["head_dim"] = architecture.head_size
    return AutoConfig.for_model(family, **sizes)


def hf_counts(family, architecture):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(family, architecture))
    counts = dict.fromkeys(
        ("embedding", "attention", "norms", "router", "experts", "shared_expert", "dense", "head"), 0
    )
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        role = next(
            role
            for part, role in (
                ("shared_expert", "shared_expert"),
                ("experts", "experts"),
                ("mlp.gate.", "router"),
                (".router.", "router"),
                ("mlp.", "dense"),
                ("norm", "norms"),
                ("_attn", "attention"),
                ("embed", "embedding"),
                ("lm_head", "head"),
            )
            if part in name
        )
        counts[role] += tensor.numel()
    return counts


RECURRENT = [family for family, page in DECLARATIONS.items() if page.recurrence is not None]
CHANGES = [
    *itertools.product(FAMILIES, ({}, {"tie_word_embeddings": True}, {"num_experts": 6, "num_experts_per_tok": 3})),
    ("qwen3_moe", {"head_dim": 16}),
    ("mixtral", {"head_dim": 16}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 40}),
    ("qwen2_moe", {"fields": {"qkv_bias": False}}),
    *((family, {"num_key_value_heads": 2}) for family in FAMILIES if not DECLARATIONS[family].attention.latent),
    *(
        (family, {"fields": {"attention_bias": True}})
        for family in FAMILIES
        if "attention_bias" in DECLARATIONS[family].fields
    ),
    *(
        (
            family,
            {
                "num_hidden_layers": 3,
                "fields": {page.dense_layers_field: 1, "intermediate_size": 56, page.shared.count_field: 2},
            },
        )
        for family, page in DECLARATIONS.items()
        if page.dense_layers_field is not None
    ),
    *((family, {"fields": {"q_lora_rank": 12, "attention_bias": True}}) for family in ("deepseek_v2", "deepseek_v3")),
    ("glm4_moe", {"fields": {"use_qk_norm": True}}),
    *(
        (family, {"num_hidden_layers": 5, "fields": {"full_attention_interval": interval}})
        for family in RECURRENT
        for interval in (1, 2)
    ),
]


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=str)
def test_parameters_equal_the_hugging_face_models(family, changes):
    architecture = Architecture(**{"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 24} | changes)
    for shape in (architecture, submodel_architecture(family, architecture, 2)):
        ours = count_parameters(family, shape, VOCAB)
        theirs = hf_counts(family, shape)
        assert {role: getattr(ours, role) for role in theirs} == theirs
        assert ours.total == sum(theirs.values())
        assert ours.active == ours.total - theirs["experts"] * (1 - shape.num_experts_per_tok / shape.num_experts)


def test_a_submodel_has_its_share_of_experts_and_no_larger_top_k():
    whole = Architecture(num_experts=12, num_experts_per_tok=4)
    parts = [submodel_architecture("qwen3_moe", whole, clusters) for clusters in (1, 2, 6, 12)]
    assert [(part.num_experts, part.num_experts_per_tok) for part in parts] == [(12, 4), (6, 4), (2, 2), (1, 1)]


def saved_bytes(family, architecture, dtype, autocast, frozen=False, documents=False):
    model = AutoModelForCausalLM.from_config(hf_config(family, architecture)).to(dtype)
    specialise(model)
    if documents:
        attend_within_documents(model, "cpu", dtype)
    if frozen:
        model.requires_grad_(requires_grad=False)
        model.get_input_embeddings().weight.requires_grad_(requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no other tensor gets this address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        ids = torch.arange(TOKENS)[None] % VOCAB
        model.model(input_ids=ids, use_cache=False, **document_arguments(model, ids, ids % 50 if documents else None))
    return sum(storage.nbytes() for storage in storages.values())


KINDS = [*((family, 8) for family in FAMILIES), *((family, 1) for family in RECURRENT)]
"""Families, and the interval of attention among their recurrent layers: all layers are recurrent, or all have
attention."""


def one_and_three_layers(family, experts, interval=8):
    """Two depths of one model.

    What is saved once (masks, rotary tables, the last norm) cancels out in their difference.
    """
    latent = DECLARATIONS[family].attention.latent
    one = Architecture(
        hidden_size=256,
        num_hidden_layers=1,
        moe_intermediate_size=96,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        num_key_value_heads=None if latent else 2,
        # A CPU has no fused attention for values of another size than keys.
        fields={"v_head_dim": 48} if latent else {"full_attention_interval": interval} if family in RECURRENT else {},
    )
    return one, one.model_copy(update={"num_hidden_layers": 3})


@pytest.mark.parametrize(("family", "interval"), KINDS)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16", "autocast"]
)
@pytest.mark.parametrize("experts", [1, 4])
def test_activations_are_what_autograd_saves(family, interval, dtype, autocast, experts):
    torch.set_num_threads(1)
    small, large = one_and_three_layers(family, experts, interval)
    width = 2 if autocast else torch.finfo(dtype).bits // 8

    def planned(shape):
        parameters = count_parameters(family, shape, VOCAB)
        copies = width * (parameters.total - parameters.norms) if autocast else 0
        return copies + TOKENS * activation_bytes_per_token(
            family, shape, width, residual=torch.finfo(dtype).bits // 8, checkpointing=False, sequence_length=TOKENS
        )

    measured = saved_bytes(family, large, dtype, autocast) - saved_bytes(family, small, dtype, autocast)
    # one copy of a layer's input is 0.02 or more
    assert planned(large) - planned(small) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("family", "interval"), KINDS)
@pytest.mark.parametrize("experts", [1, 4])
def test_frozen_layers_save_what_is_planned(family, interval, experts):
    torch.set_num_threads(1)
    one, three = one_and_three_layers(family, experts, interval)
    measured = saved_bytes(family, three, torch.bfloat16, autocast=False, frozen=True) - saved_bytes(
        family, one, torch.bfloat16, autocast=False, frozen=True
    )
    width = torch.finfo(torch.bfloat16).bits // 8
    planned = (
        2
        * TOKENS
        * frozen_bytes_per_token(family, one, width, width, TOKENS, recurrent=family in RECURRENT and interval > 1)
    )
    if DECLARATIONS[family].attention.sinks:  # an upper bound
        assert measured <= planned <= 1.15 * measured
    else:
        assert planned == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not DECLARATIONS[family].attention.sinks])
@pytest.mark.parametrize(
    ("dtype", "autocast", "frozen"),
    [
        (torch.float32, False, False),
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, False, True),
    ],
    ids=["fp32", "bf16", "autocast", "frozen"],
)
def test_masks_of_documents_save_what_is_planned(family, dtype, autocast, frozen):
    torch.set_num_threads(1)
    one, three = one_and_three_layers(family, 4, interval=1)
    measured = [saved_bytes(family, shape, dtype, autocast, frozen, documents=True) for shape in (one, three)]
    width, residual = 2 if autocast else torch.finfo(dtype).bits // 8, torch.finfo(dtype).bits // 8
    layer = (frozen_bytes_per_token if frozen else layer_bytes_per_token)(
        family, one, width, residual, TOKENS, masked=True
    )
    matrices = 0
    if autocast:
        parameters = [count_parameters(family, shape, VOCAB) for shape in (one, three)]
        matrices = width * (parameters[1].total - parameters[1].norms - parameters[0].total + parameters[0].norms)
    assert 2 * TOKENS * layer + matrices == pytest.approx(measured[1] - measured[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_all_layers_save_one_mask_of_documents(dtype):
    _, three = one_and_three_layers("olmoe", 4)
    shape = three.model_copy(update={"num_key_value_heads": None})
    without, masked = (
        saved_bytes("olmoe", shape, dtype, autocast=False, documents=documents) for documents in (False, True)
    )
    plans = [
        activation_bytes_per_token(
            "olmoe",
            shape,
            dtype.itemsize,
            residual=dtype.itemsize,
            checkpointing=False,
            sequence_length=TOKENS,
            masked=each,
        )
        for each in (False, True)
    ]
    assert masked - without == pytest.approx(TOKENS * (plans[1] - plans[0]), rel=0.01)


def test_a_mask_is_planned_where_documents_need_one():
    within, shape = Optimizer(within_documents=True), Architecture()
    assert not needs_mask("qwen3_moe", shape, Optimizer(), gpu=0)
    assert not needs_mask("qwen3_moe", shape, within, gpu=1)
    assert needs_mask("qwen3_moe", shape, within, gpu=0)
    assert needs_mask("qwen3_moe", shape, within.model_copy(update={"precision": "fp32"}), gpu=1)
    assert needs_mask("qwen3_moe", shape.model_copy(update={"head_dim": 512}), within, gpu=1)
    assert all(needs_mask(family, shape, within, gpu=1) for family in ("deepseek_v3", "gpt_oss"))


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_the_others():
    one, many = Architecture(num_hidden_layers=1), Architecture(num_hidden_layers=9)

    def cost(shape, checkpointing):
        return activation_bytes_per_token(
            "qwen3_moe", shape, 2, residual=2, checkpointing=checkpointing, sequence_length=64
        )

    assert cost(many, checkpointing=True) - cost(one, checkpointing=True) == 8 * 2 * 256
    assert cost(many, checkpointing=True) < cost(many, checkpointing=False) / 4


@pytest.mark.parametrize(("precision", "sizes"), [("auto", (4, 4, 8)), ("pure_bf16", (2, 2, 4))])
@pytest.mark.parametrize("workers", [1, 4])
def test_state_bytes_per_parameter(precision, sizes, workers):
    shape = Architecture()
    total = count_parameters("qwen3_moe", shape, 1000).total
    memory = worker_memory(
        "qwen3_moe",
        shape,
        1000,
        Optimizer(precision=precision, gradient_checkpointing=True, micro_batch=1),
        sequence_length=64,
        gpu=1,
        workers=workers,
    )
    assert total % workers == 0
    weights, gradients, moments = (size * total // workers for size in sizes)
    assert (memory.weights, memory.optimizer) == (weights, moments)
    assert memory.gradients >= gradients, "with one tensor's new gradient in a later pass"
    assert memory.total == sum(memory.parts.values())


@pytest.mark.parametrize(("precision", "saved"), [("fp32", 4), ("pure_bf16", 2)])
def test_muon_has_one_moment_for_the_matrices_of_the_layers(precision, saved):
    shape = Architecture()
    parameters = count_parameters("qwen3_moe", shape, 1000)
    adamw_memory, muon_memory = (
        worker_memory("qwen3_moe", shape, 1000, Optimizer(name=name, precision=precision), sequence_length=1024, gpu=1)
        for name in ("adamw", "muon")
    )
    matrices = parameters.attention + parameters.experts
    assert adamw_memory.optimizer - muon_memory.optimizer == saved * matrices
    assert muon_memory.total < adamw_memory.total


def test_the_room_of_muons_step_is_an_upper_bound_of_what_it_takes(monkeypatch):
    monkeypatch.setattr(muon_module, "STEP_ELEMENTS", 1 << 16)
    weight = torch.nn.Parameter(torch.zeros(16, 256, 128, dtype=torch.bfloat16))
    recipe = Optimizer(name="muon", precision="pure_bf16")
    optimizer = muon_module.Muon(
        [{"params": [weight], "halves": 2}, {"params": [torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]}],
        recipe,
        lambda groups: adamw(groups, recipe, 0),
        0,
        0,
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with LiveBytes([weight, weight.grad, *optimizer.state[weight].values()]) as live:
        optimizer.step()
    assert 12 << 16 < live.peak <= memory_module.MUON_BYTES << 16


def test_copies_for_low_precision_arithmetic():
    shape = Architecture()
    parameters = count_parameters("qwen3_moe", shape, 1000)
    layer = (parameters.total - parameters.embedding - parameters.head) // shape.num_hidden_layers

    def copies(gpu, workers=1, **values):
        memory = worker_memory(
            "qwen3_moe", shape, 1000, Optimizer(**values), sequence_length=1024, gpu=gpu, workers=workers
        )
        return memory.compute_copies

    assert copies(0) == 0
    assert copies(1) == 2 * parameters.total  # autocast
    assert copies(1, precision="pure_bf16") == 0
    # Embedding, head, and the head's gradient; a layer, its gradients, and the next layer.
    assert copies(1, workers=2) == 2 * (3 * 1000 + 1) * shape.hidden_size + 6 * layer


def config(**sections):
    base = {
        "name": "x",
        "corpus": {"sources": [{"path": "embedded"}]},
        "model": {"family": "qwen2_moe", "config": QWEN},
        "pools": {"low_memory": {"gpu": 1}, "high_memory": {"gpu": 1}},
    }
    return RunConfig.model_validate(base | sections)


def with_settings(value, assignments):
    raw = value.model_dump(mode="json")
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        node = raw
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = json.loads(text) if text in ("true", "false") or text.isdigit() else text
    return RunConfig.model_validate(raw)


AS_IT_IS = {
    "precision": "bf16",
    "gradient_checkpointing": False,
    "moments": "full",
    "offload_moments": False,
    "block_steps": 0,
}


def test_two_billion_parameters_in_fp32_do_not_fit_24_gb_and_the_remedy_makes_them_fit():
    plan = build_plan(config(submodels={"optimizer": {"batch_tokens": 16_384, "micro_batch": 1, **AS_IT_IS}}))
    stage = next(stage for stage in plan.stages if stage.stage == "submodels")
    assert stage.parameters.total == pytest.approx(2.06e9, rel=0.01)
    assert not stage.fits
    assert not plan.fits
    state = stage.memory.weights + stage.memory.gradients + stage.memory.optimizer
    assert state == 16 * stage.parameters.total + 4 * stage.parameters.largest_tensor > 24 * GIB
    assert stage.choice is None
    assert stage.remedy.settings == ("submodels.optimizer.precision=pure_bf16",)


def test_the_cheapest_settings_that_fit_are_chosen_and_the_run_has_them():
    before = config(submodels={"optimizer": {"batch_tokens": 65_536, "precision": "pure_bf16"}})
    plan = build_plan(before)
    assert plan.stages[0].choice.settings == ("submodels.optimizer.micro_batch=2",)
    assert plan.stages[0].choice.cost == 1
    assert plan.stages[0].remedy is None
    assert plan.fits
    after = fitted(before)
    assert after.submodels.optimizer == plan.stages[0].choice.optimizer
    assert fitted(after) == after
    assert all(stage.choice is None for stage in build_plan(after).stages)


def test_settings_that_fit_and_cpus_change_nothing():
    large = {"gpu": 1, "memory_gb": 400}
    for same in (config(pools={"low_memory": large, "high_memory": large}), config(pools={})):
        assert fitted(same) is same


@settings(deadline=None, max_examples=60)
@given(
    memory_gb=st.integers(4, 80),
    sequences=st.sampled_from((1, 6, 64)),
    workers=st.sampled_from((1, 2)),
    fixed=st.sets(st.sampled_from(sorted(AS_IT_IS))),
)
def test_a_choice_fits_keeps_the_users_values_and_nothing_cheaper_fits(memory_gb, sequences, workers, fixed):
    shape, length = Architecture(**QWEN), 1024
    optimizer = Optimizer(batch_tokens=length * sequences * 2, **{name: AS_IT_IS[name] for name in fixed})

    def measure(trial):
        return worker_memory("qwen2_moe", shape, 151_936, trial, sequence_length=length, gpu=1, workers=workers)

    room = Room(length, memory_gb, None, workers, alone=workers == 1)
    choice = choose(measure, optimizer, room, section="x", step_seconds=1.0)
    tried = by_cost(measure, combinations(optimizer, length, workers, alone=workers == 1), 1.0)
    that_fit = [cost for cost, trial in tried if measure(trial).total <= memory_gb * GIB]
    if choice is None:
        assert not that_fit
        return
    as_configured = next(cost for cost, trial in tried if trial == optimizer)
    assert choice.cost == pytest.approx(min(that_fit) / as_configured)
    assert measure(choice.optimizer).total <= memory_gb * GIB
    assert all(getattr(choice.optimizer, name) == AS_IT_IS[name] for name in fixed)
    if workers > 1:
        assert not choice.optimizer.block_steps
        assert not choice.optimizer.offload_moments


def test_block_wise_memory_is_that_of_the_largest_block():
    shape = Architecture(**QWEN)
    whole, blocks = (
        worker_memory(
            "qwen2_moe",
            shape,
            151_936,
            Optimizer(precision="pure_bf16", micro_batch=1, block_steps=steps),
            sequence_length=1024,
            gpu=1,
        )
        for steps in (0, 10)
    )
    parameters = count_parameters("qwen2_moe", shape, 151_936)
    largest = largest_block(parameters, shape)
    assert largest == parameters.head + shape.hidden_size
    assert blocks.optimizer == 4 * largest < whole.optimizer / 5
    assert blocks.total < whole.total / 2


def test_offloaded_moments_are_in_the_machines_memory():
    shape = Architecture(**QWEN)
    near, far = (
        worker_memory(
            "qwen2_moe",
            shape,
            151_936,
            Optimizer(precision="pure_bf16", micro_batch=1, offload_moments=offload),
            sequence_length=1024,
            gpu=1,
        )
        for offload in (False, True)
    )
    assert (far.optimizer, far.offloaded) == (0, near.optimizer)
    assert far.total < near.total


def test_too_small_a_card_is_told_how_much_it_would_take():
    plan = build_plan(config(pools={"low_memory": {"memory_gb": 2}, "high_memory": {"memory_gb": 80}}))
    remedy = plan.stages[0].remedy
    assert not remedy.fits
    assert "clusters.count" not in " ".join(remedy.settings)  # as many clusters as experts already
    assert f"a worker would need {math.ceil(remedy.memory_gb)} GiB" in str(remedy)
    enough = with_settings(config(pools={"low_memory": {"memory_gb": math.ceil(remedy.memory_gb)}}), remedy.settings)
    assert build_plan(enough).stages[0].fits


@settings(deadline=None, max_examples=examples(8, 60))
@given(
    cards=st.tuples(st.integers(4, 64), st.integers(8, 80)),
    clusters=st.sampled_from((1, 2, 4, 8)),
    precision=st.sampled_from(("auto", "pure_bf16")),
    sequences=st.sampled_from((1, 6, 16, 64)),
    layers=st.integers(1, 24),
)
def test_applying_a_remedy_makes_every_stage_fit(cards, clusters, precision, sequences, layers):
    low, high = cards
    sizes = QWEN | {"num_experts": 8, "num_hidden_layers": layers}
    optimizer = {"batch_tokens": 1024 * sequences, "precision": precision}
    before = config(
        model={"family": "qwen2_moe", "config": sizes},
        clusters={"count": clusters},
        submodels={"optimizer": optimizer},
        finetune={"optimizer": optimizer},
        pools={"low_memory": {"memory_gb": low, "gpu": 1}, "high_memory": {"memory_gb": high, "gpu": 1}},
    )
    stages = build_plan(before).stages
    chosen = dict.fromkeys(s for stage in stages if stage.remedy and stage.remedy.fits for s in stage.remedy.settings)
    after = {stage.stage: stage for stage in build_plan(with_settings(before, chosen)).stages}
    for stage in stages:
        assert (stage.remedy is None) == stage.fits
        if stage.remedy is not None:
            assert after[stage.stage].fits == stage.remedy.fits
            if stage.remedy.fits:
                assert after[stage.stage].memory.total == pytest.approx(stage.remedy.memory_gb * GIB)


def test_hours_and_dollars_by_hand():
    plan = build_plan(
        config(
            tokens={"total": 4 * 16_384_000, "seed_share": 0.25, "finetune_share": 0.25},
            pools={
                "low_memory": {"price_per_hour": 0.5, "speed": 0.5, "max_workers": 3},
                "high_memory": {"price_per_hour": 2.0, "speed": 1.0, "workers": 2},
            },
        )
    )
    seed, submodels, finetune = plan.stages
    per_second = 312e12 * 0.35
    flops = 6 * seed.parameters.multiplied + 12 * 24 * 2048 * 1024
    hours = flops * 16_384_000 / (per_second * 0.5) / 3600
    assert seed.cost.hours == pytest.approx(hours)
    assert seed.cost.dollars == pytest.approx(hours * 0.5)
    assert submodels.cost.worker_hours == pytest.approx(2 * hours)
    assert submodels.cost.waves == 2  # four sub-models, three at once
    assert submodels.cost.hours == pytest.approx(2 * (2 * hours / 4))
    whole = 6 * plan.parameters.multiplied + 12 * 24 * 2048 * 1024
    assert finetune.cost.worker_hours == pytest.approx(whole * 16_384_000 / per_second / 3600)
    assert finetune.cost.hours == pytest.approx(finetune.cost.worker_hours / 2)
    assert plan.joint_training.cost.worker_hours == pytest.approx(4 * finetune.cost.worker_hours)
    assert plan.joint_training.memory == finetune.memory
    assert plan.training_dollars == pytest.approx(sum(stage.cost.dollars for stage in plan.stages))
    elsewhere = plan.finetune_elsewhere  # on three cards of half the speed, for a quarter of the price
    assert elsewhere.cost.worker_hours == pytest.approx(2 * finetune.cost.worker_hours)
    assert elsewhere.cost.dollars == pytest.approx(finetune.cost.dollars / 2)
    assert elsewhere.cost.hours == pytest.approx(elsewhere.cost.worker_hours / 3)


def test_the_fine_tune_elsewhere_is_that_of_a_run_there():
    here, there = build_plan(config()), build_plan(config(finetune={"pool": "low_memory"}))
    assert here.finetune_elsewhere == there.stages[-1]
    assert there.finetune_elsewhere == here.stages[-1]
    assert build_plan(config(tokens={"seed_share": 0.5, "finetune_share": 0})).finetune_elsewhere is None


def test_recomputing_costs_a_third_more():
    shape = Architecture()
    parameters = count_parameters("qwen3_moe", shape, 100)
    plain, recomputed = (flops_per_token(parameters, shape, 128, checkpointing=on) for on in (False, True))
    assert recomputed == pytest.approx(plain * 4 / 3)


def test_a_run_without_a_seed_phase_has_no_seed_stage_and_free_pools_save_nothing():
    plan = build_plan(
        config(
            tokens={"seed_share": 0},
            clusters={"vectors": "mean_token"},
            pools={"low_memory": {"price_per_hour": 0}, "high_memory": {"price_per_hour": 0}},
        )
    )
    assert [stage.stage for stage in plan.stages] == ["submodels", "finetune"]
    assert (plan.bill.saving, plan.bill.verdict) == (None, None)


def test_what_rounds_move_by_hand():
    plan = build_plan(
        config(
            submodels={
                "sync_every": 100,
                "seed_members": None,
                "optimizer": {"batch_tokens": 16_384, "precision": "pure_bf16"},
            }
        )
    )
    seed, submodels, finetune = plan.stages
    assert finetune.sync is None
    sizes = submodels.parameters
    backbone = sizes.embedding + sizes.attention + sizes.norms + sizes.shared_expert + sizes.head
    # Each member writes 2 bytes, reads 2 of ranges and 4 of common weights; common weights and momentum, 4 bytes each,
    # are read and written once.
    assert submodels.sync.syncs == round(submodels.steps / 100) - 1 > 0  # the merge is the last
    assert submodels.sync.bytes == submodels.sync.syncs * backbone * (submodels.units * (2 + 2 + 4) + 16)
    # All at the same time, at 125 MB/s each.
    passes = 2 + 2 + 4 + 16 / submodels.units
    assert submodels.sync.wait_seconds == pytest.approx(submodels.sync.syncs * backbone * passes / 125e6)
    assert [stage.sync for stage in build_plan(config()).stages] == [None] * 3
    # Members of the seed exchange all weights, and once more after the last step.
    assert seed.sync.syncs == round(seed.steps / 100) > 0
    assert seed.sync.bytes == seed.sync.syncs * seed.parameters.total * (seed.units * (2 + 2 + 4) + 16)


@pytest.mark.parametrize(("momentum", "passes"), [(0.0, 3), (0.6, 5)])
def test_what_syncs_in_4_bits_move_by_hand(momentum, passes):
    settings = {"sync_every": 100, "seed_members": 2, "sync_bits": 4, "outer": {"momentum": momentum}}
    seed = build_plan(config(submodels={**settings, "optimizer": {"batch_tokens": 16_384}})).stages[0]
    codes = -(-seed.parameters.total // 256) * 132
    # Each of two members writes codes, reads codes of ranges and codes of the update. The update is written once, and
    # so are common weights, residual and momentum; the last two are also read.
    assert seed.sync.bytes == seed.sync.syncs * (2 * 3 * codes + codes + passes * 4 * seed.parameters.total)


@pytest.mark.parametrize("slots", [2, 8])
def test_the_hours_of_seed_and_sub_models_divide_by_the_slots(slots):
    def hours(**low):
        default = yaml.safe_load(preset_text("default")) | {"recipe": None}
        default["pools"]["low_memory"] |= low
        default["submodels"]["seed_members"] = None
        default["clusters"]["count"] = 8
        return {stage.stage: stage for stage in build_plan(check_config(default)).stages}

    one, some = hours(max_workers=1), hours(max_workers=slots)
    assert some["seed"].units == 8
    before, after = (plan["seed"].cost.hours + plan["submodels"].cost.hours for plan in (one, some))
    assert after <= 1.15 * before / slots
    assert after == pytest.approx(before / slots)
    for stage in ("seed", "submodels"):
        assert some[stage].memory == one[stage].memory
        assert some[stage].cost.dollars == pytest.approx(one[stage].cost.dollars)


@pytest.mark.parametrize(
    ("batch_tokens", "workers", "most"), [(65_536, 1, 1.9), (1_048_576, 2, 1.15), (4_194_304, 2, 1.05)]
)
def test_the_default_uses_two_cards_throughout_where_batches_are_large(batch_tokens, workers, most):
    def hours(slots):
        default = yaml.safe_load(preset_text("default")) | {"recipe": None}
        default["pools"]["low_memory"]["max_workers"] = slots
        default["tokens"]["total"] = 2000 * batch_tokens
        for section in ("submodels", "finetune"):
            default[section]["optimizer"]["batch_tokens"] = batch_tokens
        stages = {stage.stage: stage for stage in build_plan(with_cluster_count(check_config(default))).stages}
        return sum(stages[stage].cost.hours for stage in ("seed", "submodels")), stages["seed"].workers

    (alone, _), (both, together) = hours(1), hours(2)
    assert together == workers  # over 10 Gbit/s
    assert alone / 2 < both <= most * alone / 2


def test_a_parallel_seed_stores_one_model_and_every_member_reads_its_text():
    def storage(members):
        submodels = {"sync_every": 100, "seed_members": members, "optimizer": {"batch_tokens": 16_384}}
        return next(each for each in build_plan(config(submodels=submodels)).storage if each.stage == "seed")

    one, four = storage(1), storage(4)
    assert four.stored == one.stored
    assert four.checkpoints == 4 * one.checkpoints
    assert four.worker_disk == one.worker_disk
    assert four.moved > 3 * one.moved


def test_a_plan_survives_json():
    plan = build_plan(config())
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert json.loads(plan.model_dump_json())["stages"][0]["memory"]["total"] == plan.stages[0].memory.total


@pytest.mark.parametrize(
    ("name", "content", "size"),
    [
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2}]}, 3),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "e": 7}}, "added_tokens": []}, 8),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}, 2),
        ("vocab.json", {"a": 0, "b": 1, "c": 2}, 3),
    ],
    ids=["added", "gap", "unigram", "vocab"],
)
def test_vocabulary_of_a_tokenizer_on_disk(tmp_path, name, content, size):
    (tmp_path / name).write_text(json.dumps(content))
    assert tokenizer_vocab_size(tmp_path) == size


@pytest.mark.parametrize("content", [None, "no json", "{}", '{"model": {}}'])
def test_a_directory_without_a_tokenizer_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        tokenizer_vocab_size(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_told():
    with pytest.raises(ConfigError, match=r"model\.config\.vocab_size: 512: is less than the tokenizer's 8192"):
        planned_vocab_size(config(model={"config": {"vocab_size": 512}}))
    assert planned_vocab_size(config(model={"config": {"vocab_size": 9000}})) == 9000
    assert planned_vocab_size(config(model={"config": {}}, tokenizer={"train_vocab_size": 700})) == 700


def test_a_checkpoint_brings_its_sizes(tmp_path):
    shape = Architecture(hidden_size=32, num_hidden_layers=2, moe_intermediate_size=24)
    hf_config("olmoe", shape).save_pretrained(tmp_path)
    starting = config(model={"family": "olmoe", "init": {"checkpoint": str(tmp_path)}}, tokens={"seed_share": 0})
    plan = build_plan(check_config(starting.model_dump(mode="json")))
    assert plan.vocab_size == VOCAB
    assert plan.parameters == count_parameters("olmoe", shape, VOCAB)


def mixed(*types, **pool):
    named = [{"name": f"type-{i}", "resource": f"tag_{i}", "speed": 1.0, **values} for i, values in enumerate(types)]
    return {"low_memory": {"gpu": 1, "types": named, **pool}, "high_memory": {"gpu": 1}}


def test_a_mixed_pool_by_hand():
    # Four sub-models of some 22 GB: the small card holds none; the slow one takes $0.4 for the work that costs $1 on
    # the quick one.
    plan = build_plan(
        config(
            submodels={"optimizer": {"batch_tokens": 16_384, "micro_batch": 1, "precision": "pure_bf16"}},
            tokens={"seed_share": 0},
            clusters={"count": 4, "vectors": "mean_token"},
            pools=mixed(
                {"memory_gb": 16, "price_per_hour": 0.01, "max_workers": 9},
                {"memory_gb": 24, "price_per_hour": 0.2, "speed": 0.5, "max_workers": 1},
                {"memory_gb": 48, "price_per_hour": 1.0, "max_workers": 1},
            ),
        )
    )
    stage = plan.stages[0]
    unit = stage.cost.flops / (312e12 * 0.35) / 3600 / 4
    small, slow, quick = stage.types
    assert (small.fits, slow.fits, quick.fits) == (False, True, True)
    # The slow one has the first; the quick one the second and third; at two hours both are free, and the slow one is
    # cheaper.
    assert (small.units, slow.units, quick.units) == (0, 2, 2)
    assert stage.cost.hours == pytest.approx(4 * unit)
    assert (slow.worker_hours, quick.worker_hours) == (pytest.approx(4 * unit), pytest.approx(2 * unit))
    assert stage.cost.dollars == pytest.approx(0.2 * 4 * unit + 1.0 * 2 * unit)
    assert (stage.workers, stage.cost.waves, stage.pool_gb) == (4, 2, 48)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def one_by_one(pool, hours, units, need_gb):
    """Begin each unit alone on the cheapest free type that holds it; return units by type, and when the last ends."""
    running, taken, begun, now, last = [], Counter(), Counter(), 0.0, 0.0
    for unit in range(units):
        need = Need(str(unit), need_gb)

        def free(need=need):
            kinds = [
                NodeType(kind.key, kind.memory_gb, kind.price_per_hour, kind.speed, kind.max_workers - taken[kind.key])
                for kind in pool.node_types
            ]
            return place(need, kinds)

        while len(running) >= pool.max_workers or free() is None:
            now, ended = heapq.heappop(running)
            taken[ended] -= 1
        key = free().name
        taken[key] += 1
        begun[key] += 1
        heapq.heappush(running, (now + hours[key], key))
        last = max(last, now + hours[key])
    return begun, last


small = st.integers(1, 6)


@given(
    st.lists(st.tuples(small, small, small, small), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 60),
    small,
)
def test_equal_units_are_placed_together_as_they_would_be_one_by_one(types, most, units, need_gb):
    pool = LowMemoryPool(
        gpu=1,
        max_workers=most,
        types=[
            {
                "name": f"t{i}",
                "resource": f"tag_{i}",
                "memory_gb": memory,
                "price_per_hour": price,
                "speed": speed,
                "max_workers": workers,
            }
            for i, (memory, price, speed, workers) in enumerate(types)
        ],
    )
    assume(any(memory >= need_gb for memory, *_ in types))
    hours = {kind.key: training_cost(1e15, 60, kind, experts=4).worker_hours / units for kind in pool.node_types}
    begun, last = one_by_one(pool, hours, units, need_gb)
    cost, shares = mixed_cost(1e15, 60, pool, need_gb, experts=4, units=units)
    assert [share.units for share in shares] == [begun[kind.key] for kind in pool.node_types]
    assert cost.hours == last


def test_a_mixed_pool_of_one_type_costs_what_the_pool_of_that_type_does():
    values = {"memory_gb": 400, "price_per_hour": 0.7, "speed": 0.3, "max_workers": 3}
    alone = build_plan(config(pools={"low_memory": {"gpu": 1, **values}, "high_memory": {"gpu": 1}}))
    typed = build_plan(config(pools=mixed(values)))
    for one, other in zip(alone.stages, typed.stages, strict=True):
        assert other.cost.model_dump() == pytest.approx(one.cost.model_dump())
        assert (other.workers, other.fits) == (one.workers, one.fits)


def test_a_submodel_that_fits_no_type_is_refused_with_a_remedy():
    too_small = config(
        submodels={"optimizer": {"batch_tokens": 16_384, "micro_batch": 1, **AS_IT_IS}},
        pools=mixed({"memory_gb": 16, "price_per_hour": 1}, {"memory_gb": 24, "price_per_hour": 1}),
    )
    with pytest.raises(
        ConfigError, match=r"^pools\.low_memory\.types: 24\.0: a worker of .* fits with --set .*=pure_bf16"
    ) as told:
        build_plan(too_small)
    remedy = str(told.value).partition("--set ")[2]
    assert all(stage.fits for stage in build_plan(with_settings(too_small, [remedy])).stages if stage.types)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at once; those of `before` do not count."""

    def __init__(self, before):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self._add(storage)
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("at_once", [1 << 20, 1 << 18])
def test_the_room_of_an_optimizer_step_is_an_upper_bound_of_what_it_takes(at_once, monkeypatch):
    monkeypatch.setattr(optimizer_module, "STEP_ELEMENTS", at_once)
    elements = 1 << 20
    weight = torch.nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16))
    optimizer = adamw([{"params": [weight]}], Optimizer(precision="pure_bf16"), seed=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()  # makes the moments, which have a part of their own
    with LiveBytes([weight, weight.grad, *optimizer.state[weight].values()]) as live:
        optimizer.step()
    assert 12 * at_once < live.peak <= 20.01 * at_once


def test_a_submodel_of_qwen3_30b_fits_a_card_of_24_gb_without_recomputation():
    shape = Architecture(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        moe_intermediate_size=768,
        num_experts=4,
        num_experts_per_tok=4,
    )
    optimizer = Optimizer(precision="pure_bf16", batch_tokens=512, micro_batch=1)
    found = worker_memory("qwen3_moe", shape, 151_936, optimizer, sequence_length=512, gpu=1)
    assert found.total < 24 * GIB
    assert (found.activations, found.optimizer_step) == (0, 20 << 24), "the peak is in the optimizer's step"
    assert found.total == sum(found.parts.values())


def test_uneven_shares_of_experts_count_for_a_card_and_not_for_the_disk():
    stage = planned("Mixtral-8x7B", "finetune", cards=16)  # half of the workers have no expert
    parameters = stage.parameters
    width = stage.memory.weights / ((parameters.total - parameters.experts) / 16 + parameters.experts / 8)
    assert width == pytest.approx(round(width), rel=1e-6)
    assert _trained(stage).weights == pytest.approx(width * parameters.total, rel=1e-6)
