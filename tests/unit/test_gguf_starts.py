"""GGUF files as starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import torch
from gguf_files import TEXT, byte_level_bpe, tiny_llama, write_gguf
from small_run import small_config
from test_gguf_export import HARD
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.config import Merge, Model
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.locations import CACHE
from moedisco_ray.core.read_roots import reading_within
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import load_model, runnable
from moedisco_ray.stages.corpus import input_identity
from moedisco_ray.stages.merge.stage import write_whole
from moedisco_ray.stages.start import Start


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(llama, path)
    return path


def init(path: Path) -> dict[str, Any]:
    return {"init": {"upcycle": str(path), "num_experts": 4}}


@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
@pytest.mark.parametrize("tied", [False, True])
def test_upcycling_keeps_the_function(tied: bool, tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama", tied=tied)
    write_gguf(llama, tmp_path / "tiny.gguf")
    model = Model.model_validate(init(tmp_path / "tiny.gguf"))
    assert (model.family_name, model.architecture.num_experts) == ("mixtral", 4)
    write_whole(
        Start(model, Path("no-tokenizer"), 64, 0), clusters=2, trained_seed=None, batches=[], settings=Merge(),
        keep_optimizer_state=False, device="cpu", directory=tmp_path / "moe")
    ids = torch.tensor([byte_level_bpe(tmp_path / "bpe").encode(TEXT[0]).ids])
    with torch.no_grad():
        assert torch.allclose(runnable(load_model(tmp_path / "moe"))(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
def test_quantised_weights_are_those_of_their_blocks(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    directory = Model.model_validate(init(tmp_path / "small.gguf")).init.directory
    found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for key, tensor in llama.state_dict().items():
        if tensor.ndim == 2:
            blocks = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
            assert torch.allclose(found[key], expected, atol=1e-6), key
            assert not torch.equal(found[key], tensor)


@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
def test_digits_are_split_off_where_llama_cpp_does(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", pre="smollm")
    tokenizer = AutoTokenizer.from_pretrained(Model.model_validate(init(tmp_path / "tiny.gguf")).init.directory)
    texts = [*TEXT, *HARD, "in  1999\n\n    2001"]
    assert llama_cpp.encoded(tmp_path / "tiny.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.ecosystem("Start: GGUF file", "gguf", "transformers")
def test_a_run_takes_tokenizer_and_template_from_the_file_and_converts_it_once(file: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path, model={"family": None, "config": None, **init(file)}, corpus={"sequence_length": 64},
        tokens={"total": 8_000, "seed_share": 0.0, "finetune_share": 0.4}, clusters={"count": 2})
    directory = pipeline.run(config, backend=LocalBackend())
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert tokenizer(TEXT[1])["input_ids"] == byte_level_bpe(tmp_path / "bpe").encode(TEXT[1]).ids
    assert "message['content']" in tokenizer.chat_template
    assert read_json(directory / "report.json")["start"] == {"kind": "upcycle", "name": "tiny"}
    written = config.model.init.directory_with_weights
    before = (written / "model.safetensors").stat()
    assert pipeline.is_finished(config)
    assert (written / "model.safetensors").stat() == before


@pytest.mark.slow
def test_another_cache_is_no_other_start_and_another_file_is(
    llama: LlamaForCausalLM, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(tmp_path, model={"family": None, "config": None, **init(file)})
    before = input_identity(config)["seed"], config.model.init.directory
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    assert input_identity(config)["seed"] == before[0]
    assert config.model.init.directory != before[1]
    again = tmp_path / "tiny.gguf"
    write_gguf(llama, again)
    assert input_identity(small_config(tmp_path, model={"family": None, "config": None, **init(again)}))["seed"] != before[0]


def test_mistakes_are_one_line(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    for name, line in (("absent.gguf", "cannot be read"), ("broken.gguf", "is no GGUF file that transformers")):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=rf"^model\.init\.upcycle: '{path}': {line}") as caught:
            _ = Model.model_validate(init(path)).architecture
        assert "\n" not in str(caught.value)
    with reading_within([file.parent]), pytest.raises(CheckpointError, match="a control service does not read; name a directory"):
        _ = Model.model_validate(init(file)).architecture
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=r"needs the package gguf; pip install 'moedisco-ray\[gguf\]'$"):
        _ = Model.model_validate(init(file)).architecture
