import contextlib
import gzip
import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_sources import documents_of
from moe_models import random_tensors, tiny_config

from moedisco_ray.core.config import Source
from moedisco_ray.core.config.start_sizes import read_architecture
from moedisco_ray.core.config.task_files import read_task_file
from moedisco_ray.core.errors import CorpusError, UserError
from moedisco_ray.core.store.locations import CACHE, working_directory
from moedisco_ray.core.store.read_roots import ENVIRONMENT, ReadRoots, confinement, opened, reading_within
from moedisco_ray.models import load_model, open_checkpoint, write_checkpoint
from moedisco_ray.plan import tokenizer_vocab_size
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.pretrained import load_pretrained, prepare_tokenizer
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe

LIMITS = Limits(1024, 8192)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory that may be read; `secret` next to it may not."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("secret")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def listed(path: Path | str):
    inputs = expand_sources([Source(path=str(path), documents="file")], Path("unused"), LIMITS)
    return [(source, list_files(source.field, source.settings, own=source.own).files) for source in inputs]


def read(files) -> list[str]:
    return [document.text.strip() for unit in plan_units(files) for document in documents_of(unit)]


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("plain")
    with gzip.open(folder / "b.txt.gz", "wt") as file:
        file.write("packed")


def test_files_inside_the_roots_are_read_as_without_roots(data):
    fill(data)
    (data / "jsonl").mkdir()
    (data / "jsonl" / "c.jsonl").write_text(json.dumps({"text": "lines"}))
    pq.write_table(pa.table({"text": ["rows"]}), data / "jsonl" / "d.parquet")
    (data / "linked").symlink_to(data / "jsonl")
    for path in (data / "a.txt", data / "b.txt.gz", data / "jsonl", data / "linked", f"{data}/**/*.parquet"):
        free = read(listed(path))
        with reading_within(ReadRoots([data])):
            assert read(listed(path)) == free
    with reading_within(ReadRoots([data.parent / "secret", data])):
        assert read(listed(data / "b.txt.gz")) == ["packed"]


@pytest.mark.parametrize(
    "path", ["link", "link/a.txt", "folder", "folder/*.txt", "*/a.txt", "fol*/**/*.txt", "../secret/a.txt"]
)
def test_a_link_out_of_the_roots_is_refused_when_files_are_listed(data, path):
    (data / "link").symlink_to(data.parent / "secret")
    (data / "folder" / "deep").mkdir(parents=True)
    (data / "folder" / "deep" / "a.txt").symlink_to(data.parent / "secret" / "a.txt")
    (data / "folder" / "a.txt").symlink_to(data.parent / "secret" / "a.txt")
    with reading_within(ReadRoots([data])), pytest.raises(CorpusError, match="leads out of the directories"):
        listed(data / path)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_became_a_link_after_it_was_listed_is_refused_when_it_is_opened(data, what):
    (data / "folder").mkdir()
    fill(data / "folder")
    files = listed(data / "folder")
    if what == "file":
        (data / "folder" / "a.txt").unlink()
        (data / "folder" / "a.txt").symlink_to(data.parent / "secret" / "a.txt")
    else:
        (data / "folder").rename(data / "moved")
        (data / "folder").symlink_to(data.parent / "secret")
    assert "secret" in read(files[:1]) if what == "file" else True
    with reading_within(ReadRoots([data])), pytest.raises(CorpusError, match="leads out of the directories") as caught:
        read(files)
    assert caught.value.field == "corpus.sources.0.path"


def test_the_file_that_was_checked_is_the_file_that_is_read(data):
    path = data / "a.txt"
    path.write_text("mine")
    with reading_within(ReadRoots([data])), opened(path) as found:
        path.unlink()
        path.symlink_to(data.parent / "secret" / "a.txt")
        assert found.read_text() == "mine"


