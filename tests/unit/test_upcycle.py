"""Dense models as starts: the MoE computes what they did, until training makes its experts differ."""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import ALONE, LENGTH, MIXED, UPCYCLED, VOCAB, random_tensors, tiny_config
from safetensors.torch import load_file, save_file
from small_run import OneCorpus, small_config
from transformers import AutoConfig, AutoModelForCausalLM

from moedisco_ray.core.config import Merge, Model, RunConfig, check_config
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError, RunStopped
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stages import fingerprints
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.models import ModelMap, check_start_tensors, load_model, open_checkpoint, runnable, write_checkpoint
from moedisco_ray.stages.context import dense_seed, finetune_seed, submodel_seed
from moedisco_ray.stages.corpus import input_identity
from moedisco_ray.stages.evaluate.measure import evaluate_start
from moedisco_ray.stages.merge.stage import write_whole
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe
from moedisco_ray.stages.text.validation import Documents

DENSE_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FEW_TOKENS = {"total": 24_000, "seed_share": 0.4, "finetune_share": 0.4}
IDS = torch.arange(3 * LENGTH).reshape(3, LENGTH) % VOCAB
RELATIVES = [(family, kind) for family, page in DECLARATIONS.items() for kind in page.dense]


def dense(directory: Path, kind: str, **changes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = copy.deepcopy(DENSE_SIZES | changes)  # transformers writes into the rotary parameters
        config = AutoConfig.for_model(kind, **declared(kind, sizes))
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def declared(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes without `head_dim` for kinds whose published configurations have none, such as Qwen2."""
    known = AutoConfig.for_model(kind).to_dict()
    recurrent = {name: size for name, size in MIXED.items() if name in known}
    layers = {"layer_types": ["linear_attention", "full_attention"]} if recurrent else {}
    return {name: value for name, value in sizes.items() if name != "head_dim" or name in known} | recurrent | layers


def model_of(family: str, start: Path, **changes: Any) -> Model:
    return with_start(
        Model.model_validate({"family": family, "init": {"upcycle": str(start), "num_experts": 4, **changes}})
    )


def upcycled(directory: Path, family: str, start: Path, **changes: Any) -> Path:
    write_whole(
        Start(model_of(family, start, **changes), Path("no-tokenizer"), LENGTH, 0),
        clusters=2,
        trained_seed=None,
        batches=[],
        settings=Merge(),
        keep_optimizer_state=False,
        device="cpu",
        directory=directory,
    )
    return directory


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = runnable(load_model(directory))(IDS).logits
    return found


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


@pytest.mark.ecosystem("Start: dense model of every relative", "transformers", "torch")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        {"rope_parameters": YARN},
        {"rope_parameters": LINEAR},
    ],
)
@pytest.mark.parametrize(("family", "kind"), RELATIVES)
def test_the_experts_of_a_dense_model_compute_what_it_did(
    tmp_path: Path, family: str, kind: str, changes: dict[str, Any]
) -> None:
    start = dense(tmp_path / "dense", kind, **changes)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
    found = logits(upcycled(tmp_path / "moe", family, start))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, next(iter(page.dense)))
        for family, page in DECLARATIONS.items()
        if page.dense and page.attention.own_head_dim
    ],
)
def test_heads_of_a_size_of_their_own_are_kept(tmp_path: Path, family: str, kind: str) -> None:
    start = dense(tmp_path / "dense", kind, head_dim=12, attention_bias=family == "qwen3_moe")  # 16 / 2 is 8
    check_start_tensors(model_of(family, start))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
    torch.testing.assert_close(logits(upcycled(tmp_path / "moe", family, start)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_biases", [False, True])
def test_the_factors_of_granite_are_kept(tmp_path: Path, has_biases: bool) -> None:
    start = biased(
        tmp_path / "dense",
        "granite",
        attention_bias=has_biases,
        embedding_multiplier=12.0,
        attention_multiplier=0.1,
        residual_multiplier=0.22,
        logits_scaling=6.0,
    )
    check_start_tensors(model_of("granitemoe", start))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
    torch.testing.assert_close(logits(upcycled(tmp_path / "moe", "granitemoe", start)), expected, rtol=1e-4, atol=1e-5)


def biased(directory: Path, kind: str = "llama", zero: str = "", **changes: Any) -> Path:
    """A dense model whose biases are random, but for those whose name holds `zero`."""
    dense(directory, kind, **changes)
    held = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key, tensor in held.items():
        if key.endswith(".bias"):
            held[key] = (
                torch.zeros_like(tensor) if zero and zero in key else torch.randn(tensor.shape, generator=generator)
            )
    save_file(held, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("kind", "zero", "changes"),
    [
        ("qwen2", "", {}),
        ("llama", "o_proj", {"attention_bias": True}),
        # values take in the output's bias
        ("llama", "mlp", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    ],
)
def test_biases_of_attention_are_kept_by_qwen2_moe(
    tmp_path: Path, kind: str, zero: str, changes: dict[str, Any]
) -> None:
    start = biased(tmp_path / "dense", kind, zero, **changes)
    check_start_tensors(model_of("qwen2_moe", start))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
    torch.testing.assert_close(logits(upcycled(tmp_path / "moe", "qwen2_moe", start)), expected, rtol=1e-4, atol=1e-4)


def test_biases_that_are_zero_are_left_out(tmp_path: Path) -> None:
    start = biased(tmp_path / "dense", "llama", "proj", attention_bias=True, mlp_bias=True)
    check_start_tensors(model_of("mixtral", start))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
    torch.testing.assert_close(logits(upcycled(tmp_path / "moe", "mixtral", start)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        (
            "mixtral",
            {"attention_bias": True},
            r"self_attn\.k_proj\.bias: .*is not zero, .* use model\.family qwen2_moe",
        ),
        ("mixtral", {"mlp_bias": True}, r"mlp\.down_proj\.bias: .*is not zero, .* use a model without it"),
        ("qwen2_moe", {"attention_bias": True}, r"self_attn\.o_proj\.bias: .*is not zero, .* use a model without it"),
    ],
)
def test_biases_without_a_place_are_refused_before_anything_is_made(
    tmp_path: Path, family: str, changes: dict[str, Any], line: str
) -> None:
    start = biased(tmp_path / "dense", "llama", **changes)
    with pytest.raises(CheckpointError, match=rf"^model\.init\.upcycle: .*{line}"):
        check_start_tensors(model_of(family, start))


def test_the_tensors_of_a_start_are_held_against_its_configuration(tmp_path: Path) -> None:
    start = dense(tmp_path / "dense", "qwen3")
    stored = load_file(start / "model.safetensors")
    first = "model.layers.0.self_attn.q_proj.weight"
    for change, line in (
        ({first: torch.zeros(3, 16)}, rf"{first} has another shape .*\(\[3, 16\] instead of \[16, 16\]\)"),
        ({"model.layers.7.input_layernorm.weight": torch.zeros(16)}, r"model\.layers\.7\.\S* is not in the model"),
        ({"model.embed_positions.weight": torch.zeros(16)}, r"embed_positions\.weight: is no tensor"),
    ):
        save_file(stored | change, start / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"^model\.init\.upcycle: .*{line}"):
            check_start_tensors(model_of("qwen3_moe", start))
    del stored[first]
    save_file(stored, start / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{first} is missing"):
        check_start_tensors(model_of("qwen3_moe", start))


def test_a_start_that_does_not_fit_ends_a_run_before_its_corpus(tmp_path: Path) -> None:
    start = biased(tmp_path / "dense", "llama", attention_bias=True, vocab_size=300)
    save_trained(train_bpe(["a b c"], 300), start)
    config = small_config(
        tmp_path,
        tokens=FEW_TOKENS,
        clusters={"count": 4},
        model={"family": "mixtral", "config": None, "init": {"upcycle": str(start), "num_experts": 4}},
    )
    with pytest.raises(CheckpointError, match=r"^model\.init\.upcycle: .*is not zero"):
        pipeline.run(config, backend=OneCorpus())
    assert not (config.directory / "corpus").exists()


@pytest.mark.parametrize("family", UPCYCLED)
def test_a_model_with_one_expert_is_as_good_a_start(tmp_path: Path, family: str) -> None:
    config = tiny_config(family, 1)
    write_checkpoint(tmp_path / "seed", random_tensors(config).items(), config)
    never = DECLARATIONS[family].router.normalises == "never"
    whole = upcycled(tmp_path / "moe", family, tmp_path / "seed", num_experts_per_tok=4 if never else 3)
    torch.testing.assert_close(logits(whole), logits(tmp_path / "seed"), rtol=1e-4, atol=1e-4)
    found = open_checkpoint(whole)
    routers = [
        found[key] for key in map(ModelMap(family).router_key, range(config["num_hidden_layers"])) if key in found
    ]
    assert routers
    assert all(len(router.unique(dim=0)) == 4 for router in routers), "experts that nothing tells apart stay equal"


def test_copies_whose_weights_would_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v2", 1)
    write_checkpoint(tmp_path, random_tensors(config).items(), config)
    with pytest.raises(
        CheckpointError, match=r"^model\.init\.num_experts_per_tok: 3: changes .* set it to num_experts"
    ):
        model_of("deepseek_v2", tmp_path, num_experts_per_tok=3)


def test_copies_whose_weights_cannot_sum_to_one_are_refused(tmp_path: Path) -> None:
    config = tiny_config("phimoe", 1)
    write_checkpoint(tmp_path, random_tensors(config).items(), config)
    with pytest.raises(
        CheckpointError, match=r"^model\.init\.upcycle: .* cannot be upcycled: the weights of a token's"
    ):
        model_of("phimoe", tmp_path)


def test_its_experts_are_the_mlp_and_its_backbone_the_rest(tmp_path: Path) -> None:
    start = dense(tmp_path / "dense", "qwen3")
    held = AutoModelForCausalLM.from_pretrained(start).state_dict()
    names = ModelMap("qwen3_moe")
    for key, tensor in open_checkpoint(upcycled(tmp_path / "moe", "qwen3_moe", start)).items():
        role = names.classify(key)
        of_the_mlp = f"model.layers.{role.layer}.mlp.{role.part}_proj.weight"
        if role.role != "router":
            assert torch.equal(tensor, held[key if role.expert is None else of_the_mlp]), key


@pytest.mark.slow
def test_a_run_goes_on_with_the_dense_model(tmp_path: Path) -> None:
    """Seed phase, clusters of its hidden states and all that follows, from another run's seed."""
    before = small_config(tmp_path / "first", tokens=FEW_TOKENS)
    first = pipeline.run(before, backend=OneCorpus())
    start = {"family": "qwen3_moe", "config": None, "init": {"upcycle": str(first / "seed"), "num_experts": 4}}
    changes = {
        "model": start,
        "tokenizer": {"path": str(first / "corpus" / "tokenizer")},
        "clusters": {"count": 4, "vectors": "hidden_state"},
    }
    config = small_config(tmp_path / "second", tokens=FEW_TOKENS, **changes)
    directory = pipeline.run(config, backend=OneCorpus())
    # The first run's seed has read the text in an order that no training of the second has.
    orders = [
        dense_seed(before),
        dense_seed(config),
        finetune_seed(config),
        *(submodel_seed(config, k) for k in range(4)),
    ]
    assert len(set(orders)) == len(orders)
    card = (directory / "model" / "README.md").read_text(encoding="utf-8")
    assert "started from are those of `seed`, a dense model whose MLP became the experts." in card
    losses = [read_json(run / "report.json")["evaluation"]["perplexity"] for run in (first, directory)]
    assert losses[1] < losses[0]
    untrained = small_config(tmp_path / "third", tokens=FEW_TOKENS | {"seed_share": 0.0}, **changes)
    stop = StopFile(tmp_path / "stop")

    def end(event: Event) -> None:
        if event.type == "stage_finished" and event.stage == "seed":
            stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(untrained, (end,), backend=OneCorpus(), stop=stop)
    begun = open_checkpoint(untrained.directory / "seed")
    assert all(
        torch.equal(tensor, begun[key]) for key, tensor in open_checkpoint(first / "seed").items() if "gate" not in key
    )


@pytest.mark.parametrize(
    ("kind", "changes", "family"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"attention_bias": True}, "qwen2_moe"),
        ("mistral", {}, "mixtral"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("granite", {}, "granitemoe"),
    ],
)
def test_the_family_is_that_of_the_dense_models_closest_relative(
    tmp_path: Path, kind: str, changes: dict[str, Any], family: str
) -> None:
    start = dense(tmp_path / "dense", kind, **changes)
    model = with_start(Model.model_validate({"init": {"upcycle": str(start), "num_experts": 4}}))
    assert model.family_name == family
    check_start_tensors(model)
    typed = model_of(family, start)
    assert model.architecture == typed.architecture


def test_a_checked_configuration_has_the_sizes_of_its_start_and_reads_them_no_more(tmp_path: Path) -> None:
    """Before: each use of the sizes read the start's `config.json`; without it, none was known."""
    start = dense(tmp_path / "dense", "qwen3")
    raw: dict[str, Any] = {"name": "x", "corpus": {"sources": [{"path": "embedded"}], "sequence_length": LENGTH}}
    raw["model"] = {"init": {"upcycle": str(start), "num_experts": 4}}
    with pytest.raises(RuntimeError, match="was not read"):
        _ = RunConfig.model_validate(raw).model.architecture
    config = check_config(raw)
    stored = config.model_dump(mode="json")
    assert check_config(stored) == config
    stored["model"]["config"]["hidden_size"] *= 2
    with pytest.raises(ConfigError, match=r"^model\.config: differs from the sizes of model\.init\.upcycle .* remove"):
        check_config(stored)
    shutil.rmtree(start)
    assert (config.model.family_name, config.model.architecture.hidden_size) == ("qwen3_moe", 16)
    assert fingerprints(config) == fingerprints(RunConfig.model_validate_json(config.model_dump_json()))


@pytest.mark.parametrize("family", ALONE)
def test_the_family_of_an_moe_is_in_its_config(tmp_path: Path, family: str) -> None:
    config = tiny_config(family, 4)
    write_checkpoint(tmp_path / "moe", random_tensors(config).items(), config)
    assert with_start(Model.model_validate({"init": {"checkpoint": str(tmp_path / "moe")}})).family_name == family


@pytest.mark.parametrize(
    ("init", "kind", "line"),
    [
        ("checkpoint", "gpt2", "holds a model of 'gpt2', which is not supported; use one of mixtral, qwen2_moe"),
        ("upcycle", "gpt2", "holds a model of 'gpt2', which is not supported; use one of mixtral, qwen2_moe"),
        ("checkpoint", "llama", "holds a dense model of 'llama'; use model.init.upcycle"),
    ],
)
def test_a_model_without_a_family_is_one_line(tmp_path: Path, init: str, kind: str, line: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    model = Model.model_validate({"init": {init: str(tmp_path)}})
    with pytest.raises(CheckpointError, match=rf"^model\.init\.{init}: .*: {line}"):
        with_start(model)


@pytest.mark.parametrize(
    ("family", "kind", "line"),
    [
        (
            "qwen3_moe",
            "mistral",
            (
                "holds a model of 'mistral'; qwen3_moe is upcycled from qwen3 or qwen3_moe with one expert; "
                "set model.family to mixtral"
            ),
        ),
        (
            "olmoe",
            "qwen3",
            "holds a model of 'qwen3'; olmoe is upcycled from olmoe with one expert; set model.family to {takers}",
        ),
    ],
)
def test_another_kind_of_model_is_refused(tmp_path: Path, family: str, kind: str, line: str) -> None:
    start = dense(tmp_path / "dense", kind)
    line = line.format(takers=" or ".join(name for name, page in DECLARATIONS.items() if kind in page.dense))
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'model.init.upcycle: {str(start)!r}: {line}')}$"):
        small_config(tmp_path, model={"family": family, "config": None, "init": {"upcycle": str(start)}})


