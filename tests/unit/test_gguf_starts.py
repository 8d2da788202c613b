"""GGUF files as starts."""

from __future__ import annotations

import json
import subprocess
import traceback
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import torch
from gguf_files import TEXT, byte_level_bpe, tiny_llama, write_gguf
from moe_models import built
from small_run import small_config
from test_gguf_export import HARD, LINEAR, YARN
from tiny_export import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.contrib.gguf import file as gguf_file
from moedisco_ray.contrib.gguf.file import write_gguf as export
from moedisco_ray.contrib.gguf.reading import write_directory
from moedisco_ray.contrib.gguf.tensors import GgufTensor, gguf_tensors
from moedisco_ray.core.config import Merge, Model
from moedisco_ray.core.config.start_files import start_directory, start_with_weights
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.store import model_files
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.read_roots import ReadRoots, reading_within
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import load_model, open_checkpoint, runnable
from moedisco_ray.stages.corpus import input_identity
from moedisco_ray.stages.merge.stage import write_whole
from moedisco_ray.stages.start import Start

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(llama, path)
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert files in this process: a process of its own takes seconds to import transformers."""

    usual = subprocess.run

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        if "moedisco_ray.contrib.gguf.reading" not in command:
            return usual(command, **settings)
        try:
            write_directory(*map(Path, command[-2:]))
        except Exception as error:  # noqa: BLE001  # what ends the process, whatever it is
            return subprocess.CompletedProcess(command, 1, "", "".join(traceback.format_exception(error)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(model_files.subprocess, "run", run)


def init(path: Path) -> dict[str, Any]:
    return {"init": {"upcycle": str(path), "num_experts": 4}}


@pytest.mark.usefixtures("here")
@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
@pytest.mark.parametrize("tied", [False, True])
def test_upcycling_keeps_the_function(tied: bool, tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama", tied=tied)
    write_gguf(llama, tmp_path / "tiny.gguf")
    model = with_start(Model.model_validate(init(tmp_path / "tiny.gguf")))
    assert (model.family_name, model.architecture.num_experts) == ("mixtral", 4)
    write_whole(
        Start(model, Path("no-tokenizer"), 64, 0),
        clusters=2,
        trained_seed=None,
        batches=[],
        settings=Merge(),
        keep_optimizer_state=False,
        device="cpu",
        directory=tmp_path / "moe",
    )
    ids = torch.tensor([byte_level_bpe(tmp_path / "bpe").encode(TEXT[0]).ids])
    with torch.no_grad():
        assert torch.allclose(runnable(load_model(tmp_path / "moe"))(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("here")
@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
def test_quantised_weights_are_those_of_their_blocks(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    directory = start_directory(Model.model_validate(init(tmp_path / "small.gguf")).init)
    found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for key, tensor in llama.state_dict().items():
        if tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
            assert torch.allclose(found[key], expected, atol=1e-6), key
            assert not torch.equal(found[key], tensor)


@pytest.mark.usefixtures("here")
@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
def test_digits_are_split_off_where_llama_cpp_does(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", pre="smollm")
    tokenizer = AutoTokenizer.from_pretrained(start_directory(Model.model_validate(init(tmp_path / "tiny.gguf")).init))
    texts = [*TEXT, *HARD, "in  1999\n\n    2001"]
    assert llama_cpp.encoded(tmp_path / "tiny.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
@pytest.mark.parametrize("rotation", [LLAMA31, LINEAR, YARN], ids=lambda rotation: rotation["rope_type"])
def test_scaled_positions_stay_scaled(rotation: dict[str, Any], tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path, rope_parameters=rotation).eval()
    write_gguf(llama, tmp_path / "tiny.gguf")
    write_directory(tmp_path / "tiny.gguf", tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.config.rope_parameters.items() >= rotation.items()
    ids = torch.tensor([byte_level_bpe(tmp_path / "bpe").encode(TEXT[1]).ids])
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {}),
        ("qwen2_moe", {"qkv_bias": False, "tie_word_embeddings": True, "shared_expert_intermediate_size": 24}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"tie_word_embeddings": True, "head_dim": 24, "rope_parameters": YARN}),
        ("qwen3_5_moe_text", {}),
        (
            "qwen3_5_moe_text",
            {
                "tie_word_embeddings": True,
                "head_dim": 32,
                "full_attention_interval": 3,
                "num_hidden_layers": 4,
                "rope_parameters": LINEAR | {"partial_rotary_factor": 0.5},
            },
        ),
    ],
)
def test_an_exported_file_is_a_start_again(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = write_model(tmp_path, family, **changes)
    export(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    again = tmp_path / "again"
    again.mkdir()
    write_directory(tmp_path / "tiny.gguf", again)
    model = with_start(Model.model_validate({"init": {"checkpoint": str(again)}}))
    assert (model.family_name, model.architecture.moe_intermediate_size) == (family, config["moe_intermediate_size"])
    assert open_checkpoint(again).keys() >= open_checkpoint(tmp_path).keys()
    ids = torch.tensor([AutoTokenizer.from_pretrained(again)(TEXT[0])["input_ids"]])
    with torch.no_grad():
        expected = built(config, open_checkpoint(tmp_path))(ids).logits
        assert torch.allclose(runnable(load_model(again))(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("start", ["checkpoint", "upcycle"])
def test_a_mixtral_is_no_start(start: str, tmp_path: Path) -> None:
    write_model(tmp_path, "mixtral")
    path = tmp_path / "tiny.gguf"
    export(tmp_path, path, name="tiny")
    with pytest.raises(CheckpointError) as caught:
        with_start(Model.model_validate({"init": {start: str(path)}}))
    assert str(caught.value) == (
        f"model.init.{start}: '{path}': expert_count: 4: is that of a Mixtral, "
        "which transformers reads as a dense Llama; name the Hugging Face directory of the model instead"
    )


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_block_count(writer: gguf.GGUFWriter, layers: int) -> None:
        writer.add_uint32(f"{writer.arch}.block_count", layers + 1)
        writer.add_nextn_predict_layers(1)

    write_model(tmp_path, "qwen3_5_moe_text", num_hidden_layers=2)
    further = GgufTensor("blk.2.nextn.eh_proj.weight", (32, 64), torch.float32, lambda: torch.ones(32, 64))
    monkeypatch.setattr(gguf_file, "gguf_tensors", lambda weights: [*gguf_tensors(weights), further])
    monkeypatch.setattr(gguf.GGUFWriter, "add_block_count", add_block_count)
    export(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    again = tmp_path / "again"
    again.mkdir()
    write_directory(tmp_path / "tiny.gguf", again)
    assert read_json(again / "config.json")["num_hidden_layers"] == 2
    assert open_checkpoint(again).keys() == open_checkpoint(tmp_path).keys()


@pytest.mark.usefixtures("here")
def test_a_family_that_transformers_does_not_read_is_no_start(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3_next")
    path = tmp_path / "tiny.gguf"
    export(tmp_path, path, name="tiny")
    with pytest.raises(
        CheckpointError, match=rf"^model\.init\.checkpoint: '{path}': is no GGUF file that .* qwen3next .*\)$"
    ):
        with_start(Model.model_validate({"init": {"checkpoint": str(path)}}))


@pytest.mark.parametrize(
    ("changes", "fields", "line"),
    [
        ({"attention_bias": True}, {}, r"tensors: \d+: values are in the file, but transformers reads \d+;"),
        (
            {"rope_parameters": LLAMA31 | {"high_freq_factor": 8.0}},
            {},
            r"rope_freqs\.weight: 8\.0: is the largest of divisors",
        ),
        (
            {"rope_parameters": LLAMA31},
            {"rope.scaling.factor": 2.0},
            r"rope\.scaling\.type: 'linear': is a second scaling",
        ),
        (
            {"rope_parameters": YARN},
            {"rope.scaling.attn_factor": 2.0},
            r"rope\.scaling\.attn_factor: 2\.0: is no rotary parameter",
        ),
    ],
)
def test_what_transformers_would_lose_is_refused(
    changes: dict[str, Any], fields: dict[str, float], line: str, tmp_path: Path
) -> None:
    write_gguf(tiny_llama(tmp_path, **changes), tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=f"^{line}.* name the Hugging Face directory"):
        write_directory(tmp_path / "tiny.gguf", tmp_path)


def test_a_file_without_some_weights_is_refused(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path)
    llama.config.num_hidden_layers += 1
    write_gguf(llama, tmp_path / "tiny.gguf")
    with pytest.raises(
        CheckpointError, match=r"^tensor: 'model\.layers\.2\..*': is not found in the file by transformers; name"
    ):
        write_directory(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.slow
@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
def test_a_run_takes_tokenizer_and_template_from_the_file_and_converts_it_once(file: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        model={"family": None, "config": None, **init(file)},
        corpus={"sequence_length": 64},
        tokens={"total": 8_000, "seed_share": 0.0, "finetune_share": 0.4},
        clusters={"count": 2},
    )
    directory = pipeline.run(config, backend=LocalBackend())
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert tokenizer(TEXT[1])["input_ids"] == byte_level_bpe(tmp_path / "bpe").encode(TEXT[1]).ids
    assert "message['content']" in tokenizer.chat_template
    assert read_json(directory / "report.json")["start"] == {"kind": "upcycle", "name": "tiny"}
    written = start_with_weights(config.model.init)
    before = (written / "model.safetensors").stat()
    assert pipeline.is_finished(config)
    assert (written / "model.safetensors").stat() == before


@pytest.mark.slow
def test_another_cache_is_no_other_start_and_another_file_is(
    llama: LlamaForCausalLM, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, model={"family": None, "config": None, **init(file)})
    before = input_identity(config)["seed"], start_directory(config.model.init)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    assert input_identity(config)["seed"] == before[0]
    assert start_directory(config.model.init) != before[1]
    again = tmp_path / "tiny.gguf"
    write_gguf(llama, again)
    assert (
        input_identity(small_config(tmp_path, model={"family": None, "config": None, **init(again)}))["seed"]
        != before[0]
    )


def test_a_file_is_evaluated(llama: LlamaForCausalLM, file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[1], encoding="utf-8")
    shown = CliRunner().invoke(app, ["evaluate", str(file), "--sources", str(tmp_path / "text.txt"), "--json"])
    assert shown.exit_code == 0, shown.output
    # 0 separates documents in training
    ids = torch.tensor([[0, *byte_level_bpe(tmp_path / "bpe").encode(TEXT[1]).ids]])
    with torch.no_grad():
        loss = float(llama(input_ids=ids, labels=ids).loss)
    assert json.loads(shown.stdout)["unseen"]["loss"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.usefixtures("here")
def test_mistakes_are_one_line(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    for name, line in (("absent.gguf", "cannot be read"), ("broken.gguf", "is no GGUF file that transformers")):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=rf"^model\.init\.upcycle: '{path}': {line}") as caught:
            with_start(Model.model_validate(init(path)))
        assert "\n" not in str(caught.value)
    refusal = "a control service does not read; name a directory"
    with reading_within(ReadRoots([file.parent])), pytest.raises(CheckpointError, match=refusal):
        with_start(Model.model_validate(init(file)))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"needs the package gguf; pip install 'moedisco-ray\[gguf\]'$"):
        with_start(Model.model_validate(init(file)))
