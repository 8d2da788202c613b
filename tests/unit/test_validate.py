"""`moedisco validate` finds in seconds, before anything is made, what a run would fail with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from moe_models import random_tensors, tiny_config
from safetensors.torch import load_file, save_file
from small_run import small_config
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.execution.output_checks import check_output
from moedisco_ray.execution.validation import validate
from moedisco_ray.models import write_checkpoint

TEXT = "Some lines of plain text.\n\nAnd a second paragraph, which is another document.\n\n" * 400


def written(folder: Path, **files: bytes | str) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(data)


def with_text(tmp_path: Path, path: str, output: str = "runs", **changes: Any) -> RunConfig:
    return small_config(tmp_path / output, **{"corpus": {"sources": [{"path": path, "name": "mine"}]}, **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no files, or only empty ones"),
        (bytes(range(256)) * 64, "binary"),
        (("Caf\xe9 und \xdcbung\n\n" * 300).encode("latin-1"), "UTF-8"),
        (TEXT.encode("utf-16"), "UTF-16"),
    ],
)
def test_text_that_cannot_be_read_is_found_before_the_run(tmp_path: Path, content: bytes, words: str) -> None:
    written(tmp_path / "data", mine_txt=content)
    found = validate(with_text(tmp_path, str(tmp_path / "data" / "mine.txt")))
    assert found.problems, found
    assert "mine.txt" in str(found.problems[0])
    assert words.lower() in str(found.problems[0]).lower()
    assert not (tmp_path / "runs").exists()


def test_a_glob_that_matches_nothing_is_found(tmp_path: Path) -> None:
    found = validate(with_text(tmp_path, str(tmp_path / "nothing" / "*.txt")))
    assert "corpus.sources.0" in str(found.problems[0])


def test_what_is_fine_is_fine_and_is_looked_at_in_seconds(tmp_path: Path) -> None:
    written(tmp_path / "data", mine_txt=TEXT)
    started = time.monotonic()
    found = validate(small_config(tmp_path / "runs"))
    assert found.problems == ()
    assert found.vocab_size == 600
    assert time.monotonic() - started < 30
    assert not (tmp_path / "runs").exists()


def test_every_mistake_is_listed_at_once_with_field_value_and_remedy(tmp_path: Path) -> None:
    written(tmp_path / "data", mine_txt=b"")
    (tmp_path / "file").write_text("")
    config = with_text(
        tmp_path,
        str(tmp_path / "data" / "mine.txt"),
        "file/runs",
        pools={"low_memory": {"memory_gb": 0.001}, "high_memory": {"workers": 1}},
    )
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["corpus.sources.0.path", "pools.low_memory.memory_gb", "output"]
    assert all(line.startswith("moedisco: ") for line in lines)
    assert "needs" in lines[1]
    assert "ok" not in result.stdout


def test_a_checkpoint_whose_tensors_do_not_fit_is_found(tmp_path: Path) -> None:
    start, shape = tmp_path / "start", tiny_config("mixtral")
    write_checkpoint(start, random_tensors(shape).items(), shape)
    tensors = load_file(start / "model.safetensors")
    name = next(key for key in tensors if key.endswith("q_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    config = small_config(
        tmp_path / "runs",
        model={"family": "mixtral", "config": None, "init": {"checkpoint": str(start)}},
        clusters={"count": 2},
        tokens={"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4},
    )
    found = [str(problem) for problem in validate(config).problems]
    assert any("q_proj" in line and "another shape" in line for line in found), found


def test_a_gpu_that_this_machine_lacks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, pools={"low_memory": {"gpu": 1}, "high_memory": {"workers": 1, "gpu": 0}})
    monkeypatch.setattr("moedisco_ray.execution.validation.local_gpus", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert any("pools.low_memory.gpu: 1: this machine has no GPU" in line for line in validate(config).warnings)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not any("GPU" in line for line in validate(config).warnings)


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "runs" / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="is not a directory"):
        check_output(tmp_path / "file" / "x")
    with pytest.raises(RunDirError, match=r"cannot be (made|written)"):
        check_output(Path("/proc/1/moedisco"))


def test_too_few_gpus_for_a_gang_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, pools={"low_memory": {"gpu": 1}, "high_memory": {"workers": 2, "gpu": 1}})
    monkeypatch.setattr("moedisco_ray.execution.validation.local_gpus", lambda: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = next(line for line in validate(config).warnings if "GPU" in line)
    assert line.startswith("pools.high_memory.gpu: 1: this machine has 1 GPU, and the run needs 2 at once; ")
    assert "lower pools.high_memory.workers" in line
