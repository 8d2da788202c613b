"""Trainings of adapters instead of weights (`lora`), with Hugging Face PEFT as the reference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXED
from peft import PeftModel
from peft_on_top import check_lora_on_top
from pydantic import ValidationError
from small_run import small_config
from tiny_training import BATCH, L, V, run, stop_after, variant, weights, write_shard, write_tiny
from torch import Tensor

from moedisco_ray.core.config import Architecture, Lora, Optimizer, RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.stages import training_stage
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.core.store.manifests import ADAPTER_FOLDER
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import check_same, hf_config, load_model, save_model, skeleton, stored_tensors
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER
from moedisco_ray.plan import Plan, build_plan, stage_plan
from moedisco_ray.plan.adapter_memory import NF4_BYTES
from moedisco_ray.plan.files import StageStorage
from moedisco_ray.plan.memory import worker_memory
from moedisco_ray.plan.parameters import adapter_parameters, count_parameters
from moedisco_ray.stages.train import jobs
from moedisco_ray.training import TrainJob, World, write_partial_result
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.lora import Adapter, adapters, merge_adapters, save_adapters
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.stepper import ResidentStepper

# PEFT reads it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LORA = Lora(rank=3, alpha=6.0)
NF4 = LORA.model_copy(update={"base": "nf4"})
RECIPE = Optimizer(lr=2e-2, batch_tokens=BATCH * L, weight_decay=0.1)
SHARED = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 20},
    "deepseek_v2": {
        "fields": {
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
        }
    },
    "qwen3_5_moe_text": {"head_dim": 16, "fields": MIXED},
}
"""Families with transposed stacks of experts, with a shared expert, with latent attention and a dense layer, and with
recurrent layers."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("lora")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "moe", 4)
    write_tiny(home / "dense", 1)
    start_of("qwen3_moe", home, 4, vocabulary=600)  # that of `small_run`
    return home


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="submodels",
        name="submodel-0",
        model=home / "moe",
        packed_dirs=(home / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=8,
        sequence_length=L,
        optimizer=RECIPE,
        lora=LORA,
        checkpoint_every=3,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


def inputs(seed: int = 0) -> Tensor:
    return torch.randint(1, V, (2, L), generator=torch.Generator().manual_seed(seed))


def with_values(model: Any) -> Any:
    """Give both matrices of each adapter values of their own: those of B start at zero."""
    source = torch.Generator().manual_seed(1)
    for adapter in adapters(model).values():
        for matrix in (adapter.a_ERI, adapter.b_EOR):
            matrix.data.copy_(torch.randn(matrix.shape, generator=source) * 0.05)
    return model


def start_of(family: str, home: Path, experts: int, vocabulary: int = V) -> Path:
    """A tiny model of a family."""
    sizes = Architecture.model_validate(
        SHARED | {"num_experts": experts, "num_experts_per_tok": min(2, experts)} | SPECIAL.get(family, {})
    )
    config = hf_config(family, sizes, vocabulary, L, 0)
    torch.manual_seed(0)
    save_model(type(skeleton(config))(config), home / "start")
    return home / "start"


# --- PEFT


@pytest.mark.ecosystem("Training: LoRA sub-models in PEFT", "peft")
@pytest.mark.parametrize(
    ("family", "experts"),
    [("qwen3_moe", 4), ("qwen3_moe", 1), ("mixtral", 2), ("gpt_oss", 4), ("qwen2_moe", 2), ("deepseek_v2", 4)],
)
def test_peft_computes_the_same_from_the_stored_adapters(family: str, experts: int, tmp_path: Path) -> None:
    start = start_of(family, tmp_path, experts)
    ours = with_values(trainable(start, RECIPE, World(), lora=LORA))
    save_adapters(ours, LORA, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(start), tmp_path / "adapter", is_trainable=True)
    batch = inputs()
    loss = ours(batch, batch.roll(-1, 1))
    logits = theirs(batch).logits
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.roll(-1, 1).flatten(), reduction="sum")
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * len(adapters(ours))
    for name, adapter in adapters(ours).items():
        path, _, attribute = name.rpartition(".")
        place = f"base_model.model.{path}{'.base_layer' if attribute == 'gate_up_proj' else ''}"
        a_grad, b_grad = adapter.a_ERI.grad, adapter.b_EOR.grad
        assert a_grad is not None
        assert b_grad is not None
        b_grad = b_grad if b_grad.ndim == 2 else b_grad.permute(1, 2, 0)
        torch.testing.assert_close(
            a_grad.flatten(0, -2), gradients[f"{place}.lora_A.default.weight"], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(b_grad.flatten(1), gradients[f"{place}.lora_B.default.weight"], rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    merge_adapters(ours)
    for name, tensor in stored_tensors(ours).items():
        torch.testing.assert_close(tensor, merged[name])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_with_its_adapter_is_w_plus_scale_times_b_a(transposed: bool) -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, 8, generator=source)
    adapter = Adapter(weight, LORA, torch.float32, transposed=transposed)
    adapter.start(source)
    assert torch.equal(adapter(weight), weight)
    inputs_count = 6 if transposed else 8
    assert adapter.a_ERI.shape == (4, 3, inputs_count)
    assert 0.9 < adapter.a_ERI.abs().max().item() * inputs_count**0.5 <= 1
    adapter.b_EOR.data.normal_(generator=source)
    product = torch.stack([b @ a for b, a in zip(adapter.b_EOR, adapter.a_ERI, strict=True)])
    torch.testing.assert_close(adapter(weight), weight + 2.0 * (product.mT if transposed else product))


# --- training


@pytest.mark.parametrize("start", ["moe", "dense"])
def test_only_adapters_train_and_the_base_stays_the_same(job: TrainJob, home: Path, start: str) -> None:
    job = dataclasses.replace(
        job, model=home / start, load_balance=0.02 * (start == "moe"), z_loss=0.01 * (start == "moe")
    )
    model = trainable(job.model, job.optimizer, World(), lora=LORA, seed=5)
    frozen = {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}
    stepper = ResidentStepper(model, job, World())
    for _ in range(3):
        model(inputs(), inputs()).backward()
        stepper.optimizer.step()
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    # 2 layers with 4 matrices of attention and 2 of experts
    assert len(trained) == 2 * len(adapters(model)) == 2 * 2 * 6
    assert {name for name, each in model.named_parameters() if each in stepper.optimizer.state} == trained
    assert all(torch.equal(each, frozen[name]) for name, each in model.named_parameters() if name in frozen)
    assert all((adapter.b_EOR != 0).any() for adapter in adapters(model).values())


@pytest.mark.parametrize("lora", [pytest.param(LORA, id="full"), pytest.param(NF4, id="nf4", marks=pytest.mark.slow)])
def test_a_training_learns_and_writes_the_merged_weights_and_the_adapters(job: TrainJob, lora: Lora) -> None:
    job = dataclasses.replace(job, steps=80, checkpoint_every=100, lora=lora)
    losses = run(job).losses
    assert sum(losses[-5:]) < 0.99 * sum(losses[:5])  # embedding and head are random and stay so
    before, after = weights(job.model), weights(job.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if (".self_attn." in name and "norm" not in name) or ".experts." in name}
    theirs = PeftModel.from_pretrained(load_model(job.model), job.output / ADAPTER_FOLDER).merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, load_model(job.output).state_dict()[name])


