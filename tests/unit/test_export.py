import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import run_example
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from docs.ecosystem import FAMILY
from moedisco_ray.core.config import FAMILIES, Architecture, read_architecture
from moedisco_ray.core.errors import CheckpointError, RunError
from moedisco_ray.core.families import DECLARATIONS, PARTS
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.models import ModelMap, Role, hf_config, open_checkpoint, save_model, skeleton, write_config
from moedisco_ray.models.shard_file import ShardFile
from moedisco_ray.models.streamed import streamed_model
from moedisco_ray.stages.export import directory as export_directory
from moedisco_ray.stages.export.directory import export
from moedisco_ray.stages.export.origin import Origin
from moedisco_ray.stages.export.samples import _draw, continue_prompts

VOCAB, POSITIONS, EXPERTS = 320, 48, 4
TEXTS = ("def f(x): return x  # Größe 漢字", "hello world the cat sat on the mat")
TOKENS = torch.arange(2 * 24).mul(31).remainder(VOCAB).view(2, 24)

NAMED = {"mixtral", "olmoe", "qwen3_moe"}
"""Families of tests that have no case for each."""
OF_ALL_FAMILIES = "test_a_process_with_only_transformers"
READER = """
import sys
from pathlib import Path
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
assert not any(name.startswith("moedisco") for name in sys.modules)
tokens = torch.arange(2 * 24).mul(31).remainder(320).view(2, 24)
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    inputs = tokenizer("hello", return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=3)[0])
    assert text.startswith("hello"), text
    numpy.save(Path(directory).parent / (Path(directory).name + ".npy"), logits.float().numpy())
    print(model.dtype, *tokenizer("the cat <|endoftext|>").input_ids)
"""

REPORT = RunReport.model_validate(
    {
        "name": "tiny",
        "seed": 3,
        "family": "qwen3_moe",
        "stages": [
            {
                "name": "seed",
                "pool": "low_memory",
                "workers": 1,
                "seconds": 12.0,
                "tokens": 1000,
                "worker_seconds": 12.0,
                "dollars": 0.5,
                "loss": 3.25,
                "perplexity": 25.5,
                "bits_per_byte": 2.0,
            }
        ],
        "tokens": 1000,
        "bill": run_example.bill().model_dump(mode="json"),
        "clusters": {"clusters": [{"documents": 7, "tokens": 99, "terms": ["a|b", "def"], "examples": []}]},
        "evaluation": {
            "perplexity": 21.5,
            "bits_per_byte": 1.75,
            "documents": 4,
            "tokens": 50,
            "sources": [{"source": "code", "perplexity": 9.0, "bits_per_byte": 1.0, "documents": 4, "tokens": 50}],
            "clusters": [{"cluster": 0, "perplexity": None, "bits_per_byte": None, "documents": 0, "tokens": 0}],
        },
        "versions": {"torch": "2.x"},
        "tags": {},
        "curves": {},
    }
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(family, dtype=torch.float32, **changes):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "rope_theta": 12_345.0,
        **changes,
    }
    if DECLARATIONS[family].attention.latent:
        del sizes["num_key_value_heads"]
    torch.manual_seed(1)
    config = hf_config(family, Architecture(**sizes), VOCAB, POSITIONS, 0)
    # Not .to(dtype), which would round the rotary frequencies too.
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    named = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(directory)
    return directory


def names(directory):
    found = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += file.keys()
    return found


def save_fused(model, directory):
    """As transformers holds it in memory, under the names it has there."""
    directory.mkdir(parents=True)
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, directory / "model.safetensors")
    write_config(directory, model.config.to_dict())


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory, tokenizer_dir):
    """Models by name: families that selected tests look at, one in bf16 and shards, one tied, one stored fused."""
    root = tmp_path_factory.mktemp("exported")
    selected = " ".join(item.name for item in request.session.items if item.path == request.path)
    asked = {name for name in FAMILIES if f"[{name}]" in selected or OF_ALL_FAMILIES in selected}
    built = {family: tiny_model(family) for family in FAMILIES if family in asked | NAMED}
    built |= {
        "bf16": tiny_model("qwen3_moe", torch.bfloat16),
        "tied": tiny_model("olmoe", tie_word_embeddings=True),
        "fused": tiny_model("mixtral"),
    }
    for name, model in built.items():
        if name == "fused":
            save_fused(model, root / "trained" / name)
        else:
            save_model(model, root / "trained" / name, max_shard_bytes=20_000 if name == "bf16" else 2**30)
        export(root / "trained" / name, tokenizer_dir, root / name, REPORT, prompts=("the cat", ""))
    return root, built