def test_a_whole_moe_is_no_dense_model(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", 4)
    write_checkpoint(tmp_path / "moe", random_tensors(config).items(), config)
    with pytest.raises(CheckpointError, match="holds 4 experts of 'qwen3_moe'; qwen3_moe is upcycled from"):
        small_config(
            tmp_path, model={"family": "qwen3_moe", "config": None, "init": {"upcycle": str(tmp_path / "moe")}}
        )


def test_windows_that_slide_in_some_layers_are_refused(tmp_path: Path) -> None:
    start = dense(tmp_path / "dense", "qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(CheckpointError, match=r"^model\.init\.upcycle: .*use_sliding_window.* use another model$"):
        small_config(tmp_path, model={"family": "qwen3_moe", "config": None, "init": {"upcycle": str(start)}})


def test_other_weights_in_the_same_place_are_another_start(tmp_path: Path) -> None:
    """A resumed run must not take artifacts of the old ones for done."""
    start = dense(tmp_path / "dense", "qwen3")
    config = small_config(
        tmp_path,
        tokens=FEW_TOKENS,
        clusters={"count": 4},
        tokenizer={"path": str(tmp_path)},
        model={"family": "qwen3_moe", "config": None, "init": {"upcycle": str(start), "num_experts": 4}},
    )
    before = fingerprints(config, input_identity(config))
    assert fingerprints(config, input_identity(config)) == before
    os.utime(start / "model.safetensors", ns=(1, 1))
    after = fingerprints(config, input_identity(config))
    assert [stage for stage in before if before[stage] == after[stage]] == ["corpus"]


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ({"upcycle": "x", "num_experts": 0}, "model.init.num_experts: 0: must be at least 1"),
        ({"upcycle": "x", "num_experts": 1}, "model.init: num_experts_per_tok 2 exceeds num_experts 1"),
        ({"upcycle": "x", "experts": 1}, "model.init.experts: no such setting"),
        ({"upcycel": "x"}, "model.init.upcycel: no such setting; did you mean 'upcycle'?"),
        ({"upcycle": "no/such/place"}, "model.init.upcycle: 'no/such/place': no readable config.json there"),
        ({}, "model.init"),
    ],
)
def test_mistakes_name_the_setting(tmp_path: Path, init: dict[str, Any], line: str) -> None:
    raw = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, "model": {"init": init}}
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        check_config(raw)
    assert str(caught.value).startswith(line)