def test_initial_values_depend_on_the_seed(job: TrainJob) -> None:
    def values(seed: int) -> list[Tensor]:
        return [each.a_ERI for each in adapters(trainable(job.model, RECIPE, World(), lora=LORA, seed=seed)).values()]

    first, again, other = values(5), values(5), values(6)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


RECIPES: list[dict[str, Any]] = [
    {},
    {"precision": "bf16"},
    {"precision": "pure_bf16", "moments": "fp8", "gradient_checkpointing": True},
]


@pytest.mark.parametrize(
    ("recipe", "lora"),
    [
        ({}, NF4),
        (RECIPES[-1], LORA),
        *(
            pytest.param(recipe, lora, marks=pytest.mark.slow)
            for recipe, lora in ((RECIPES[1], LORA), (RECIPES[2], NF4))
        ),
    ],
)
def test_a_resumed_training_is_exact(job: TrainJob, recipe: dict[str, Any], lora: Lora) -> None:
    job = dataclasses.replace(job, optimizer=RECIPE.model_copy(update=recipe), lora=lora)
    whole = variant(job, "whole")
    losses = run(whole).losses
    for stop in (2, 5):
        part = variant(job, f"part-{stop}")
        assert not run(part, stop=stop_after(stop)).finished
        resumed = run(part)
        assert (resumed.restored_step, resumed.losses) == (stop, losses)
        check_same(weights(part.output), weights(whole.output))
        name = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
        assert (part.output / name).read_bytes() == (whole.output / name).read_bytes()


