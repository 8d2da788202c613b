"""`moedisco merge`: dense fine-tunes of one base model as one MoE."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from clustering_corpus import VOCABULARY, WORDS, ids_of, write_corpus
from hub_standin import hub
from huggingface_hub import ModelCard, metadata_load
from moe_models import LENGTH, VOCAB
from other_environments import MERGEKIT, without_ours
from safetensors.torch import load_file, save_file
from small_run import small_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from docs.ecosystem import VERSION
from moedisco_ray.cli.app import app
from moedisco_ray.contrib.merge.merge_models import merge_models
from moedisco_ray.core.errors import CheckpointError, ConfigError, CorpusError, RunDirError, UserError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import open_checkpoint, same_bits

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TRAINED = SIZES | {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FIRST = [
    ("mixtral", "mistral"),
    ("mixtral", "llama"),
    ("qwen2_moe", "qwen2"),
    ("qwen3_moe", "qwen3"),
    ("flex_olmo", "olmo2"),
    ("ernie4_5_moe", "ernie4_5"),
    ("granitemoe", "granite"),
]
"""The family that each kind of dense model becomes."""
COUNT = 3


def random_dense(directory: Path, kind: str, seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A dense model with random weights; norms and biases too."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    model.to(dtype).save_pretrained(directory)
    return directory


def reference(
    family: str, models: list[Mapping[str, torch.Tensor]], base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The MoE as mergekit-moe documents it: base's tensors but for the MLPs; a shared expert is the base's MLP.

    In a family with a shared expert, its weight is 1/2 at first, and mergekit's `residual_scale: 0.5` does the same to
    the experts.
    """
    page = DECLARATIONS[family]
    found = {}
    for key, tensor in base.items():
        if ".mlp." not in key:
            found[key] = tensor
            continue
        part = key.rpartition(".mlp.")[2].removesuffix("_proj.weight")
        at = key.partition(".mlp.")[0]
        if page.stacks:
            joined = {"gate": ("input", ("gate", "up")), "down": ("output", ("down",))}
            for name, parts in [joined[part]] if part in joined else []:
                rows = [projections(model, at, parts) for model in models]
                found[f"{at}.{page.block}.{name}_linear.weight"] = torch.stack(rows)
            continue
        scale = 0.5 if page.shared is not None and part == "down" else 1.0
        for k, model in enumerate(models):
            found[f"{at}.{page.block}.experts.{k}.{page.projection(part)}.weight"] = model[key] * scale
        if page.shared is not None:
            found[f"{at}.mlp.{page.shared.module}.{part}_proj.weight"] = tensor * (1.0 if page.shared.gate else scale)
    return found