def test_an_moe_has_no_seed_phase_and_the_line_says_what_has(tmp_path: Path) -> None:
    raw = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, "model": {"init": {"checkpoint": "x"}}}
    with pytest.raises(
        ConfigError, match=r"^tokens\.seed_share: must be 0 with model\.init\.checkpoint, .* model\.init\.upcycle$"
    ):
        check_config(raw)


def test_copies_of_an_expert_have_rows_of_their_own_also_where_the_seed_has_several(tmp_path: Path) -> None:
    directory = pipeline.run(
        small_config(
            tmp_path / "runs",
            tokens={"total": 12_000, "seed_share": 0.4, "finetune_share": 0.6},
            clusters={"count": 2},
            merge={"calibration_tokens": 1024},
            model={
                "config": {
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "moe_intermediate_size": 32,
                    "num_experts": 4,
                    "num_experts_per_tok": 2,
                }
            },
        ),
        backend=OneCorpus(),
    )
    upcycled = open_checkpoint(directory / "merged")
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        first, second, copy = (upcycled[f"{block}.experts.{e}.down_proj.weight"] for e in (0, 1, 2))
        assert torch.equal(first, copy)
        assert not torch.equal(first, second)
        assert len(torch.unique(upcycled[f"{block}.gate.weight"], dim=0)) == 4


