from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from place_settings import leaves, marked, may_name_a_place
from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.places import ReadsFrom, WritesTo, has_credentials, places, with_places
from moedisco_ray.core.errors import ConfigError, masked

NAME_NO_PLACE = {
    "name",
    "tags.*",
    "merge.backbone",
    "merge.router",
    "model.family",
    "model.config.rope_scaling.*",
    "model.config.fields.*",
    "model.init.revision",
    "model.init.commit",
    "pools.low_memory.card",
    "pools.low_memory.types.*.card",
    "pools.high_memory.card",
    "corpus.sources.*.name",
    "corpus.sources.*.owner",
    "corpus.sources.*.text_column",
    "corpus.sources.*.exclude.*",
    *(
        f"{section}.sources.*.{setting}"
        for section in ("corpus", "evaluation")
        for setting in (
            "subset",
            "split",
            "ids_column",
            "messages_column",
            "completion_column",
            "prompt_column",
            "tools_column",
            "instruction_column",
            "map",
        )
    ),
    "evaluation.sources.*.exclude.*",
    "evaluation.sources.*.name",
    "evaluation.sources.*.text_column",
    "evaluation.prompts.*",
    "pools.low_memory.resource",
    "pools.high_memory.resource",
    "pools.low_memory.types.*.name",
    "pools.low_memory.types.*.resource",
    "pools.owners.*",
    "pools.owners.*.resource",
    "secrets.*",
    "tracking.trackers.*",
}


def unmarked(model: type[BaseModel]) -> set[str]:
    return {field for field, hint, marker in leaves(model) if marker is None and may_name_a_place(hint)}


def test_every_setting_that_may_name_a_place_is_marked_as_read_or_written() -> None:
    assert unmarked(RunConfig) == NAME_NO_PLACE


def test_an_unmarked_place_is_found_wherever_it_is_declared() -> None:
    class Inner(BaseModel):
        plain: Path

    class Outer(BaseModel):
        union: int | str | None = None
        many: tuple[tuple[Path, int], ...] = ()
        named: dict[int, Path | None] = {}
        inner: tuple[Inner, ...] = ()
        number: int = 0
        fine: tuple[Annotated[Path, ReadsFrom()] | None, ...] = ()

    assert unmarked(Outer) == {"union", "many.*.*", "named.*", "inner.*.plain"}


def test_the_marked_settings() -> None:
    kinds = {field: marker for field, (_, marker) in marked(RunConfig).items()}
    assert kinds == {
        "corpus.sources.*.path": ReadsFrom(uris=True, run_part="corpus"),
        "evaluation.sources.*.path": ReadsFrom(uris=True, run_part="corpus"),
        "evaluation.lm_eval.*": ReadsFrom(),
        "tokenizer.path": ReadsFrom(run_part="model"),
        "model.init.checkpoint": ReadsFrom(run_part="model", hub=True),
        "model.init.upcycle": ReadsFrom(run_part="model", hub=True),
        "checkpoint.storage": WritesTo("checkpoints"),
        "pools.owners.*.storage": WritesTo("checkpoints"),
        "output": WritesTo("runs"),
    }


def test_a_walk_finds_and_replaces_every_place() -> None:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "corpus": {"sources": [{"path": "a"}, {"path": "s3://b"}]},
            "tokenizer": {"path": "c"},
            "model": {"init": {"upcycle": "d"}},
            "evaluation": {"sources": [{"path": "e"}], "lm_eval": ["f", "g"]},
            "checkpoint": {"storage": "h"},
            "output": "i",
        }
    )
    found = {place.field: str(place.value) for place in places(config)}
    assert found == {
        "corpus.sources.0.path": "a",
        "corpus.sources.1.path": "s3://b",
        "tokenizer.path": "c",
        "model.init.upcycle": "d",
        "evaluation.sources.0.path": "e",
        "evaluation.lm_eval.0": "f",
        "evaluation.lm_eval.1": "g",
        "checkpoint.storage": "h",
        "output": "i",
    }
    moved = with_places(config, lambda place: type(place.value)(f"{place.value}2"))
    assert [str(place.value) for place in places(moved)] == [f"{value}2" for value in found.values()]
    assert with_places(moved, lambda place: place.value) is moved
    assert RunConfig.model_validate(moved.model_dump()) == moved


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:SECRET@bucket/a",
        "s3://KEY@bucket",
        "s3://KEY:SEC/RET@bucket/a",
        "s3://KEY%3ASECRET@bucket",
        "gs://a:SECRET@b",
        "abfss://c:SECRET@account.dfs.core.windows.net/p",
        "s3://b/a?access_key=SECRET",
        "s3://b/a?region=r&secret_key=SECRET",
        "s3://b?Session-Token=SECRET",
        "s3://b?access%5Fkey=SECRET",
        "abfs://c@a?sig=SECRET",
        "abfs://c@a?client_secret=SECRET",
        "https://h/x?X-Amz-Signature=SECRET",
        "hdfs://h:8020/x?kerb_ticket=SECRET",
    ],
)
@pytest.mark.parametrize("field", ["corpus.sources.0.path", "checkpoint.storage", "tokenizer.path"])
def test_credentials_are_refused_and_never_repeated(field: str, uri: str) -> None:
    raw = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, "tokenizer": {}, "checkpoint": {}}
    *parents, last = field.replace("sources.0", "sources").split(".")
    node = raw
    for parent in parents:
        node = node[parent]
    (node[0] if isinstance(node, list) else node)[last] = uri
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert caught.value.field == field
    assert "instance role" in caught.value.remedy
    assert "SEC" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "a/b.txt",
        "a?key=*",
        "s3://bucket/a@b",
        "s3://bucket/a?region=r",
        "abfss://container@account.dfs.core.windows.net/p",
        "gs://anonymous@bucket/x",
        "hdfs://user@host:8020/x@y",
        "s3://b?endpoint_override=127.0.0.1:9000&scheme=http",
        "abfs://c@a?credential_kind=anonymous",
    ],
)
def test_places_without_secrets_are_no_credentials(uri: str) -> None:
    assert not has_credentials(uri)


@given(st.from_regex(r"[A-Za-z0-9+=@/?#&;]{8,40}", fullmatch=True))
def test_a_password_is_masked_whatever_its_characters(secret: str) -> None:
    shown = masked(f"s3://AKIA:{secret}XX@bucket/folder")
    assert shown == "s3://***@bucket/folder"


def test_a_place_has_a_bounded_length() -> None:
    with pytest.raises(ConfigError, match="4096"):
        check_config({"name": "x", "corpus": {"sources": [{"path": "a" * 5000}]}})


def test_a_revision_at_the_hub_is_shown() -> None:
    assert masked("hf://datasets/ORG/NAME@v1/x.csv") == "hf://datasets/ORG/NAME@v1/x.csv"
    assert masked("hf://ORG/NAME@main or s3://user:word@bucket/x") == "hf://ORG/NAME@main or s3://***@bucket/x"
    assert masked("hf://ORG/NAME or s3://user:word@bucket/x") == "hf://ORG/NAME or s3://***@bucket/x"
    assert masked("hf://user:word@ORG/NAME") == "hf://***@ORG/NAME"
