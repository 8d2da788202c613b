"""Models of the Hugging Face hub as starts: names, revisions, tokens, and what a run records."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_standin import Hub, hub
from huggingface_hub import metadata_load
from small_run import small_config
from test_upcycle import dense
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.start_files import start_directory, start_with_weights
from moedisco_ray.core.errors import CheckpointError, ConfigError, RunDirError
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.core.store.hub import hub_cache, is_hub_name
from moedisco_ray.core.store.locations import local_copies
from moedisco_ray.core.store.read_roots import ReadRoots, opened, reading_within
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

NAME = "tiny-org/tiny.llama_1"
MINIMAL: dict[str, Any] = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}}


def byte_tokenizer(directory: Path) -> None:
    """A tokenizer of single characters, which fits the tiny models' 64 rows."""
    letters = ["<eos>", *" abcdefghijklmnopqrstuvwxyz_()=.,:'\"#[]\n0123456789"]
    plain = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>").save_pretrained(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = dense(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=64)
    byte_tokenizer(directory)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    return directory


@pytest.fixture
def server(tmp_path: Path, files: Path) -> Iterator[Hub]:
    with hub(tmp_path / "hub-cache") as found:
        found.add(NAME, files)
        yield found


def upcycled(output: Path, name: str = NAME, **init: Any) -> RunConfig:
    return small_config(
        output,
        model={"family": None, "config": None, "init": {"upcycle": name, "num_experts": 2, **init}},
        tokens={"total": 8_000, "seed_share": 0.0, "finetune_share": 0.4},
        corpus={"sequence_length": 64},
    )


@pytest.mark.slow
@pytest.mark.ecosystem("Start: model of a hub (a stand-in on loopback)", "huggingface-hub", "hf-xet")
def test_a_run_keeps_the_commit_that_it_began_with(server: Hub, files: Path, tmp_path: Path) -> None:
    first = next(iter(server.repositories[NAME].commits))
    config = upcycled(tmp_path / "runs")
    assert config.model.family_name == "mixtral"
    directory = pipeline.run(config, backend=LocalBackend())
    stored = read_json(directory / "config.json")["model"]
    assert stored["init"]["upcycle"] == f"hf://{NAME}"
    assert (stored["init"]["commit"], stored["init"]["revision"], stored["family"]) == (first, None, "mixtral")
    report = read_json(directory / "report.json")
    assert report["start"] == {"kind": "upcycle", "name": NAME}
    evaluation = report["evaluation"]
    assert evaluation["start"]["tokens"] == evaluation["tokens"]
    assert [entry["source"] for entry in evaluation["start"]["sources"]] == [
        entry["source"] for entry in evaluation["sources"]
    ]
    assert evaluation["loss"] < evaluation["start"]["loss"] < 6
    front = metadata_load(directory / "model" / "README.md")
    assert (front["base_model"], front["license"]) == (NAME, "mit")
    results = {each["dataset"]["name"]: each["metrics"] for each in front["model-index"][0]["results"]}
    assert results["held-out text"][0]["value"] == pytest.approx(evaluation["loss"], abs=1e-6)
    assert f"below the {evaluation['start']['loss']:.4f} of the model that the run started from" in (
        directory / "model" / "README.md"
    ).read_text(encoding="utf-8")
    assert read_json(directory / "model" / "config.json")["num_local_experts"] == 2

    newer = server.add(NAME, {**server.repositories[NAME].commits[first], "NOTICE": b"newer"})
    again = upcycled(tmp_path / "runs")
    assert again.model.init == config.model.init
    assert pipeline.is_finished(again)
    other = upcycled(tmp_path / "others")
    assert other.model.init.commit == newer
    with pytest.raises(
        RunDirError, match=r"holds a run with other settings \(model\.init\.revision, model\.init\.commit\)"
    ):
        pipeline.run(upcycled(tmp_path / "runs", revision="main"), backend=LocalBackend())


def test_weights_are_downloaded_only_where_they_are_read(server: Hub, tmp_path: Path) -> None:
    config = upcycled(tmp_path)
    asked = [path for _, path, _ in server.requests]
    assert not [path for path in asked if "safetensors" in path]
    before = len(asked)
    assert start_directory(config.model.init).is_relative_to(hub_cache())
    assert len(server.requests) == before, "a commit that was downloaded is not asked for again"
    assert (start_with_weights(config.model.init) / "model.safetensors").is_file()


