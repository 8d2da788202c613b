"""The service of `moedisco demo` may read what the demo's own configuration names, and nothing else."""

from pathlib import Path

import pytest
import yaml

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from service.commands.demo import with_roots
from service.domain.path_sandbox import check_links, check_roots, sandboxed
from service.settings import Settings


def demo(**changes: object) -> RunConfig:
    return RunConfig.model_validate(yaml.safe_load(preset_text("demo")) | changes)


def test_a_demo_of_the_built_in_text_has_no_input_root() -> None:
    assert with_roots(demo()) == (demo(), [])


def test_a_demo_reads_what_its_options_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [
        {"path": path} for path in ("texts/*/a*.txt", "one.txt", "s3://bucket/wiki/*.parquet", "hf://datasets/org/name")
    ]
    asked, roots = with_roots(demo(corpus={"sources": sources}, tokenizer={"path": ".cache/tokenizer"}))
    given = Settings(
        state_dir=tmp_path / "runs" / "service", output_roots=(tmp_path / "runs",), input_roots=tuple(roots)
    ).roots
    assert set(given.inputs) == {
        *(str(tmp_path / name) for name in ("texts", "one.txt", ".cache/tokenizer")),
        "s3://bucket/wiki",
        "hf://datasets/org/name",
    }
    check_roots(given)
    check_links(sandboxed(asked, given), given)
    for other in ("two.txt", ".env", "runs/service/admin-token"):
        with pytest.raises(ConfigError, match="outside of the input roots"):
            sandboxed(demo(corpus={"sources": [{"path": str(tmp_path / other)}]}), given)