def projections(model: Mapping[str, torch.Tensor], layer: str, names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([model[f"{layer}.mlp.{name}_proj.weight"] for name in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "kind"), FIRST)
def test_the_tensors_are_those_of_mergekit_moe(tmp_path: Path, family: str, kind: str, dtype: torch.dtype) -> None:
    places = [random_dense(tmp_path / str(seed), kind, seed, dtype) for seed in range(COUNT + 1)]
    *models, base = map(str, places)
    result = merge_models(models, base, tmp_path / "moe", backbone="base")
    assert result["family"] == family
    *others, start = (load_file(place / "model.safetensors") for place in places)
    expected, found = reference(family, others, start), dict(open_checkpoint(tmp_path / "moe"))
    routers = {key for key in found.keys() - expected.keys() if not key.endswith("correction_bias")}
    assert all(key.endswith(("gate.weight", "router.layer.weight")) for key in routers)
    assert all(len(found[key].unique(dim=0)) == COUNT for key in routers if "shared" not in key), (
        "experts have different rows"
    )
    assert [key for key in expected if not same_bits(found[key], expected[key])] == []
    assert {tensor.dtype for tensor in found.values()} == {dtype}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_backbone_is_the_mean_of_the_fine_tunes(tmp_path: Path, kind: str) -> None:
    places = [random_dense(tmp_path / str(seed), kind, seed) for seed in range(COUNT + 1)]
    merge_models([str(place) for place in places[:-1]], str(places[-1]), tmp_path / "moe")
    models, found = [load_file(place / "model.safetensors") for place in places[:-1]], open_checkpoint(tmp_path / "moe")
    for key in models[0]:
        if ".mlp." not in key:
            torch.testing.assert_close(found[key], torch.stack([model[key] for model in models]).mean(0))


def sentences(name: str, count: int, seed: int) -> list[list[str]]:
    """Text of a domain: a word mostly has the same next word."""
    number = sorted(WORDS).index(name)
    rng = np.random.default_rng([seed, number])
    words = WORDS[name]
    following = np.random.default_rng(number).permutation(len(words))
    found = []
    for _ in range(count):
        at, sentence = int(rng.integers(len(words))), []
        for _ in range(24):
            sentence.append(words[at])
            at = int(following[at]) if rng.random() < 0.85 else int(rng.integers(len(words)))
        found.append(sentence)
    return found


def trained(model: torch.nn.Module, texts: list[list[str]], steps: int, directory: Path, tokenizer: Path) -> Path:
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.tensor([ids_of(sentence) for sentence in texts])
    for _ in range(steps):
        batch_BL = ids[rng.integers(0, len(ids), 16)]
        model(input_ids=batch_BL, labels=batch_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)
    return directory


def finetunes(home: Path) -> Path:
    """Make three fine-tunes of one base model, each with text of its own domain, and the base model."""
    tokenizer = write_corpus(home / "corpus", 6) / "tokenizer"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TRAINED))
    trained(model, [each for name in WORDS for each in sentences(name, 100, 0)], 30, home / "base", tokenizer)
    for name in WORDS:
        start = AutoModelForCausalLM.from_pretrained(home / "base")
        trained(start, sentences(name, 300, 1), 60, home / name, tokenizer)
        (home / f"{name}.txt").write_text(
            "\n\n".join(" ".join(each) for each in sentences(name, 150, 2)), encoding="utf-8"
        )
    return home


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetunes(tmp_path_factory.mktemp("finetuned"))


@pytest.fixture(scope="module")
def merged(finetuned: Path) -> dict[str, Any]:
    models, texts = [str(finetuned / name) for name in WORDS], [str(finetuned / f"{name}.txt") for name in WORDS]
    return merge_models(models, str(finetuned / "base"), finetuned / "moe", texts=texts, max_tokens=9_000)