@pytest.mark.ecosystem("Start: model of a hub (a stand-in on loopback)", "huggingface-hub", "hf-xet")
def test_weights_come_through_xet_storage_and_a_failure_there_is_one_line(
    server: Hub, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.xet = "http://127.0.0.1:9"
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    init = upcycled(tmp_path).model.init
    assert not [path for _, path, _ in server.requests if "xet" in path], "small files are sent over HTTP"
    line = (
        rf"^model\.init\.upcycle: 'hf://{NAME}': cannot be downloaded from the hub's Xet storage; "
        ".* set HF_HUB_DISABLE_XET=1 to"
    )
    with pytest.raises(CheckpointError, match=line):
        start_with_weights(init)
    assert [path for _, path, _ in server.requests if "xet" in path]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    assert (start_with_weights(init) / "model.safetensors").read_bytes() == (files / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [NAME, f"hf://{NAME}@main"])
def test_a_model_is_evaluated_by_its_name(server: Hub, files: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("def evaluate(text): return text", encoding="utf-8")
    figures = []
    for model in (name, str(files)):
        shown = CliRunner().invoke(app, ["evaluate", model, "--sources", str(tmp_path / "text.txt"), "--json"])
        assert shown.exit_code == 0, shown.output
        figures.append(json.loads(shown.stdout)["unseen"])
    assert figures[0] == figures[1]


@pytest.mark.ecosystem("Start: model of a hub (a stand-in on loopback)", "huggingface-hub", "hf-xet")
def test_a_branch_a_tag_or_a_commit_is_a_revision(server: Hub, files: Path) -> None:
    first = server.repositories[NAME].branches["main"]
    tuned = server.add(NAME, {**server.repositories[NAME].commits[first], "NOTICE": b"tuned"}, branch="tuned")
    for revision, commit in (("tuned", tuned), (first, first), ("main", first)):
        config = check_config(MINIMAL | {"model": {"init": {"upcycle": NAME, "revision": revision}}})
        assert config.model.init.commit == commit
    with pytest.raises(
        CheckpointError, match=rf"^model\.init\.upcycle: 'hf://{NAME}': has no revision 'gone'; name a branch"
    ):
        check_config(MINIMAL | {"model": {"init": {"upcycle": NAME, "revision": "gone"}}})


def test_the_token_is_the_environments_and_in_no_configuration_or_log(
    server: Hub, tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.add("closed/model", files, private=True)
    with pytest.raises(CheckpointError, match=r"is no model that this machine may read at the hub; .* HF_TOKEN$"):
        upcycled(tmp_path, "closed/model")
    monkeypatch.setenv("HF_TOKEN", server.token)
    config = upcycled(tmp_path, "closed/model")
    assert start_with_weights(config.model.init).is_dir()
    assert ("GET", f"Bearer {server.token}") in {
        (method, authorization) for method, _, authorization in server.requests
    }
    assert server.token not in json.dumps(config.model_dump(mode="json")) + caplog.text


def test_no_token_that_was_saved_by_another_program_is_sent(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_saved")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    upcycled(tmp_path)
    assert {authorization for _, _, authorization in server.requests} == {None}


def test_a_run_goes_on_offline_and_an_unknown_model_is_one_line(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = upcycled(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert upcycled(tmp_path).model.init == before.model.init
    line = (
        r"^model\.init\.upcycle: 'hf://tiny-org/other': is not in this machine's cache, "
        "and the hub does not respond; go online"
    )
    with pytest.raises(CheckpointError, match=line):
        upcycled(tmp_path, "tiny-org/other")


@pytest.mark.parametrize(
    ("init", "line"),
    [
        (
            {"upcycle": "tiny-org/absent"},
            "'hf://tiny-org/absent': is no model that this machine may read at the hub; correct the name",
        ),
        (
            {"upcycle": "hf://datasets/org/text"},
            "must read hf://ORG/NAME; write a branch, a tag or a commit in `revision`",
        ),
        ({"upcycle": "hf://org/name@main"}, "must read hf://ORG/NAME; write a branch, a tag or a commit in `revision`"),
        ({"upcycle": "hf:org/name"}, "must read hf://ORG/NAME; write a branch, a tag or a commit in `revision`"),
        ({"upcycle": "./models/mine", "revision": "main"}, "revision belongs to a model of the Hugging Face hub"),
        ({"upcycle": NAME, "revision": "../x"}, "model.init.revision: '../x'"),
    ],
)
def test_mistakes_are_one_line(server: Hub, init: dict[str, Any], line: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        check_config(MINIMAL | {"model": {"init": init}})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_of_this_name_comes_first(
    server: Hub, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-org").mkdir()
    (tmp_path / NAME).symlink_to(files)
    monkeypatch.chdir(tmp_path)
    assert check_config(MINIMAL | {"model": {"init": {"upcycle": NAME}}}).model.init.place == Path(NAME)
    assert not server.requests
    assert check_config(MINIMAL | {"model": {"init": {"upcycle": f"hf://{NAME}"}}}).model.init.commit is not None


def test_a_process_with_read_roots_reads_the_models_that_they_name(server: Hub, files: Path, tmp_path: Path) -> None:
    server.add("tiny-org/other", files)
    directory, other = (start_directory(upcycled(tmp_path, name).model.init) for name in (NAME, "tiny-org/other"))
    with reading_within(ReadRoots(own=[f"hf://{NAME}"])):
        with opened(directory / "config.json") as found:
            assert json.loads(found.read_text())["model_type"] == "llama"
        with pytest.raises(PermissionError), opened(other / "config.json"):
            pass
    assert local_copies(f"hf://{NAME}") == [hub_cache() / "models--tiny-org--tiny.llama_1"]


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("org/name", True),
        ("a/b", True),
        ("Org-1/Name.2_x", True),
        ("org", False),
        ("a/b/c", False),
        ("../b", False),
        ("./b", False),
        ("/a", False),
        ("a/", False),
        ("a/..", False),
        ("a..b/c", False),
        ("a/b--c", False),
        ("-a/b", False),
        ("datasets/x", False),
        ("a b/c", False),
        ("s3://a/b", False),
        ("a/b\n", False),
        ("é/b", False),
    ],
)
def test_which_texts_can_be_names(text: str, is_name: bool) -> None:
    assert is_hub_name(text) == is_name
