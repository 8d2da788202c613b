import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError, masked
from service.domain.path_sandbox import Roots, check_links, sandboxed
from service.domain.starts import located


@pytest.fixture
def roots(tmp_path) -> Roots:
    (tmp_path / "data").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("s")
    return Roots(
        (str(tmp_path / "data"), str(tmp_path / "more"), "s3://bucket/texts"), (tmp_path / "runs", tmp_path / "big")
    )


def config(source: str = "embedded", **sections) -> RunConfig:
    return RunConfig.model_validate({"name": "x", "corpus": {"sources": [{"path": source}]}} | sections)


def refused(made: RunConfig, roots: Roots) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_links(sandboxed(made, roots), roots)
    return caught.value


def test_paths_become_absolute_under_the_first_root(roots):
    asked = config(
        "a/*.md",
        tokenizer={"path": "tok"},
        model={"init": {"checkpoint": "moe"}},
        tokens={"seed_share": 0},
        evaluation={"sources": [{"path": "b"}], "lm_eval": ["tasks.jsonl"]},
    )
    made = sandboxed(asked, roots)
    first = roots.inputs[0]
    assert made.corpus.sources[0].path == f"{first}/a/*.md"
    assert str(made.tokenizer.path) == f"{first}/tok"
    assert made.evaluation.sources[0].path == f"{first}/b"
    assert [str(path) for path in made.evaluation.lm_eval] == [f"{first}/tasks.jsonl"]
    assert str(made.model.init.checkpoint) == f"{first}/moe"
    dense = sandboxed(config(model={"init": {"upcycle": "dense", "num_experts": 8}}), roots).model.init
    assert (str(dense.upcycle), dense.num_experts) == (f"{first}/dense", 8)


def test_the_embedded_text_is_always_allowed(roots):
    nothing = Roots((), roots.outputs)
    assert sandboxed(config(), nothing).corpus.sources[0].path == "embedded"
    assert "reads no files of its machine" in str(refused(config("a"), nothing))


@pytest.mark.parametrize("section", ["corpus", "evaluation"])
def test_only_functions_that_the_operator_names_are_called(roots, section):
    def asking(function: str) -> RunConfig:
        sources = {"sources": [{"path": "b"}, {"path": "a", "map": function}]}
        return config(**{section: sources})

    allowing = dataclasses.replace(roots, functions=("clean:keep",))
    assert sandboxed(asking("clean:keep"), allowing) != asking("clean:keep"), "its path is absolute now"
    for function, allowed in (
        ("clean:keep", roots),
        ("clean:keep2", allowing),
        ("clean:run", allowing),
        ("clean.sub:keep", allowing),
        ("subprocess:run", allowing),
        ("os:system", allowing),
    ):
        error = refused(asking(function), allowed)
        assert error.field == f"{section}.sources.1.map"
        assert "--map-function" in error.remedy


def test_every_root_may_be_read(roots):
    path = f"{roots.inputs[1]}/a"
    assert sandboxed(config(path), roots).corpus.sources[0].path == path


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/",
        "../secret/key",
        "a/../../secret/key",
        "a/..",
        "~/x",
        "~root/x",
        "",
        "a\0b",
        "..\\secret",
        "C:\\x",
        "file:///etc/passwd",
        "FILE:///etc",
        "http://169.254.169.254/latest",
        "https://h/x",
        "local:/etc",
        "s3:bucket/texts",
        "s3://other/texts",
        "s3://bucket",
        "s3://bucket/texts2",
        "s3://bucket/texts/../x",
        "s3://bucket/texts/%2e%2e/x",
        "s3://bucket/te%78ts/x",
        "S3://bucket/texts/x",
        "gs://bucket/texts",
        "s3://bucket/texts/x?endpoint_override=http://evil",
        "s3://bucket/texts/x?region=r&endpoint_override=evil",
        "s3://bucket/texts/x?scheme=http",
        "s3://bucket/texts/x?allow_bucket_creation=1",
        "s3://bucket/texts/x?y",
        "s3://bucket/texts/x#y",
        "s3://bucket/texts/*?endpoint_override=evil",
    ],
)
def test_a_source_elsewhere_is_refused(roots, path):
    error = refused(config(path), roots)
    assert (error.field, error.value) == ("corpus.sources.0.path", masked(path))