@pytest.mark.ecosystem("Use: merge of dense fine-tunes, as mergekit-moe does")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_mergekit_moe_writes_the_same_tensors(
    kind: str, finetuned: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if MERGEKIT.python is None:
        pytest.skip(MERGEKIT.missing)
    record_property(VERSION, MERGEKIT.version("mergekit"))
    home = finetuned
    if kind != "llama":
        home = tmp_path
        for seed, name in enumerate(("base", *WORDS)):
            AutoTokenizer.from_pretrained(finetuned / "base").save_pretrained(random_dense(home / name, kind, seed))
    base, *models = (str(home / name) for name in ("base", *WORDS))
    settings: dict[str, Any] = {
        "base_model": base,
        "gate_mode": "random",
        "dtype": "float32",
        "experts": [{"source_model": model} for model in models],
    }
    if kind == "qwen2":  # the shared expert, whose weight is 1/2 at first
        settings["shared_experts"] = [{"source_model": base}]
        settings["experts"] = [each | {"residual_scale": 0.5} for each in settings["experts"]]
    (tmp_path / "moe.yml").write_text(yaml.safe_dump(settings))
    subprocess.run(
        [MERGEKIT.command("mergekit-moe"), "moe.yml", "theirs"], cwd=tmp_path, check=True, env=without_ours()
    )
    merge_models(models, base, tmp_path / "ours", backbone="base")
    ours, theirs = (dict(open_checkpoint(tmp_path / name)) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if "gate.weight" not in key and not same_bits(ours[key], theirs[key])] == []


def test_the_moe_of_three_fine_tunes_is_better_on_the_mixture_than_each(merged: dict[str, Any]) -> None:
    *models, base, moe = merged["losses"]
    assert [row["model"] for row in merged["losses"]] == [*WORDS, "base", "MoE"]
    for number, row in enumerate(models):
        assert min(range(COUNT), key=lambda text: row["texts"][text]) == number
        assert moe["mixture"] < row["mixture"]
    assert moe["mixture"] < base["mixture"]
    assert merged["warnings"] == []
    for layer in merged["layers"]:
        assert layer["accuracy"] > 0.9
        assert all(abs(load - 1 / COUNT) < 0.05 for load in layer["top1_load_C"])


def test_its_directory_is_whole(finetuned: Path, merged: dict[str, Any]) -> None:
    moe = Path(merged["directory"])
    text = " ".join(sentences("sea", 1, 3)[0])
    found, expected = (AutoTokenizer.from_pretrained(each)(text)["input_ids"] for each in (moe, finetuned / "base"))
    assert found == expected
    assert (moe / "generation_config.json").is_file()
    model, info = AutoModelForCausalLM.from_pretrained(moe, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.model_type, model.config.num_local_experts, model.config.num_experts_per_tok) == (
        "mixtral",
        COUNT,
        2,
    )
    record = read_json(moe / "merge.json")
    assert record["losses"] == merged["losses"]
    results = ModelCard.load(moe / "README.md").data.eval_results
    assert {each.dataset_name: each.metric_value for each in results if each.metric_type == "loss"} == {
        f"text: {name}.txt": round(loss, 6) for name, loss in zip(WORDS, merged["losses"][-1]["texts"], strict=True)
    }
    assert {each["rule"] for each in record["tensors"]} == {"copied", "combined", "concatenated"}
    assert not list(finetuned.glob(".merge-*"))


def test_a_run_fine_tunes_it(finetuned: Path, merged: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        corpus={
            "sources": [{"path": str(finetuned / f"{name}.txt"), "name": name} for name in WORDS],
            "sequence_length": 32,
            "validation_fraction": 0.2,
        },
        model={"family": None, "config": None, "init": {"checkpoint": merged["directory"]}},
        tokens={"total": 20_000, "seed_share": 0.0, "finetune_share": 1.0},
        clusters={"count": COUNT},
    )
    evaluation = read_json(pipeline.run(config, backend=LocalBackend()) / "evaluation" / "evaluation.json")
    assert evaluation["perplexity"] < evaluation["start"]["perplexity"]


def test_an_moe_that_is_worse_than_a_model_gives_a_warning(finetuned: Path, tmp_path: Path) -> None:
    """The experts were trained with the backbones of the fine-tunes, and not with that of the base model."""
    models, texts = [str(finetuned / name) for name in WORDS], [str(finetuned / f"{name}.txt") for name in WORDS]
    options = [
        "--base",
        str(finetuned / "base"),
        "--output",
        str(tmp_path / "moe"),
        "--backbone",
        "base",
        "--max-tokens",
        "9000",
    ]
    done = CliRunner().invoke(
        app, ["merge", *models, *options, *(part for text in texts for part in ("--calibration", text))]
    )
    assert done.exit_code == 0, done.output
    shown = [line.split() for line in done.stdout.splitlines()]
    assert shown[0] == ["held-out", "loss", "sea.txt", "kitchen.txt", "court.txt", "mixture"]
    assert [line[0] for line in shown if len(line) == 5] == [*WORDS, "base", "MoE"]
    [warning] = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert "on the mixture of all texts, the MoE" in warning
    assert "is worse than base" in warning


def test_without_text_the_routers_are_random_and_the_command_says_so(tmp_path: Path) -> None:
    places = [str(random_dense(tmp_path / str(seed), "qwen3", seed)) for seed in range(COUNT)]
    done = CliRunner().invoke(
        app, ["merge", *places[:2], "--base", places[2], "--output", str(tmp_path / "moe"), "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert ["routers are random" in warning for warning in result["warnings"]] == [True]
    assert "losses" not in result


def test_models_of_the_hub_are_merged_and_named_in_the_card(tmp_path: Path) -> None:
    places = [random_dense(tmp_path / str(seed), "qwen3", seed) for seed in range(COUNT)]
    for place, licence in zip(places, ("mit", "mit", "apache-2.0"), strict=True):
        (place / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    with hub(tmp_path / "hub-cache") as server:
        for number, place in enumerate(places):
            server.add(f"org/m{number}", place)
        result = merge_models(["org/m0", "hf://org/m1@main"], "org/m0", tmp_path / "moe")
        merge_models(["org/m0", "org/m2"], "org/m0", tmp_path / "other")
    assert (result["models"], result["base"]) == (["org/m0", "org/m1"], "org/m0")
    local = merge_models([str(place) for place in places[:2]], str(places[0]), tmp_path / "local")
    assert local["models"] == ["0", "1"]
    one, other = (dict(open_checkpoint(tmp_path / name)) for name in ("moe", "local"))
    assert [key for key in one if not same_bits(one[key], other[key])] == []
    front = metadata_load(tmp_path / "moe" / "README.md")
    assert (front["license"], front["base_model"]) == ("mit", ["org/m0", "org/m1"])
    assert "license" not in metadata_load(tmp_path / "other" / "README.md")


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        ({"models": ["a"]}, ConfigError, "MODEL: 1: is too few models; name at least two"),
        ({"texts": ["a.txt"]}, ConfigError, "--calibration: 1: texts for 2 models; name one for each"),
        ({"experts_per_token": 3}, ConfigError, "--experts-per-token: 3: exceeds the number of experts, 2; lower it"),
        ({"output": "a"}, RunDirError, "--output: '{}/a': is not an empty directory; choose another"),
        (
            {"models": ["a", "wide"]},
            CheckpointError,
            "MODEL: '{}/wide': has intermediate_size 32, but --base has 24; name",
        ),
        ({"models": ["a", "rows"]}, CheckpointError, "MODEL: '{}/rows': has vocab_size 66, but --base has 64; name"),
        (
            {"models": ["a", "qwen"]},
            CheckpointError,
            "MODEL: '{}/qwen': has model_type 'qwen3_moe', but --base has 'mixtral'",
        ),
        ({"models": ["a", "short"]}, CheckpointError, "MODEL: '{}/short': tensor model.norm.weight is missing"),
        (
            {"base": "gpt2"},
            CheckpointError,
            "--base: '{}/gpt2': holds a model of 'gpt2', which is not supported; use one of",
        ),
        ({"base": "nowhere/at/all"}, CheckpointError, "--base: '{}/nowhere/at/all': no readable config.json there"),
        (
            {"texts": ["one.txt", "one.txt"], "base": "named"},
            CorpusError,
            "--calibration: '{}/one.txt': gives fewer than two",
        ),
        (
            {"texts": ["no.txt", "no.txt"], "base": "named"},
            CorpusError,
            "--calibration: '{}/no.txt': cannot be read (no such",
        ),
        (
            {"texts": ["one.txt", "one.txt"], "base": "few", "models": ["few", "few"]},
            CheckpointError,
            "--base: '{}/few': its embedding has 8 rows, but the tokenizer has",
        ),
        (
            {"output": "one.txt/moe"},
            RunDirError,
            "output: '{}/one.txt/moe': cannot be made: {}/one.txt is not a directory",
        ),
        ({"texts": ["one.txt", "one.txt"]}, ConfigError, "--base: '{}/a': holds no tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], error: type[UserError], line: str
) -> None:
    for name, kind, changes in (
        ("a", "llama", {}),
        ("b", "llama", {}),
        ("wide", "llama", {"intermediate_size": 32}),
        ("rows", "llama", {"vocab_size": 66}),
        ("qwen", "qwen3", {}),
        ("short", "llama", {}),
        ("named", "llama", {}),
        ("few", "llama", {"vocab_size": 8}),
    ):
        random_dense(tmp_path / name, kind, 0, **changes)
    held = load_file(tmp_path / "short" / "model.safetensors")
    save_file(
        {key: tensor for key, tensor in held.items() if key != "model.norm.weight"},
        tmp_path / "short" / "model.safetensors",
    )
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(write_corpus(tmp_path / "corpus", 6) / "tokenizer")
    for name in ("named", "few"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "one.txt").write_text("ship sail", encoding="utf-8")
    given = {"models": ["a", "b"], "base": "a", "output": "moe"} | change
    models = [str(tmp_path / each) for each in given["models"]]
    texts = [str(tmp_path / each) for each in given.get("texts", ())]
    with pytest.raises(error) as caught:
        merge_models(
            models,
            str(tmp_path / given["base"]),
            tmp_path / given["output"],
            texts=texts,
            experts_per_token=given.get("experts_per_token", 2),
        )
    assert str(caught.value).startswith(line.replace("{}", str(tmp_path)))
    assert not (tmp_path / "moe").exists()
    assert not list(tmp_path.glob(".merge-*"))