def test_links_that_change_all_the_time_never_lead_out(data):
    path, secret = data / "a.txt", data.parent / "secret" / "a.txt"
    path.write_text("mine")
    (data / "mine.txt").write_text("mine")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for target in (secret, data / "mine.txt"):
                (data / "new").symlink_to(target)
                (data / "new").replace(path)

    attacker = threading.Thread(target=swap)
    attacker.start()
    seen = {"mine": 0, "refused": 0}
    try:
        with reading_within(ReadRoots([data])):
            while min(seen.values()) < 200:
                try:
                    with opened(path) as found:
                        seen[found.read_text()] += 1
                except OSError:
                    seen["refused"] += 1
    finally:
        done.set()
        attacker.join()
    assert set(seen) == {"mine", "refused"}


@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "folder"])
def test_only_plain_files_are_opened(data, path):
    os.mkfifo(data / "pipe")
    (data / "folder").mkdir()
    with (
        reading_within(ReadRoots([data, Path("/dev")])),
        pytest.raises(PermissionError, match="leads out"),
        opened(data / path),
    ):
        pass


def model_and_tokenizer(folder: Path) -> None:
    config = tiny_config("qwen3_moe")
    write_checkpoint(folder, random_tensors(config).items(), config)
    save_trained(train_bpe(["some text for a tokenizer"], 300), folder)


OPENERS = {
    "config.json": lambda folder: read_architecture(folder, "qwen3_moe"),
    "model.safetensors": open_checkpoint,
    "tokenizer.json": lambda folder: load_pretrained(folder, "tokenizer.path"),
    "tokenizer.json, copied": lambda folder: prepare_tokenizer(folder, folder.parent / "copy"),
    "tokenizer.json, planned": tokenizer_vocab_size,
    "model.safetensors, by transformers": load_model,
}


@pytest.mark.parametrize("kind", OPENERS)
def test_a_models_and_tokenizers_files_are_checked_when_they_are_opened(data, kind):
    model_and_tokenizer(data / "model")
    with reading_within(ReadRoots([data])):
        OPENERS[kind](data / "model")
    name = kind.partition(",")[0]
    (data / "model" / name).rename(data.parent / "secret" / name)
    (data / "model" / name).symlink_to(data.parent / "secret" / name)
    OPENERS[kind](data / "model")
    with reading_within(ReadRoots([data])), pytest.raises(UserError):
        OPENERS[kind](data / "model")


def test_an_opened_model_stays_readable_when_its_file_is_replaced(data):
    model_and_tokenizer(data / "model")
    free = {key: tensor.clone() for key, tensor in open_checkpoint(data / "model").items()}
    with reading_within(ReadRoots([data])):
        opened_before = open_checkpoint(data / "model")
    (data / "model" / "model.safetensors").unlink()
    assert all((opened_before[key] == tensor).all() for key, tensor in free.items())


def test_a_task_file_is_checked_when_it_is_opened(data):
    (data / "task.jsonl").symlink_to(data.parent / "secret" / "a.txt")
    with reading_within(ReadRoots([data])), pytest.raises(UserError, match=r"evaluation\.lm_eval\.0.*cannot be read"):
        read_task_file("evaluation.lm_eval.0", data / "task.jsonl")


def test_roots_come_from_the_environment_and_follow_the_machines_own_links(data, monkeypatch):
    assert confinement() is None
    (data.parent / "mounted").symlink_to(data)
    monkeypatch.setenv(ENVIRONMENT, ReadRoots([data.parent / "mounted"]).to_json())
    assert confinement().roots == (data.resolve(),)
    fill(data)
    assert read(listed(data.parent / "mounted" / "a.txt")) == ["plain"]
    monkeypatch.setenv(ENVIRONMENT, ReadRoots().to_json())
    with pytest.raises(CorpusError, match="leads out"):
        listed(data / "a.txt")


@pytest.mark.slow
def test_the_embedded_text_is_the_runs_own(tmp_path):
    with reading_within(ReadRoots()):
        inputs = expand_sources([Source(path="embedded")], tmp_path, LIMITS)
        assert read(
            [(source, list_files(source.field, source.settings, own=source.own).files) for source in inputs[:1]]
        )