@pytest.mark.parametrize(
    "path", ["s3://bucket/texts", "s3://bucket/texts/a/*.jsonl", "s3://bucket/texts/a?region=eu-west-1&anonymous=1"]
)
def test_a_configured_bucket_may_be_read(roots, path):
    assert sandboxed(config(path), roots).corpus.sources[0].path == path


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"tokenizer": {"path": "/etc"}}, "tokenizer.path"),
        ({"tokenizer": {"path": "s3://bucket/texts"}}, "tokenizer.path"),
        ({"model": {"init": {"checkpoint": "/etc"}}, "tokens": {"seed_share": 0}}, "model.init.checkpoint"),
        ({"model": {"init": {"upcycle": "/etc"}}}, "model.init.upcycle"),
        ({"evaluation": {"sources": [{"path": "a"}, {"path": "/etc/passwd"}]}}, "evaluation.sources.1.path"),
        ({"evaluation": {"sources": [{"path": "s3://other/texts"}]}}, "evaluation.sources.0.path"),
        ({"evaluation": {"lm_eval": ["a.jsonl", "/etc/passwd"]}}, "evaluation.lm_eval.1"),
        ({"evaluation": {"lm_eval": ["../secret/key"]}}, "evaluation.lm_eval.0"),
        ({"output": "/etc"}, "output"),
        ({"output": "a/../../x"}, "output"),
    ],
)
def test_every_path_of_the_configuration_is_looked_at(roots, section, field):
    assert refused(config(**section), roots).field == field


@pytest.mark.parametrize(
    "name",
    [
        "s3://bucket/texts/runs",
        "s3://bucket/texts/runs/R/demo/model",
        "s3://bucket/texts/ru%6es/R",
        "s3://bucket/texts//runs/*/*",
        "s3://bucket/texts/checkpoints/x?region=r",
    ],
)
def test_a_bucket_of_runs_below_an_input_bucket_is_not_read(roots, name):
    outputs, storage = ("s3://bucket/texts/runs",), ("s3://bucket/texts/checkpoints",)
    error = refused(config(name), dataclasses.replace(roots, outputs=outputs, storage=storage))
    assert "run://RUN/corpus" in str(error)
    assert sandboxed(config("s3://bucket/texts/runs2"), dataclasses.replace(roots, outputs=outputs))


def test_a_refusal_of_a_hidden_place_names_the_option_that_allows_it(roots, tmp_path):
    hidden = tmp_path / "data" / ".cache" / "texts"
    assert "'.cache' is hidden" in str(refused(config(".cache/texts"), roots))
    assert "`moedisco serve --input-root`" in str(refused(config(str(hidden)), roots))
    allowing = dataclasses.replace(roots, inputs=(*roots.inputs, str(hidden)))
    assert sandboxed(config(str(hidden)), allowing)
    assert "'.git' is hidden" in str(refused(config(f"{hidden}/.git/x"), allowing))


def test_a_path_before_the_root_is_not_in_it(roots):
    assert "outside" in str(refused(config(roots.inputs[0] + "2"), roots))


def test_the_output_is_under_a_root(roots):
    assert sandboxed(config(), roots).output == roots.outputs[0]
    assert sandboxed(config(output="runs"), roots).output == roots.outputs[0]
    assert sandboxed(config(output="team/a"), roots).output == roots.outputs[0] / "team" / "a"
    assert sandboxed(config(output=str(roots.outputs[1])), roots).output == roots.outputs[1]