@pytest.mark.parametrize(("family", "kind"), RELATIVES)
def test_the_measured_start_is_the_dense_model_itself(tmp_path: Path, family: str, kind: str) -> None:
    start = dense(tmp_path / "dense", kind)
    lengths = (LENGTH, 3, 2 * LENGTH, 1)
    tokens = [np.arange(7 * i, 7 * i + length, dtype=np.int32) % VOCAB for i, length in enumerate(lengths)]
    documents = Documents(
        ids=tuple(bytes([i]) for i in range(4)),
        sources=("x", "y", "y", "x"),
        texts=tuple("ab" * length for length in lengths),
        tokens=tuple(tokens),
        loss_masks=(None,) * 4,
    )
    experts = {"num_experts_per_tok": 4} if family == "deepseek_v2" else {}
    found = evaluate_start(
        Start(model_of(family, start, **experts), Path("no-tokenizer"), LENGTH, 0),
        documents,
        prefix=5,
        sequence_length=LENGTH,
    )
    model, nats = AutoModelForCausalLM.from_pretrained(start), []
    for document in tokens:
        whole = torch.from_numpy(np.concatenate([[5], document])).long()
        windows = [whole[i : i + LENGTH + 1] for i in range(0, len(document), LENGTH)]
        with torch.no_grad():
            nats.append(
                sum(
                    float(
                        torch.nn.functional.cross_entropy(
                            model(window[None, :-1]).logits[0], window[1:], reduction="sum"
                        )
                    )
                    for window in windows
                )
            )
    assert found["loss"] == pytest.approx(sum(nats) / sum(lengths), rel=1e-5)
    assert [entry["loss"] for entry in found["sources"]] == pytest.approx(
        [(nats[0] + nats[3]) / (lengths[0] + lengths[3]), (nats[1] + nats[2]) / (lengths[1] + lengths[2])], rel=1e-5
    )