def test_the_uri_of_a_run_stands_for_its_working_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    run, other, third = (working_directory(f"s3://bucket/{name}") for name in ("run", "other", "third"))
    monkeypatch.setenv(ENVIRONMENT, ReadRoots(own=["s3://bucket/run", "s3://bucket/third/model?scheme=http"]).to_json())
    for directory, allowed in (
        (run, True),
        (other, False),
        (third, False),
        (third / "model", True),
        (third / "corpus", False),
    ):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        refusal = contextlib.nullcontext() if allowed else pytest.raises(OSError, match="leads out")
        with refusal, opened(directory / "config.json") as path:
            assert path.read_text() == "{}"


@pytest.fixture
def kept(data: Path) -> ReadRoots:
    """Roots above places that are denied: other runs and a token. The own run's model is among the other runs."""
    for name in (
        "a.txt",
        "runs/other/a.txt",
        "runs/mine/model/a.txt",
        "token.txt",
        ".hidden/a.txt",
        ".hidden/.git/a.txt",
    ):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    return ReadRoots([data], [data / "runs" / "mine" / "model"], [data / "runs", data / "token.txt"])


def test_denied_and_hidden_places_below_a_root_are_left_out_of_listings(data, kept):
    for path in (data, f"{data}/**/*", f"{data}/*"):
        with reading_within(kept):
            assert read(listed(path)) == ["a.txt"]
    for path in (f"{data}/*/*/a.txt", f"{data}/r*/**/*", f"{data}/t*"):
        with reading_within(kept), pytest.raises(CorpusError, match="holds no files"):
            listed(path)


@pytest.mark.parametrize("name", ["runs/other/a.txt", "token.txt", ".hidden/a.txt", "link", "linked/other/a.txt"])
def test_a_denied_or_hidden_file_is_not_opened(data, kept, name):
    (data / "link").symlink_to("token.txt")
    (data / "linked").symlink_to("runs")
    with reading_within(kept), pytest.raises(PermissionError, match="leads out"), opened(data / name):
        pass
    with reading_within(kept), pytest.raises(CorpusError, match="leads out"):
        listed(data / name)
    with reading_within(kept), pytest.raises(CorpusError, match="leads out"):
        listed(data)


def test_a_file_that_became_a_link_to_a_denied_one_is_refused_when_it_is_opened(data, kept):
    with reading_within(kept):
        files = listed(data / "a.txt")
    (data / "a.txt").unlink()
    (data / "a.txt").symlink_to("token.txt")
    with reading_within(kept), pytest.raises(CorpusError, match="leads out"):
        read(files)


def test_the_runs_own_places_are_read_also_where_others_are_denied(data, kept):
    with reading_within(kept):
        assert read(listed(data / "runs" / "mine" / "model")) == ["runs/mine/model/a.txt"]


@pytest.mark.usefixtures("kept")
def test_a_root_may_be_hidden_itself(data):
    with reading_within(ReadRoots([data / ".hidden"])):
        assert read(listed(data / ".hidden")) == [".hidden/a.txt"]
        with pytest.raises(CorpusError, match="leads out"):
            listed(data / ".hidden" / ".git")


