"""A run keeps what a pretrained model brings: tokens, loss, chat template, end tokens, dtype and positions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_example
import torch
from pretrained_start import BOS, END, ROPE, TURN, texts, write_start
from safetensors import safe_open
from small_run import small_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import Merge, Model, RunConfig
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.records.events import EventLog
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import EvaluationRecord
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import load_model
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.export.directory import export
from moedisco_ray.stages.export.origin import Origin
from moedisco_ray.stages.merge.stage import write_whole
from moedisco_ray.stages.scoring import document_nats
from moedisco_ray.stages.start import Start, check_start
from moedisco_ray.stages.text.pretrained import open_encoder
from moedisco_ray.stages.text.tokenizer import Encoder, save_trained, train_bpe

NEWS = "class News:\n    def evaluate(self, text):\n        return self.loss(text)"
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "llama")


def run_of(output: Path, family: str, start: Path, unseen: Sequence[dict[str, Any]] = (), **changes: Any) -> RunConfig:
    return small_config(
        output,
        tokens={"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4},
        clusters={"count": 2, "vectors": "hidden_state"},
        model={"family": family, "config": None, "init": {"upcycle": str(start), "num_experts": 2}},
        merge={"calibration_tokens": 1024},
        evaluation={"max_tokens": 2000, "sources": list(unseen)},
        export={"keep_apart": "never"},  # sub-models that stay apart are looked at in test_apart_run.py
        **changes,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    home = tmp_path_factory.mktemp("runs")
    (home / "news.txt").write_text(NEWS, encoding="utf-8")
    unseen = {"path": str(home / "news.txt"), "name": "news"}
    return pipeline.run(run_of(home / "runs", "mixtral", llama, [unseen]), backend=LocalBackend())


@pytest.mark.slow
def test_the_start_is_measured_on_all_text_and_stands_next_to_the_result(exported: Path, llama: Path) -> None:
    found = EvaluationRecord.model_validate(read_json(exported / "evaluation" / "evaluation.json"))
    assert found.start is not None
    assert found.unseen is not None
    assert found.unseen.start is not None
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(llama)(NEWS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert found.unseen.start.loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-4)
    assert [each.cluster for each in found.start.clusters] == [each.cluster for each in found.clusters] == [0, 1]
    assert sum(each.loss * each.tokens for each in found.start.clusters) == pytest.approx(
        found.start.loss * found.start.tokens
    )
    card = (exported / "model" / "README.md").read_text(encoding="utf-8")
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["show", str(exported)])
    for figures, name in ((found.start, "all"), (found.unseen.start, "news, never trained on")):
        for text in (card, shown.stdout):
            row = next(line for line in text.splitlines() if f"{name}, with the start model" in line)
            assert f"{figures.loss:.4f}" in row
    assert "cluster 1, with the start model" in card
    worse = found.loss > found.start.loss + 1e-4
    assert read_json(exported / "report.json")["against_start"]["worse"] == worse
    last = EventLog.read(exported / "events.jsonl")[-1]
    assert (last.type, "worse_than_start" in last.data, "WORSE" in card) == ("run_finished", worse, worse)
    assert "start model" not in card.split("---")[1], "the figures of the model at the hub are its own"


def test_the_loss_before_and_after_the_upcycle_is_the_same_on_its_own_tokens(tmp_path: Path, llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    read = [text for text in texts() if 20 < len(tokenizer(text)["input_ids"]) < 200][-40:]
    with torch.no_grad():
        nats = []
        for text in read:
            ids_BL = tokenizer(text, return_tensors="pt")["input_ids"]
            nats.append((ids_BL.shape[1] - 1) * float(dense(input_ids=ids_BL, labels=ids_BL).loss))
    model = with_start(Model.model_validate({"family": "mixtral", "init": {"upcycle": str(llama), "num_experts": 4}}))
    write_whole(
        Start(model, Path("unused"), 256, 0),
        clusters=2,
        trained_seed=None,
        batches=[],
        settings=Merge(),
        keep_optimizer_state=False,
        device="cpu",
        directory=tmp_path / "moe",
    )
    encoder = open_encoder(llama)
    tokens = encoder.encode(read)
    found = document_nats(load_model(tmp_path / "moe"), tokens, prefix=encoder.prefix, sequence_length=256)
    count = sum(map(len, tokens))
    assert float(found.sum()) / count == pytest.approx(sum(nats) / count, abs=1e-4)
    assert sum(nats) / count < 0.9 * np.log(512), "a model that was never trained cannot lose anything"


def test_training_text_is_in_the_start_s_tokens_and_each_document_begins_with_bos(exported: Path, llama: Path) -> None:
    tokenizer, encoder = AutoTokenizer.from_pretrained(llama), Encoder(exported / "corpus" / "tokenizer")
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END])
    assert (encoder.bos, encoder.eos) == (bos, end)
    stream = TokenStream([exported / "corpus" / "shards"], 64)
    tokens = np.concatenate([stream.window(i)[:-1] for i in range(len(stream))])
    ends = np.flatnonzero(tokens == end)
    assert len(ends) > 10
    assert tokens[0] == bos
    assert (tokens[ends[:-1] + 1] == bos).all()
    assert (tokens == bos).sum() == (tokens == end).sum() + (tokens[-1] != end)
    first = tokens[: ends[0]].tolist()
    assert first == tokenizer(tokenizer.decode(first[1:]))["input_ids"]
    manifest = read_json(exported / "corpus" / "manifest.json")
    assert manifest["summary"]["tokens"] == read_json(exported / "corpus" / "shards" / "index.json")["tokens"]


@pytest.mark.ecosystem("Use: Hugging Face directory in transformers", "transformers")
def test_the_export_has_the_start_s_files_dtype_tokens_and_positions(exported: Path, llama: Path) -> None:
    model = exported / "model"
    for name in COPIED:
        assert (model / name).read_bytes() == (llama / name).read_bytes(), name
    config, start = read_json(model / "config.json"), read_json(llama / "config.json")
    for field in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rope_theta",
    ):
        assert config[field] == start[field], field
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_parameters"] == ROPE
    assert (
        config["rope_scaling"]
        == start["rope_scaling"]
        == {key: value for key, value in ROPE.items() if key != "rope_theta"}
    )
    with safe_open(model / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118 - no mapping
    chat = [{"role": "user", "content": "hello"}]
    ours, theirs = (
        AutoTokenizer.from_pretrained(path).apply_chat_template(chat, tokenize=False) for path in (model, llama)
    )
    assert ours == theirs == f"{BOS}user: hello{TURN}"


@pytest.mark.parametrize("token", [END, TURN])
def test_generation_of_the_export_ends_at_each_of_the_start_s_end_tokens(exported: Path, token: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported / "model")
    tokenizer = AutoTokenizer.from_pretrained(exported / "model")
    assert model.dtype == torch.bfloat16
    settings = GenerationConfig.from_pretrained(exported / "model")
    assert (settings.temperature, settings.top_p, settings.repetition_penalty) == (0.6, 0.9, 1.05)
    last = tokenizer.convert_tokens_to_ids(token)
    inputs = tokenizer("def", return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**inputs, max_new_tokens=5, prefix_allowed_tokens_fn=lambda *_: [last])
    assert found[0].tolist() == [*inputs["input_ids"][0].tolist(), last]


def test_readers_of_transformers_4_compute_the_same(exported: Path, tmp_path: Path) -> None:
    """They know `rope_theta`, `rope_scaling` and `torch_dtype` alone."""
    whole = AutoModelForCausalLM.from_pretrained(exported / "model")
    for path in (exported / "model").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = read_json(exported / "model" / "config.json")
    del config["rope_parameters"], config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("kind", ["the export", "the dense start"])
def test_a_model_is_evaluated_from_bos_on(exported: Path, llama: Path, tmp_path: Path, kind: str) -> None:
    text, directory = (
        "def evaluate(self, text):\n    return self.loss(text)",
        llama if "start" in kind else exported / "model",
    )
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    shown = CliRunner().invoke(app, ["evaluate", str(directory), "--sources", str(tmp_path / "text.txt"), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)["unseen"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert found["loss"] == pytest.approx(loss, abs=1e-4)
    assert found["tokens"] == ids.shape[1] - 1


def test_a_model_that_cannot_be_evaluated_is_refused_in_one_line(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = read_json(llama / "config.json")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "model"), "--sources", str(tmp_path)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"moedisco: MODEL: '{tmp_path / 'model'}': tensor model.layers.1.")
    assert refused.stderr.count("\n") == 1


def test_another_tokenizer_is_refused_before_anything_is_made(tmp_path: Path, llama: Path) -> None:
    save_trained(train_bpe(texts()[:50], 400), tmp_path / "other")
    config = run_of(tmp_path / "runs", "mixtral", llama, tokenizer={"path": str(tmp_path / "other")})
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.path: .*is not the tokenizer of model\.init\.upcycle .*tokenizer\.replace"
    ):
        pipeline.run(config, backend=LocalBackend())
    assert not (config.directory / "corpus").exists()
    check_start(
        run_of(tmp_path / "runs", "mixtral", llama, tokenizer={"path": str(tmp_path / "other"), "replace": True})
    )


def test_broken_generation_settings_are_found_before_the_run(llama: Path, tmp_path: Path) -> None:
    """Before (2a4777cc): the run trained, and ended at its export with a JSON error that named no file."""
    start = Path(shutil.copytree(llama, tmp_path / "start"))
    (start / "generation_config.json").write_text('{"eos_token_id": [1,')
    with pytest.raises(CheckpointError, match=r"start': holds no readable generation_config\.json"):
        pipeline.run(run_of(tmp_path / "runs", "mixtral", start), backend=LocalBackend())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family", "own", "kept"),
    [
        ("qwen3", "qwen3_moe", {"head_dim": 16}, {"head_dim": 16}),
        ("llama", "qwen2_moe", {"attention_bias": True, "num_key_value_heads": 4}, {"qkv_bias": True}),
    ],
)
def test_qwen3_with_heads_of_its_own_size_and_llama_with_biases_go_through_a_run(
    tmp_path: Path, kind: str, family: str, own: dict[str, Any], kept: dict[str, Any]
) -> None:
    start = write_start(
        tmp_path / "start", kind, begins=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **own
    )
    directory = pipeline.run(run_of(tmp_path / "runs", family, start), backend=LocalBackend())
    assert Encoder(directory / "corpus" / "tokenizer").bos is None
    config = read_json(directory / "model" / "config.json")
    assert config | kept | {"rope_theta": 5e5, "rope_scaling": None} == config
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (start, directory / "model")
    )
    if kind == "llama":
        assert before.model.layers[0].self_attn.o_proj.bias.any()
    ids = torch.tensor(
        Encoder(directory / "corpus" / "tokenizer").encode([" ".join(texts()[:3])])[0][None, :200].astype(np.int64)
    )
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for model in (before, after)]
    assert losses[1] < losses[0] + 0.5


def bare(start: Path, directory: Path) -> Path:
    """The start's directory without token ids in its config.json, and without generation settings."""
    shutil.copytree(start, directory)
    config = {name: value for name, value in read_json(start / "config.json").items() if not name.endswith("_token_id")}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "generation_config.json").unlink()
    return directory


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (None, {}),
        ({"temperature": 0.6, "do_sample": True}, {}),
        ({"eos_token_id": [3, 4]}, {}),
        (None, {"eos_token_id": [5, 6]}),
    ],
)
def test_end_tokens_that_the_start_does_not_name_are_its_tokenizer_s_not_the_class_defaults(
    tmp_path: Path, llama: Path, settings: dict[str, Any] | None, named: dict[str, Any]
) -> None:
    start = bare(llama, tmp_path / "start")
    (start / "config.json").write_text(json.dumps(read_json(start / "config.json") | named), encoding="utf-8")
    if settings is not None:
        (start / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = with_start(Model.model_validate({"family": "mixtral", "init": {"upcycle": str(start), "num_experts": 2}}))
    write_whole(
        Start(model, Path("unused"), 256, 0),
        clusters=2,
        trained_seed=None,
        batches=[],
        settings=Merge(),
        keep_optimizer_state=False,
        device="cpu",
        directory=tmp_path / "moe",
    )
    report = RunReport(
        name="x",
        family="mixtral",
        seed=0,
        versions={},
        stages=[],
        tokens=0,
        tags={},
        curves={},
        bill=run_example.bill(),
    )
    figures = export(tmp_path / "moe", start, tmp_path / "model", report, origin=Origin(start))
    tokenizer = AutoTokenizer.from_pretrained(start)
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END])
    assert {bos, end}.isdisjoint({1, 2}), "the class defaults of llama would pass"
    expected = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": None} | named
    config, generation = (read_json(tmp_path / "model" / name) for name in ("config.json", "generation_config.json"))
    assert {name: config.get(name) for name in expected} == expected
    assert generation["eos_token_id"] == (settings or {}).get("eos_token_id", expected["eos_token_id"])
    assert generation.get("temperature") == (settings or {}).get("temperature")
    # The MoE was written in fp32, the start in bf16.
    assert figures["rounded_to"] == "bfloat16"
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8").count("rounded to bfloat16") == 1
    exact = export(tmp_path / "moe", start, tmp_path / "exact", report, origin=Origin(start), dtype="fp32")
    assert exact["rounded_to"] is None
    assert "rounded" not in (tmp_path / "exact" / "README.md").read_text(encoding="utf-8")
