"""A key that a YAML mapping has twice is refused with both lines, in every file that users write."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.config.yaml_text import YamlError, parse_yaml

CLUSTER = """
cluster_name: x
provider: {type: local, head_ip: 10.0.0.1, worker_ips: []}
max_workers: 0
max_workers: 4
"""


def said(*arguments):
    """What a command says of a mistake, on one line."""
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert ended.exit_code == 2, ended.output
    return " ".join(ended.output.split())


def test_a_second_section_of_a_configuration_is_refused_with_both_lines(tmp_path):
    """A later section of the same name does not silently replace the first one.

    Before (af276e38): `plan` exited with 0 and planned the second `tokens` section alone.
    """
    path = tmp_path / "run.yaml"
    text = preset_text("demo")
    path.write_text(text + "\ntokens: {total: 30000}\n")
    lines = path.read_text().split("\n")
    first, second = (number for number, line in enumerate(lines, 1) if line.startswith("tokens:"))
    assert f"{path}': has the key 'tokens' in line {first} and again in line {second}; keep one of them" in said(
        "plan", path
    )


def test_a_repeated_key_in_an_override_is_refused(tmp_path):
    """A value of `--set` is held to the same rule.

    Before (af276e38): `plan` exited with 0 and used the second value.
    """
    path = tmp_path / "run.yaml"
    path.write_text(preset_text("demo"))
    words = said("plan", path, "--set", "tokens={total: 20000, total: 30000}")
    assert "--set: 'tokens={total: 20000, total: 30000}': the value has the key 'total' twice in line 1" in words


def test_a_repeated_key_in_a_cluster_file_is_refused_with_both_lines(tmp_path):
    """A cluster file is held to the same rule.

    Before (af276e38): the file was read with `max_workers: 4`, and the message was about the metadata that it lacks.
    """
    path, cluster = tmp_path / "run.yaml", tmp_path / "cluster.yaml"
    path.write_text(preset_text("demo"))
    cluster.write_text(CLUSTER)
    assert "has the key 'max_workers' in line 4 and again in line 5" in said("plan", path, "--cluster", cluster)


KEYS = st.lists(
    st.from_regex(r"[a-z]{1,3}", fullmatch=True).filter(lambda key: isinstance(yaml.safe_load(key), str)), max_size=6
)


@given(KEYS)
def test_a_mapping_is_read_exactly_if_its_keys_differ(keys):
    text = "".join(f"{key}: {number}\n" for number, key in enumerate(keys)) or "{}"
    if len(set(keys)) == len(keys):
        assert parse_yaml(text) == yaml.safe_load(text)
    else:
        with pytest.raises(YamlError, match=r"has the key .* in line .* and again in line"):
            parse_yaml(text)


def test_a_key_that_overrides_a_merged_one_is_no_repetition():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}
