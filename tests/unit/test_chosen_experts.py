"""`moedisco experts`: models with fewer, other or more experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from moe_models import LENGTH, VOCAB, top_k_of
from test_families import EXPERTS, TOKENS, logits, sizes_of, stored
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.contrib.experts.choose_experts import choose_experts
from moedisco_ray.core.config import FAMILIES
from moedisco_ray.core.errors import CheckpointError, ConfigError, RunDirError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.models import check_same, hf_config, open_checkpoint

ONE_GROUP = {"n_group": 1, "topk_group": 1}


def model_of(family: str, directory: Path, scale: float = 1.0, **changes: Any) -> Path:
    """A model with random tensors, whose router selects among all experts."""
    known = DECLARATIONS[family].fields
    fields = {name: value for name, value in ONE_GROUP.items() if name in known}
    fields |= {"topk_method": "greedy"} if family == "deepseek_v2" else {}
    stored(family, directory, fields=fields, **changes)
    if scale != 1.0:
        model = AutoModelForCausalLM.from_pretrained(directory)
        for tensor in model.state_dict().values():
            tensor.mul_(scale)
        model.save_pretrained(directory)
    return directory


def by_hand(family: str, sources: list[tuple[Path, int]], top_k: int, **changes: Any) -> torch.Tensor:
    """Logits of transformers' own model of the first source, with the chosen experts' rows in its tensors."""
    models = {path: AutoModelForCausalLM.from_pretrained(path).eval() for path, _ in sources}
    first = models[sources[0][0]]
    known = DECLARATIONS[family].fields
    fields = {name: value for name, value in ONE_GROUP.items() if name in known}
    fields |= {"topk_method": "greedy"} if family == "deepseek_v2" else {}
    sizes = sizes_of(family, num_experts=len(sources), num_experts_per_tok=top_k, fields=fields, **changes)
    built = AutoModelForCausalLM.from_config(hf_config(family, sizes, VOCAB, LENGTH, 0)).eval()
    states = {path: model.state_dict() for path, model in models.items()}
    for name, tensor in built.state_dict().items():
        own = first.state_dict()[name]
        axis = int(own.shape[0] == 1)
        is_common = own.shape == tensor.shape and ".experts." not in name and own.shape[axis] != EXPERTS
        tensor.copy_(
            own
            if is_common
            else torch.stack([states[path][name].select(axis, expert) for path, expert in sources], dim=axis)
        )
    with torch.no_grad():
        found: torch.Tensor = built(TOKENS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_in_order_are_the_model_itself(family: str, tmp_path: Path) -> None:
    source = model_of(family, tmp_path / "model")
    choose_experts(str(source), [f"0-{EXPERTS - 1}"], tmp_path / "same")
    check_same(open_checkpoint(tmp_path / "same"), open_checkpoint(source))
    assert torch.equal(logits(tmp_path / "same"), logits(source))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_removed_replaced_and_added_with_their_router_rows(family: str, tmp_path: Path) -> None:
    model, other = model_of(family, tmp_path / "model"), model_of(family, tmp_path / "other", scale=0.5)
    if DECLARATIONS[family].router.hidden is not None:
        other = model  # rows of another model do not fit
    for number, (chosen, sources, wanted) in enumerate(
        [
            (["0,2", "5-7"], [(model, each) for each in (0, 2, 5, 6, 7)], 2),
            (
                ["0-2", f"{other}:4", "4-7"],
                [(model, 0), (model, 1), (model, 2), (other, 4), *((model, k) for k in range(4, 8))],
                3,
            ),
            (["0-7", f"{other}:6,1"], [*((model, k) for k in range(8)), (other, 6), (other, 1)], 3),
        ]
    ):
        output, top_k = tmp_path / f"out-{number}", top_k_of(family, wanted)
        found = choose_experts(str(model), chosen, output, top_k=top_k)
        assert [(each["model"], each["expert"]) for each in found["experts"]] == [(str(path), k) for path, k in sources]
        assert torch.allclose(logits(output), by_hand(family, sources, top_k), atol=1e-5)
        assert read(output / "experts.json") == found


def test_one_expert_is_a_dense_model_and_the_top_k_is_lowered(tmp_path: Path) -> None:
    model = model_of("qwen3_moe", tmp_path / "model")
    assert choose_experts(str(model), ["3"], tmp_path / "one")["top_k"] == 1
    assert torch.allclose(logits(tmp_path / "one"), by_hand("qwen3_moe", [(model, 3)], 1), atol=1e-5)
    assert choose_experts(str(model), ["0-7"], tmp_path / "fewer", top_k=1)["top_k"] == 1
    assert read(tmp_path / "fewer" / "config.json")["num_experts_per_tok"] == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_expert_may_be_there_twice_and_comes_in_the_models_dtype(family: str, tmp_path: Path) -> None:
    model, other = model_of(family, tmp_path / "model"), model_of(family, tmp_path / "other", scale=0.5)
    halved = AutoModelForCausalLM.from_pretrained(other).to(torch.bfloat16)
    halved.save_pretrained(tmp_path / "bf16")
    choose_experts(str(model), ["0-3,2", f"{tmp_path / 'bf16'}:1"], tmp_path / "out", top_k=2)
    found = open_checkpoint(tmp_path / "out")
    assert {found.dtype(key) for key in found} == {torch.float32}
    halved.to(torch.float32).save_pretrained(tmp_path / "rounded")
    sources = [*((model, each) for each in (0, 1, 2, 3, 2)), (tmp_path / "rounded", 1)]
    assert torch.allclose(logits(tmp_path / "out"), by_hand(family, sources, 2), atol=1e-5)


def test_a_model_without_optional_fields_is_of_the_same_architecture(tmp_path: Path) -> None:
    model, other = model_of("qwen3_moe", tmp_path / "model"), model_of("qwen3_moe", tmp_path / "other", scale=0.5)
    path = other / "config.json"
    path.write_text(
        json.dumps({key: value for key, value in read(path).items() if key not in ("dtype", "use_sliding_window")})
    )
    assert len(choose_experts(str(model), ["0-1", f"{other}:2"], tmp_path / "out")["experts"]) == 3


def test_a_router_of_two_layers_takes_no_rows_of_another_model(tmp_path: Path) -> None:
    model, other = model_of("llama_moe", tmp_path / "model"), model_of("llama_moe", tmp_path / "other", scale=0.5)
    for path in (model, other):
        (path / "config.json").write_text(json.dumps({**read(path / "config.json"), "score_scale_factor": 1.0}))
    values = read(model / "config.json")
    known = (LlamaConfig().to_dict().keys() - {"model_type", "architectures"}) & values.keys()
    sizes = {key: values[key] for key in known} | {"intermediate_size": values["moe_intermediate_size"]}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    for expert in (f"{other}:1", f"{tmp_path / 'dense'}:0"):
        with pytest.raises(
            ConfigError, match=r"^--calibration: .*rows of another model do not fit the first layer of RUN_DIR's"
        ):
            choose_experts(str(model), ["0-2", expert], tmp_path / "out")


def test_models_from_before_a_constant_are_of_the_same_architecture(tmp_path: Path) -> None:
    model, other = model_of("deepseek_v3", tmp_path / "model"), model_of("deepseek_v3", tmp_path / "other", scale=0.5)
    for path, missing in ((model, "topk_method"), (other, "scoring_func")):
        values = {key: value for key, value in read(path / "config.json").items() if key != missing}
        (path / "config.json").write_text(json.dumps(values))
    assert len(choose_experts(str(model), ["0-2", f"{other}:1"], tmp_path / "out")["experts"]) == 4


def test_another_spelling_of_the_path_is_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_moe", tmp_path / "run" / "model")
    write_json(model / "manifest.json", with_checksum({"fingerprint": "f", "files": {}}))
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    spellings = ["run/model", f"{model}/", "link", "run", "run/../link"]
    found = choose_experts(
        str(model), ["0", *(f"{each}:{k}" for k, each in enumerate(spellings, start=1))], tmp_path / "out"
    )
    assert found["experts"] == [{"model": str(model), "expert": k} for k in range(6)]
    choose_experts(str(model), ["0-5"], tmp_path / "usual")
    check_same(open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "usual"))


def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path) -> None:
    model, groups = model_of("qwen3_moe", tmp_path / "model"), stored("deepseek_v3", tmp_path / "groups")
    wider = model_of("qwen3_moe", tmp_path / "wider", moe_intermediate_size=24)
    output = tmp_path / "out"
    for chosen, kind, match in [
        (["8"], ConfigError, r"EXPERTS.*names an expert that is not there; choose from 0 to 7"),
        (["0,3-1"], ConfigError, r"^EXPERTS: '0,3-1': has the range 3-1.*; write 1-3$"),
        (["1,"], ConfigError, "no list"),
        (["a"], ConfigError, "is no list of experts; write 0,2-5"),
        ([f"{wider}:0"], CheckpointError, r"intermediate_size 24, but RUN_DIR has 16"),
        ([f"{tmp_path}/none:0"], RunDirError, "holds no finished model"),
    ]:
        with pytest.raises(kind, match=match):
            choose_experts(str(model), chosen, output)
    with pytest.raises(ConfigError, match=r"--top-k.*exceeds the number of experts, 2"):
        choose_experts(str(model), ["0-1"], output, top_k=3)
    with pytest.raises(ConfigError, match="selects among 4 groups of experts cannot be chosen one by one"):
        choose_experts(str(groups), ["0-3"], output)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "groups", "wider"}
    shutil.copytree(model, output)
    with pytest.raises(RunDirError, match="is not an empty directory"):
        choose_experts(str(model), ["0"], output)


def test_the_command_says_what_it_wrote_and_how_to_measure_it(tmp_path: Path) -> None:
    model = model_of("olmoe", tmp_path / "model")
    result = CliRunner().invoke(
        app, ["experts", str(model), "0-1", "5", "--output", str(tmp_path / "out"), "--top-k", "2"]
    )
    assert result.exit_code == 0
    assert result.stdout.startswith(
        f"wrote {tmp_path / 'out'}: olmoe with 3 experts, top-2; measure it with moedisco evaluate"
    )
    assert "expert 2: 5 of" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_has_what_the_cards_of_the_models_say(tmp_path: Path) -> None:
    models = [model_of("qwen3_moe", tmp_path / name) for name in ("model", "same", "other")]
    for model, licence, base in zip(models, ("mit", "mit", "apache-2.0"), ("org/a", "org/b", "org/a"), strict=True):
        (model / "README.md").write_text(f"---\nlicense: {licence}\nbase_model: {base}\nlanguage: [en, de]\n---\n")
    for name, licence, bases in [("same", "mit", ["org/a", "org/b"]), ("other", None, ["org/a"])]:
        choose_experts(str(models[0]), ["0-2", f"{tmp_path / name}:1"], tmp_path / f"with-{name}")
        card = metadata_load(tmp_path / f"with-{name}" / "README.md")
        assert (card.get("license"), card["base_model"], card["language"]) == (licence, bases, ["en", "de"])
        assert "model-index" not in card


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