def test_a_count_of_experts_under_another_name_is_left_out(tmp_path):
    """transformers 5 reads it before the family's own name."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "qwen3_moe", "num_local_experts": 128, "num_experts": 128, "output_router_logits": False}
        )
    )
    found = Origin(tmp_path, own_tokens=False).config({"model_type": "qwen3_moe", "num_experts": 4})
    assert found.items() >= {"num_experts": 4, "output_router_logits": False}.items()
    assert "num_local_experts" not in found


@pytest.mark.slow
@pytest.mark.ecosystem("Use: Hugging Face directory in transformers", "transformers")
@pytest.mark.parametrize("module", sorted({page.module for page in DECLARATIONS.values()}, key=str))
def test_a_process_with_only_transformers_gets_the_same_logits(exported, tokenizer_dir, module, record_property):
    """Families that transformers does not have need their module too."""
    root, every = exported
    built = {name: model for name, model in every.items() if DECLARATIONS[model.config.model_type].module == module}
    environment = {key: value for key, value in os.environ.items() if module is not None or key != "PYTHONPATH"}
    script = READER if module is None else READER.replace("\ntokens", f"\nimport {module}\ntokens")
    run = subprocess.run(
        [sys.executable, "-c", script, *(str(root / name) for name in built)],
        cwd=root,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    ids = AutoTokenizer.from_pretrained(tokenizer_dir)("the cat <|endoftext|>").input_ids
    for (name, model), line in zip(built.items(), run.stdout.splitlines(), strict=True):
        with torch.no_grad():
            expected = model(input_ids=TOKENS).logits.float().numpy()
        np.testing.assert_array_equal(np.load(root / f"{name}.npy"), expected, err_msg=name)
        assert line.split() == [str(model.dtype), *map(str, ids)]
        record_property(FAMILY, model.config.model_type)


@pytest.mark.parametrize("name", [*FAMILIES, "bf16", "tied", "fused"])
def test_names_on_disk_are_classic_and_complete(exported, name):
    root, built = exported
    family = built[name].config.model_type
    found = names(root / name)
    page = DECLARATIONS[family]
    model_map = ModelMap(family)
    experts = {model_map.block_key(layer, f"experts.{name}") for layer in range(2) for name in page.stacks} or {
        model_map.expert_key(layer, expert, part) for layer in range(2) for expert in range(EXPERTS) for part in PARTS
    }
    assert {key for key in found if model_map.classify(key).role is Role.EXPERT} == experts
    assert model_map.router_key(1) in found
    assert page.stacks or not [key for key in found if "gate_up_proj" in key]
    assert len(found) == len(set(found))


def test_classic_weights_are_linked_and_fused_ones_are_not(exported):
    root, _ = exported
    linked = [root / "trained" / "bf16", root / "bf16"]
    assert len(list(linked[1].glob("*.safetensors"))) > 1
    for path in linked[0].glob("*.safetensors*"):
        assert (linked[1] / path.name).read_bytes() == path.read_bytes()
        assert path.suffix != ".safetensors" or (linked[1] / path.name).samefile(path)
    assert not (root / "fused" / "model.safetensors").samefile(root / "trained" / "fused" / "model.safetensors")


def test_where_links_do_not_work_files_are_copied(exported, tokenizer_dir, tmp_path, monkeypatch):
    root, _ = exported

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = root / "trained" / "mixtral"
    export(source, tokenizer_dir, tmp_path / "model", REPORT)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [*FAMILIES, "bf16"])
def test_configuration_says_what_readers_ask(exported, name):
    root, built = exported
    config = json.loads((root / name / "config.json").read_text())
    assert config["architectures"] == [DECLARATIONS[config["model_type"]].architecture or type(built[name]).__name__]
    assert config["dtype"] == config["torch_dtype"] == str(built[name].dtype).removeprefix("torch.")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12_345.0
    assert config[DECLARATIONS[config["model_type"]].num_experts_field] == EXPERTS
    assert config["eos_token_id"] == 0
    assert config["pad_token_id"] is None
    generation = json.loads((root / name / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == 0
    assert json.loads((root / name / "tokenizer_config.json").read_text())["model_max_length"] == POSITIONS


def test_nothing_is_pickled(exported):
    root, built = exported
    suffixes = {path.suffix for name in built for path in (root / name).iterdir()}
    assert suffixes == {".safetensors", ".json", ".md"}


def test_parameters_are_counted(tmp_path, tokenizer_dir):
    model = tiny_model("qwen2_moe")
    save_model(model, tmp_path / "trained")
    figures = export(tmp_path / "trained", tokenizer_dir, tmp_path / "model", REPORT)
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["parameters"] - figures["active_parameters"] == 2 * (EXPERTS - 2) * 3 * 32 * 16
    assert figures["bytes"] > 4 * figures["parameters"]
    assert figures["samples"] == []


def test_the_card_holds_the_run(exported):
    root, _ = exported
    text = (root / "qwen3_moe" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| seed | low-memory | 1 | 1,000 | 12.0 s | $0.5000 | 3.2500 | 25.50 |" in body
    assert "| 0 | 7 | 99 | a\\|b, def |" in body
    assert "| code | - | 9.00 | 1.000 | 4 | 50 |" in body
    assert "| cluster 0 | - | - | - | 0 | 0 |" in body
    assert "    the cat" in body
    code = body.split("```")[1]
    assert len(code.strip().splitlines()) == 6  # the language, and five lines
    compile(code.removeprefix("python"), "card", "exec")


def test_the_lines_on_the_card_work(exported):
    root, _ = exported
    code = (root / "olmoe" / "README.md").read_text().split("```")[1].removeprefix("python")
    printed = []
    exec(code.replace("path/to/this/directory", str(root / "olmoe")), {"print": printed.append})
    assert printed[0].startswith("The")


def test_a_model_that_reloads_differently_is_an_error(exported, tokenizer_dir, tmp_path, monkeypatch):
    root, _ = exported
    original = export_directory.open_streamed

    def broken(directory, **settings):
        model = original(directory, **settings)
        if directory == tmp_path / "model":
            model.model.rotary_emb.inv_freq.mul_(2)
        return model

    monkeypatch.setattr(export_directory, "open_streamed", broken)
    with pytest.raises(RunError, match="logits"):
        export(root / "trained" / "qwen3_moe", tokenizer_dir, tmp_path / "model", REPORT)


def test_a_tensor_that_the_disk_changes_is_an_error(exported, tokenizer_dir, tmp_path, monkeypatch):
    root, _ = exported
    put, changed = ShardFile.put, "model.layers.1.mlp.experts.3.down_proj.weight"

    def broken(file, key, tensor):
        put(file, key, tensor if key != changed else tensor.clone().index_fill_(0, torch.tensor([7]), 0))

    monkeypatch.setattr(ShardFile, "put", broken)
    with pytest.raises(RunError, match=f"tensor {changed}, read again, is not the trained model's"):
        export(root / "trained" / "qwen3_moe", tokenizer_dir, tmp_path / "model", REPORT, dtype="bf16")


def test_fused_names_are_an_error():
    for family, key in (
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj"),
        ("mixtral", "model.layers.0.mlp.gate.weight"),
        ("olmoe", "model.layers.0.mlp.experts.down_proj"),
    ):
        with pytest.raises(CheckpointError, match=key):
            export_directory.check_classic([key], ModelMap(family))


def test_a_missing_expert_is_an_error(exported, tokenizer_dir, tmp_path):
    root, built = exported
    save_model(
        built["mixtral"],
        tmp_path / "trained",
        ((key, tensor) for key, tensor in _canonical(root / "mixtral").items() if ".experts.3.w2" not in key),
    )
    with pytest.raises(CheckpointError, match="is missing"):
        export(tmp_path / "trained", tokenizer_dir, tmp_path / "model", REPORT)


def _canonical(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping


def test_samples_are_the_same_every_time(exported, tokenizer_dir):
    root, built = exported
    prompts = ("the cat", "", "hello " * 60)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    streamed = streamed_model(
        open_checkpoint(root / "olmoe"), built["olmoe"].config, dtype=torch.float32, resident=False
    )
    first = continue_prompts(streamed, tokenizer, prompts, 12, 5)
    again = continue_prompts(built["olmoe"], tokenizer, prompts, 12, 5)
    assert first == again
    assert [sample["prompt"] for sample in first] == list(prompts)
    assert all(sample["text"] for sample in first)
    assert continue_prompts(streamed, tokenizer, prompts, 12, 6) != first


def test_samples_end_where_positions_end(exported, tokenizer_dir):
    _, built = exported
    lengths = []
    handle = built["mixtral"].register_forward_hook(lambda _module, args, _output: lengths.append(args[0].shape[1]))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    continue_prompts(built["mixtral"], tokenizer, ("hello " * 60,), 1000, 0)
    handle.remove()
    assert sum(lengths) <= POSITIONS


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.1, 0.6, 0.3])) * 0.7  # the temperature cancels
    drawn = [_draw(logits, (i + 0.5) / 1000) for i in range(1000)]
    assert [drawn.count(token) for token in range(3)] == [100, 600, 300]
    assert _draw(np.zeros(100), 0.999999) == 39


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_scaled_positions_are_computed_and_written_in_both_spellings(tmp_path, tokenizer_dir, scaling):
    model, plain = tiny_model("mixtral", rope_scaling=scaling), tiny_model("mixtral")
    expected = model(input_ids=TOKENS).logits
    assert not torch.allclose(expected, plain(input_ids=TOKENS).logits, atol=1e-3), "scaling changes what is computed"
    save_model(model, tmp_path / "trained")
    export(tmp_path / "trained", tokenizer_dir, tmp_path / "model", REPORT)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    assert config["rope_parameters"] == scaling | {"rope_theta": 12_345.0}
    assert (config["rope_scaling"], config["rope_theta"]) == (scaling, 12_345.0)
    assert read_architecture(tmp_path / "model", "mixtral").rope_scaling == scaling
    for absent in ((), ("rope_parameters",), ("rope_scaling", "rope_theta")):  # each spelling alone is enough
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in absent}))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=TOKENS).logits, expected)


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "F32"), ("bf16", "BF16"), ("fp16", "F16")])
def test_weights_are_written_in_the_dtype_that_is_asked_for(exported, tokenizer_dir, tmp_path, dtype, stored):
    root, _ = exported
    export(root / "trained" / "olmoe", tokenizer_dir, tmp_path / "model", REPORT, dtype=dtype)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {stored}  # noqa: SIM118 - no mapping


@pytest.mark.parametrize("family", [name for name in FAMILIES if DECLARATIONS[name].router.correction])
def test_a_skeleton_in_bf16_has_its_corrections_in_fp32(family):
    model = skeleton(tiny_model(family, torch.bfloat16).config)
    assert model.dtype == torch.bfloat16
    tensors = dict([*model.named_buffers(), *model.named_parameters()])
    found = [tensor.dtype for name, tensor in tensors.items() if name.endswith(DECLARATIONS[family].router.correction)]
    assert found
    assert set(found) == {torch.float32}


@pytest.mark.parametrize("family", [name for name in FAMILIES if DECLARATIONS[name].router.correction])
def test_a_routers_correction_is_not_rounded(family, tokenizer_dir, tmp_path):
    model, correction = tiny_model(family, torch.bfloat16), DECLARATIONS[family].router.correction
    every = (*model.named_buffers(), *model.named_parameters())
    found = [tensor for name, tensor in every if name.endswith(f".{correction}")]
    assert found
    for tensor in found:  # transformers rounds those of some families
        tensor.data = 1 + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "trained")
    trained = open_checkpoint(tmp_path / "trained")
    export(tmp_path / "trained", tokenizer_dir, tmp_path / "model", REPORT, dtype="bf16")
    exported = open_checkpoint(tmp_path / "model")
    for key in exported:
        if key.endswith(correction):
            assert exported.dtype(key) == trained.dtype(key) == torch.float32
            assert torch.equal(exported[key], trained[key])
        else:
            assert exported.dtype(key) == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_a_replaced_tokenizer_s_tokens_end_a_text_and_other_generation_settings_stay(exported, tokenizer_dir, tmp_path):
    root, _ = exported
    start = tmp_path / "start"
    shutil.copytree(root / "olmoe", start)
    stored = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(
        json.dumps(stored | {"eos_token_id": [7, 8], "pad_token_id": 9, "own_field": "kept"})
    )
    (start / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "temperature": 0.6, "do_sample": True})
    )
    for own, end, pad in ((True, [7, 8], 9), (False, 0, None)):
        made = tmp_path / str(own)
        export(root / "trained" / "olmoe", tokenizer_dir, made, REPORT, origin=Origin(start, own))
        config, generation = (
            json.loads((made / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        assert (config["eos_token_id"], config["pad_token_id"], config["own_field"]) == (end, pad, "kept")
        assert (generation["eos_token_id"], generation["temperature"]) == (end, 0.6)


def test_samples_end_at_every_end_token_and_begin_after_the_prefix(exported, tokenizer_dir):
    _, built = exported
    seen = []
    handle = built["olmoe"].register_forward_hook(lambda _module, args, _output: seen.append(args[0].tolist()))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    found = continue_prompts(built["olmoe"], tokenizer, ("the",), 12, 5, prefix=5, ends=range(VOCAB))
    handle.remove()
    assert found == [{"prompt": "the", "text": ""}]
    assert seen[0][0][0] == 5