@pytest.mark.parametrize("path", ["/proc/self/environ", "/sys/kernel/uevent_seqnum", "/dev/null", "/run"])
def test_the_kernels_files_and_mounted_secrets_are_not_read_below_the_root_directory(path, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    (tmp_path / "cache" / "runs").mkdir(parents=True)
    (tmp_path / "cache" / "runs" / "a.txt").write_text("another run's copy")
    with reading_within(ReadRoots([Path("/")])):
        for each in (Path(path), tmp_path / "cache" / "runs" / "a.txt"):
            with pytest.raises(OSError, match="leads out"), opened(each):
                pass


@pytest.fixture
def hub_home(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A visible HF_HOME below the root, with a token and another user's model, next to a text that may be read."""
    home = data / "hf"
    for name in ("token", "stored_tokens", "hub/models--ann--private/snapshots/0/a.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    (data / "a.txt").write_text("a.txt")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    return home


def test_the_tokens_and_models_of_the_hub_below_a_root_are_not_read(data, hub_home):
    """Before: all of them were read, the token as a document of the corpus."""
    with reading_within(ReadRoots([data])):
        assert read(listed(f"{data}/**/*")) == ["a.txt"]
        for name in ("token", "stored_tokens", "hub/models--ann--private/snapshots/0/a.txt"):
            with pytest.raises(CorpusError, match="leads out"):
                listed(hub_home / name)
            with pytest.raises(PermissionError, match="leads out"), opened(hub_home / name):
                pass


@pytest.mark.parametrize("root", ["hf", "hf/hub"])
def test_an_operator_may_name_the_hubs_folder_as_a_root_but_never_its_tokens(data, hub_home, root):
    with reading_within(ReadRoots([data, data / root])):
        assert read(listed(hub_home / "hub")) == ["hub/models--ann--private/snapshots/0/a.txt"]
        assert "token" not in read(listed(f"{data}/**/*"))
        with pytest.raises(CorpusError, match="leads out"):
            listed(hub_home / "token")


@pytest.mark.usefixtures("kept")
def test_denied_places_at_a_uri_are_left_out_of_listings(data):
    at_uri = ReadRoots(denied=[f"file://{data}/runs"], own=[f"file://{data}/runs/mine/model"])
    with reading_within(at_uri):
        assert sorted(read(listed(f"file://{data}/**/*.txt"))) == ["a.txt", "runs/mine/model/a.txt", "token.txt"]
        assert read(listed(f"file://{data}/runs/mine/model/*.txt")) == ["runs/mine/model/a.txt"]
        with pytest.raises(CorpusError, match="name a run as run://RUN/corpus"):
            listed(f"file://{data}/runs/other/*.txt")
        with pytest.raises(CorpusError, match="holds no files"):
            listed(f"file://{data}/r*/other/*.txt")


def test_a_link_in_a_folder_of_a_tokenizer_is_refused_before_transformers_follows_it(data):
    model_and_tokenizer(data / "model")
    (data / "model" / "additional_chat_templates").mkdir()
    (data / "model" / "additional_chat_templates" / "x.jinja").symlink_to(data.parent / "secret" / "a.txt")
    with reading_within(ReadRoots([data])), pytest.raises(UserError, match="leads out"):
        load_pretrained(data / "model")


def test_the_settings_of_a_tokenizer_name_no_file_elsewhere(data):
    """Before (af276e38): the tokenizer was loaded with the words of the file outside of the roots, zebra among them."""
    model_and_tokenizer(data / "model")
    tokenizer = json.loads((data / "model" / "tokenizer.json").read_text())["model"]
    (data / "model" / "tokenizer.json").unlink()
    for folder, words in ((data / "model", {}), (data.parent / "secret", {"zebra": len(tokenizer["vocab"])})):
        (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"] | words))
        (folder / "merges.txt").write_text("")
    elsewhere = {
        name: str(data.parent / "secret" / file) for name, file in (("vocab", "vocab.json"), ("merges", "merges.txt"))
    }
    for named, allowed in (
        ({}, True),
        ({"name_or_path": elsewhere["vocab"], "vocab_file": "/nowhere"}, True),
        (elsewhere, False),
    ):
        settings = {"tokenizer_class": "GPT2Tokenizer", **named}
        (data / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
        refusal = contextlib.nullcontext() if allowed else pytest.raises(UserError, match="leads out")
        with reading_within(ReadRoots([data])), refusal:
            assert "zebra" not in load_pretrained(data / "model").get_vocab()


def test_a_loop_of_folders_is_listed_once(data):
    fill(data)
    (data / "loop").symlink_to(data)
    assert len(read(listed(data))) == 2