@pytest.mark.parametrize("lora", [LORA, NF4], ids=["full", "nf4"])
def test_a_checkpoint_holds_the_adapters_alone(job: TrainJob, lora: Lora) -> None:
    job = dataclasses.replace(job, lora=lora)
    run(job)
    storage = checkpoint.storage_of(job)
    metadata = storage.read(8, "metadata.json", storage.manifest(8)["metadata.json"])
    names = [name for name in read_names(metadata) if name.startswith("model.")]
    model = trainable(job.model, RECIPE, World(), lora=lora)
    assert len(names) == 2 * len(adapters(model))
    assert all(name.endswith((".a_ERI", ".b_EOR")) for name in names)


def read_names(metadata: bytes) -> list[str]:
    return list(json.loads(metadata)["tensors"])


@pytest.mark.parametrize("lora", [LORA, NF4], ids=["full", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_that_is_given_up_leaves_the_model_of_its_checkpoint(
    job: TrainJob, precision: str, lora: Lora
) -> None:
    job = dataclasses.replace(job, optimizer=RECIPE.model_copy(update={"precision": precision}), lora=lora)
    whole = variant(job, "whole", steps=4, checkpoint_every=2)
    run(whole)
    part = dataclasses.replace(whole, output=job.output, steps=9)
    write_partial_result(part)
    check_same(weights(part.output), weights(whole.output))
    untouched = variant(job, "untouched")
    write_partial_result(untouched)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    check_same(weights(untouched.output), {name: tensor.to(dtype) for name, tensor in weights(job.model).items()})


def test_frozen_weights_have_the_dtype_of_the_pools_arithmetic(home: Path, tmp_path: Path) -> None:
    gpu = {"low_memory": {"max_workers": 2, "gpu": 1}, "high_memory": {"workers": 1}}
    on_gpus, on_cpus = lora_config(tmp_path, home / "start", pools=gpu), lora_config(tmp_path, home / "start")
    without = lora_config(tmp_path, home / "start", pools=gpu, submodels={"lora": {"rank": 0}})
    assert [jobs.recipe_of(each, training_stage("submodels")).precision for each in (on_gpus, on_cpus, without)] == [
        "bf16",
        "fp32",
        "auto",
    ]
    assert jobs.recipe_of(on_gpus, training_stage("finetune")).precision == "auto"


def test_several_workers_are_refused(job: TrainJob) -> None:
    with pytest.raises(ValueError, match="must have one worker"):
        trainable(job.model, RECIPE, World(size=2), lora=LORA)


def test_the_merged_model_computes_what_was_trained(job: TrainJob) -> None:
    recipe = RECIPE.model_copy(update={"precision": "pure_bf16"})
    model = with_values(trainable(job.model, recipe, World(), lora=LORA))
    with torch.no_grad():
        before = model(inputs(), inputs())
        merge_adapters(model)
        assert not adapters(model)
        assert torch.equal(model(inputs(), inputs()), before)


# --- the plan


@pytest.mark.parametrize("family", ["qwen3_moe", *SPECIAL])
@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
@pytest.mark.parametrize("lora", [LORA, NF4], ids=["full", "nf4"])
def test_the_plan_counts_what_is_allocated(family: str, precision: Any, lora: Lora, tmp_path: Path) -> None:
    sizes = Architecture.model_validate(SHARED | {"num_experts": 4, "num_experts_per_tok": 2} | SPECIAL.get(family, {}))
    recipe = Optimizer(precision=precision, batch_tokens=2 * L, micro_batch=1)
    model = trainable(start_of(family, tmp_path, 4), recipe, World(), lora=lora)
    job = TrainJob(
        stage="submodels",
        name="x",
        model=tmp_path,
        packed_dirs=(),
        output=tmp_path,
        checkpoints=tmp_path,
        steps=1,
        sequence_length=L,
        optimizer=recipe,
        lora=lora,
        checkpoint_every=None,
    )
    optimizer = make_optimizer(model, job, World())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(inputs(), inputs()).backward()
    optimizer.step()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in trained) == adapter_parameters(family, sizes, LORA.rank)
    plan = worker_memory(family, sizes, V, recipe, sequence_length=L, gpu=0, lora=lora)
    held = sum(each.nbytes for each in model.parameters())
    held += sum(each.nbytes for adapter in adapters(model).values() for each in adapter.buffers())
    if lora is NF4:  # the plan takes a few biases for matrices
        each_matrix = (each.a_ERI.numel() // LORA.rank * each.b_EOR.shape[-2] for each in adapters(model).values())
        biases = count_parameters(family, sizes, V).matrices - sum(each_matrix)
        held -= round(biases * ((4 if precision == "fp32" else 2) - NF4_BYTES))
        assert 0 <= biases < 0.1 * count_parameters(family, sizes, V).matrices
    assert plan.weights == (held if lora is LORA else pytest.approx(held, rel=0.01))  # blocks are padded
    assert plan.gradients == sum(each.grad.nbytes for each in trained if each.grad is not None)
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    assert plan.optimizer == sum(each.nbytes for each in states)
    full = worker_memory(family, sizes, V, recipe, sequence_length=L, gpu=0)
    assert plan.optimizer < 0.7 * full.optimizer
    stored = count_parameters(family, sizes, V).total * (4 if precision == "fp32" else 2)
    assert plan.weights + plan.unpacked - plan.gradients == stored


def lora_config(home: Path, start: Path, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {"init": {"checkpoint": str(start)}, "config": None, "family": None},
        "tokenizer": {"replace": True},
        "submodels": {"optimizer": {"batch_tokens": 1024, "lr": 1e-2}, "lora": {"rank": 4}},
        "tokens": {"total": 60_000, "finetune_share": 0.3},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return small_config(home, **sections)


def of_submodels(parts: Iterable[Any]) -> Any:
    return next(each for each in parts if each.stage == "submodels")


def test_the_plan_of_a_run_needs_less_memory_and_smaller_checkpoints(home: Path, tmp_path: Path) -> None:
    gpu = {"low_memory": {"max_workers": 2, "gpu": 1}, "high_memory": {"workers": 1}}
    with_adapters = build_plan(lora_config(tmp_path, home / "start", pools=gpu))
    without = build_plan(lora_config(tmp_path, home / "start", pools=gpu, submodels={"lora": {"rank": 0}}))
    small, large = of_submodels(with_adapters.stages), of_submodels(without.stages)
    assert small.adapters > 0 == large.adapters
    assert small.memory.total - small.memory.overhead < large.memory.total - large.memory.overhead
    stored = [of_submodels(plan.storage) for plan in (with_adapters, without)]
    assert stored[0].checkpoints == 2 * small.units * 12 * small.adapters  # two kept; a weight and two moments
    assert stored[0].checkpoints < 0.3 * stored[1].checkpoints
    assert with_adapters.stages[-1].memory == without.stages[-1].memory  # the fine-tune


def on_disk(plan: Plan) -> list[StageStorage]:
    return [each.model_copy(update={"device_memory": 0}) for each in plan.storage]


def test_weights_in_4_bits_need_less_memory_but_models_of_the_same_size(home: Path, tmp_path: Path) -> None:
    gpu = {"low_memory": {"max_workers": 2, "gpu": 1}, "high_memory": {"workers": 1}}
    in_4_bits, full = (
        build_plan(lora_config(tmp_path, home / "start", pools=gpu, submodels={"lora": {"rank": 4, "base": base}}))
        for base in ("nf4", "full")
    )
    small, large = of_submodels(in_4_bits.stages).memory, of_submodels(full.stages).memory
    assert small.weights + small.unpacked == large.weights > small.weights
    assert on_disk(in_4_bits) == on_disk(full)


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_plan_proposes_4_bits_where_nothing_else_fits(
    home: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remedy(memory_gb: float) -> Any:
        pools = {"low_memory": {"max_workers": 2, "gpu": 1, "memory_gb": memory_gb}, "high_memory": {"workers": 1}}
        config = lora_config(tmp_path, home / "start", pools=pools, submodels={"lora": {"rank": rank}})
        return of_submodels(build_plan(config).stages).remedy

    monkeypatch.setattr(stage_plan, "USUAL_RANK", 2)  # the model is tiny
    in_4_bits = remedy(0.5)
    added = ("submodels.lora.base=nf4", *([] if rank else ["submodels.lora.rank=2"]))
    assert not in_4_bits.fits
    assert in_4_bits.settings[-len(added) :] == added
    assert not any("block_steps" in setting or "offload" in setting for setting in in_4_bits.settings)
    with monkeypatch.context() as patch:
        patch.setattr(stage_plan, "_in_four_bits", lambda *_: None)
        in_full = remedy(0.5)
    assert in_4_bits.memory_gb < in_full.memory_gb
    found = remedy((in_4_bits.memory_gb + in_full.memory_gb) / 2)
    assert found.fits
    assert found.settings[-len(added) :] == added
    other = remedy(in_full.memory_gb * 1.00001)
    assert other is None or added[0] not in other.settings


# --- a run


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    return pipeline.run(lora_config(home / "runs", home / "start"), backend=LocalBackend())


@pytest.mark.slow
@pytest.mark.ecosystem("Use: LoRA of PEFT on an exported model", "peft", "transformers")
def test_peft_adapts_the_exported_model_again(finished: Path, tmp_path: Path) -> None:
    check_lora_on_top(finished / "model", inputs(), tmp_path, lr=2e-2, steps=20)


def test_a_run_with_adapters_ends_with_a_model_like_any_other(finished: Path) -> None:
    for part in ("0", "1"):
        start, trained = finished / "decomposed" / part, finished / "submodels" / part
        before, after = weights(start), weights(trained)
        frozen = {name for name in before if torch.equal(before[name], after[name])}
        assert frozen == {name for name in before if "norm" in name or "layers" not in name or "mlp.gate." in name}
        theirs = PeftModel.from_pretrained(load_model(start), trained / ADAPTER_FOLDER).merge_and_unload().state_dict()
        for name, tensor in load_model(trained).state_dict().items():
            torch.testing.assert_close(tensor, theirs[name])
        assert not (trained / OPTIMIZER_FOLDER).exists()
    assert not (finished / "finetuned" / ADAPTER_FOLDER).exists()
    assert read_json(finished / "report.json")["evaluation"]["perplexity"] > 0
    assert sum(each.numel() for each in load_model(finished / "model").parameters()) > 0


JOINT = {"seed_share": 0, "finetune_share": 1}


@pytest.mark.ecosystem("Training: LoRA of the whole MoE in PEFT", "peft")
def test_a_streamed_fine_tune_adapts_the_whole_moe(home: Path, tmp_path: Path) -> None:
    config = lora_config(
        tmp_path,
        home / "start",
        tokens=JOINT,
        submodels={"lora": {"rank": 0}},
        finetune={"lora": {"rank": 4}},
        pools={"high_memory": {"memory": "streamed"}},
    )
    found = pipeline.run(config, backend=LocalBackend())
    start, trained = found / "merged", found / "finetuned"
    before, after = weights(start), weights(trained)
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {name for name in before if "norm" in name or "layers" not in name or "mlp.gate." in name}
    exported = found / "model"
    assert "`adapter/` has the adapters of the fine-tune" in (exported / "README.md").read_text(encoding="utf-8")
    theirs = PeftModel.from_pretrained(load_model(start), exported / ADAPTER_FOLDER).merge_and_unload().state_dict()
    for name, tensor in load_model(exported).state_dict().items():
        torch.testing.assert_close(tensor, theirs[name])


def finetune_files(plan: Plan) -> StageStorage:
    return next(each for each in plan.storage if each.stage == "finetune")


def test_a_fine_tune_with_adapters_is_planned_as_one(home: Path, tmp_path: Path) -> None:
    pools = {"low_memory": {"max_workers": 2, "gpu": 1}, "high_memory": {"workers": 1, "gpu": 1}}

    def plan(lora: dict[str, Any]) -> Plan:
        sections = {"submodels": {"lora": {"rank": 0}}, "finetune": {"lora": lora}, "tokens": JOINT, "pools": pools}
        return build_plan(lora_config(tmp_path, home / "start", **sections))

    adapted, whole = plan({"rank": 4, "base": "nf4"}), plan({})
    [small], [large] = adapted.stages, whole.stages
    assert small.adapters > 0 == large.adapters
    assert small.memory.weights + small.memory.unpacked < large.memory.weights
    in_parts, full = map(finetune_files, (adapted, whole))
    assert in_parts.checkpoints == 2 * 12 * small.adapters < 0.3 * full.checkpoints


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": JOINT, "model": {"init": {"upcycle": "START"}}}, "adapts a trained MoE"),
        ({"tokens": JOINT, "pools": {"high_memory": {"workers": 2}}}, "pools.high_memory.workers 2 to 1, or pools"),
        ({"finetune": {"lora": {"rank": 4}, "optimizer": {"block_steps": 3}}}, "trains no blocks"),
    ],
)
def test_what_adapters_of_the_whole_moe_cannot_do_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    changes = {"submodels": {"lora": {"rank": 0}}, "finetune": {"lora": {"rank": 4}}} | changes
    changes = json.loads(json.dumps(changes).replace("START", str(home / "dense")))
    with pytest.raises((ConfigError, ValidationError), match=f"finetune.lora.rank: 4 .*{reason}"):
        lora_config(tmp_path, home / "start", **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"init": "random"}}, "adapts a trained model"),
        ({"tokens": {"seed_share": 0.2}, "model": {"init": {"upcycle": "START"}}}, "leaves a seed no memory"),
        ({"submodels": {"sync_every": 5}}, "allows no syncs"),
        (
            {"submodels": {"optimizer": {"name": "muon"}}, "finetune": {"keep_optimizer_state": False}},
            "needs the optimizer adamw",
        ),
        ({"submodels": {"optimizer": {"block_steps": 10}}}, "trains no blocks"),
        ({"submodels": {"lora": {"base": "nf4"}}}, "base nf4 rounds frozen weights, and rank 0 freezes none; set rank"),
        ({"submodels": {"lora": {"rank": 4, "base": "int4"}}}, "base: 'int4': must be 'full' or 'nf4'"),
        (
            {"model": {"init": {"upcycle": "START", "reinitialise": 0.5}}},
            "freezes the weights that model.init.reinitialise draws anew",
        ),
    ],
)
def test_what_adapters_cannot_do_is_refused_in_one_line(
    home: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    changes = json.loads(json.dumps(changes).replace("START", str(home / "dense")))
    with pytest.raises((ConfigError, ValidationError), match=f"submodels.lora.*{reason}"):
        lora_config(tmp_path, home / "start", **changes)