@pytest.mark.parametrize("path", ["link/key", "link", "link/*", "folder/link/*.txt"])
def test_a_link_out_of_the_roots_is_refused(roots, tmp_path, path):
    data = tmp_path / "data"
    (data / "link").symlink_to(tmp_path / "secret")
    (data / "folder").mkdir()
    (data / "folder" / "link").symlink_to(tmp_path / "secret")
    assert "is a link out" in str(refused(config(path), roots))


def test_a_link_with_the_letters_of_a_glob_is_followed_where_runs_write(tmp_path):
    """Before: what followed a bracket was not looked at, also in settings that are no globs."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "kept" / "[a]").symlink_to(tmp_path / "secret")
    for roots, changes in (
        (Roots((), (tmp_path / "runs",), (str(tmp_path / "kept"),)), {"checkpoint": {"storage": "[a]/x"}}),
        (Roots((), (tmp_path / "kept",)), {"output": "[a]/x"}),
    ):
        assert "is a link out" in str(refused(config("embedded", **changes), roots))


def test_links_between_roots_are_fine(roots, tmp_path):
    (tmp_path / "data" / "more").symlink_to(tmp_path / "more")
    check_links(sandboxed(config("more"), roots), roots)


def test_a_loop_of_links_ends(roots, tmp_path):
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data" / "loop")
    check_links(sandboxed(config("loop"), roots), roots)


@pytest.mark.parametrize("field", ["tokenizer", "checkpoint", "upcycle", "output", "unseen", "tasks"])
def test_links_are_followed_for_every_path(roots, tmp_path, field):
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    made = {
        "tokenizer": config(tokenizer={"path": "link"}),
        "output": config(output="link"),
        "unseen": config(evaluation={"sources": [{"path": "link"}]}),
        "tasks": config(evaluation={"lm_eval": ["link/key"]}),
        "checkpoint": config(model={"init": {"checkpoint": "link"}}, tokens={"seed_share": 0}),
        "upcycle": config(model={"init": {"upcycle": "link"}}),
    }[field]
    refused(made, roots)


@given(st.text(st.sampled_from("ab./~%:?*[]\\ s3"), max_size=20))
def test_every_allowed_path_is_under_a_root(path):
    roots = Roots(("/data", "s3://a/b"), (Path("/runs"),))
    try:
        made = sandboxed(config(path), roots).corpus.sources[0].path
    except (ConfigError, ValueError):  # a ValueError if the text is no glob
        return
    assert made.startswith(("/data/", "s3://a/b/")) or made in ("/data", "s3://a/b")
    assert ".." not in made.split("/")


@pytest.mark.parametrize(
    ("root", "name", "allowed"),
    [
        ("hf://org", "hf://org/name", True),
        ("hf://org/name", "hf://org/name", True),
        ("hf://org", "hf://org2/name", False),
        ("hf://org/na", "hf://org/name", False),
        ("hf://other", "hf://org/name", False),
        ("s3://org", "hf://org/name", False),
        ("hf://datasets/org", "hf://org/name", False),
    ],
)
def test_a_model_of_the_hub_is_under_a_root_like_a_bucket(root: str, name: str, allowed: bool):
    roots = Roots(["/data", root], [Path("/runs")])
    made = config(model={"init": {"upcycle": name, "revision": "v1"}})
    if allowed:
        assert sandboxed(made, roots) == made.model_copy(update={"output": Path("/runs")})
        assert located(made, {}.get, str)[1] == (name,)
    else:
        assert "--input-root" in str(refused(made, roots))


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"corpus": {"sources": [{"path": "/elsewhere/text"}]}}, "--input-root"),
        ({"output": "/elsewhere"}, "--output-root"),
        ({"checkpoint": {"storage": "/elsewhere"}}, "--storage-root"),
    ],
)
def test_a_refusal_names_the_option_that_allows_the_place(change, option):
    config = RunConfig.model_validate({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, **change})
    roots = Roots(["/data"], [Path("/runs")], ["/checkpoints"])
    with pytest.raises(ConfigError, match=option):
        sandboxed(config, roots)
