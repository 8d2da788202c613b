"""Scaled positions are what the configuration says, in either spelling, or are refused in one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moedisco_ray.core.config import Architecture, check_config, read_architecture
from moedisco_ray.core.config.rope import ROPE_TYPES
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.models import hf_config, skeleton
from moedisco_ray.stages.start import check_start

VALUES: dict[str, Any] = {
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "attention_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
    "truncate": True,
    "partial_rotary_factor": 0.5,
}
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 300,
}


def run_with(scaling: object):
    return check_config(
        {
            "name": "x",
            "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 64},
            "tokenizer": {"train_vocab_size": 300},
            "submodels": {"optimizer": {"batch_tokens": 64}},
            "finetune": {"optimizer": {"batch_tokens": 64}},
            "model": {"family": "mixtral", "config": {**SIZES, "rope_scaling": scaling}},
        }
    )


def test_the_types_are_those_of_the_installed_transformers():
    assert set(ROPE_TYPES) == set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("name", ROPE_TYPES)
def test_a_complete_type_is_built_and_one_that_lacks_a_parameter_is_refused_as_transformers_would(name: str):
    needed = {key: VALUES[key] for key in ROPE_TYPES[name].needed}
    for values in (needed, {key: VALUES[key] for key in ROPE_TYPES[name].known}):
        config = hf_config("mixtral", Architecture(**SIZES, rope_scaling={"rope_type": name, **values}), 300, 64, 0)
        assert config.rope_parameters["rope_type"] == name
        assert values.items() <= config.rope_parameters.items()
        skeleton(config)
    for missing in needed:
        incomplete = {"rope_type": name, **{key: value for key, value in needed.items() if key != missing}}
        with pytest.raises(
            ConfigError, match=rf"^model\.config\.rope_scaling: rope_type '{name}' also needs {missing}$"
        ):
            run_with(incomplete)
        unchecked = Architecture(**SIZES).model_copy(update={"rope_scaling": incomplete})
        with pytest.raises(KeyError):
            skeleton(hf_config("mixtral", unchecked, 300, 64, 0))


def test_the_older_spelling_scales_a_random_start_too():
    config = run_with({"type": "linear", "factor": 4.0})
    assert config.model.architecture.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    built = hf_config("mixtral", config.model.architecture, 300, 64, 0)
    assert built.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    assert run_with({"type": "linear", "rope_type": "linear", "factor": 4.0}) == config
    check_start(config)
    assert run_with({"rope_type": "default"}).model.architecture.rope_scaling is None


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"factor": 4.0}, "needs rope_type, one of linear, dynamic"),
        ({}, "needs rope_type"),
        ({"rope_type": "bogus"}, "rope_type 'bogus' is not known; use one of linear"),
        ({"rope_type": ["linear"], "factor": 2.0}, "is not known"),
        ({"rope_type": "linear"}, "also needs factor"),
        ({"rope_type": "linear", "factor": None}, "also needs factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor '2' must be a number of at least 1"),
        ({"rope_type": "linear", "factor": 0.5}, "must be a number of at least 1"),
        ({"rope_type": "linear", "factor": True}, "must be a number of at least 1"),
        ({"rope_type": "linear", "factor": float("inf")}, "must be a number of at least 1"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "names two types"),
        (
            {"rope_type": "yarn", "factor": 2.0, "beta_fst": 1.0},
            "beta_fst: rope_type 'yarn' has no such parameter; it has factor",
        ),
        ({"rope_type": "default", "factor": 2.0}, "factor: rope_type 'default' has no parameters"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "must be true or false"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8.5}, "must be a whole number"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "must be above low_freq_factor",
        ),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "a head of 8 needs 4"),
        ({"rope_type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}, "must be a list of positive numbers"),
    ],
)
def test_scaling_that_cannot_be_computed_is_one_line_with_its_field(scaling: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        run_with(scaling)
    assert (error.value.field, "\n" in str(error.value)) == ("model.config.rope_scaling", False)
    assert said in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["rope_type", "type", *VALUES]),
        st.one_of(
            st.sampled_from([*ROPE_TYPES, "default"]),
            st.floats(),
            st.integers(-2, 99),
            st.none(),
            st.booleans(),
            st.lists(st.floats(0.1, 9), max_size=5),
        ),
        max_size=6,
    )
)
def test_scaling_is_built_or_refused_whatever_it_holds(scaling: dict[str, Any]):
    with contextlib.suppress(ConfigError):
        check_start(run_with(scaling))  # anything but a ConfigError is a fault of ours


def test_a_start_whose_positions_are_scaled_in_an_unknown_way_is_refused_in_one_line(tmp_path: Path):
    raw: dict[str, Any] = {
        **SIZES,
        "model_type": "mixtral",
        "num_local_experts": 2,
        "intermediate_size": 16,
        "num_key_value_heads": 4,
    }

    def read(scaling: dict[str, Any]) -> Architecture:
        (tmp_path / "config.json").write_text(json.dumps({**raw, "rope_scaling": scaling}), encoding="utf-8")
        return read_architecture(tmp_path, "mixtral")

    assert read({"type": "yarn", "factor": 2.0, "finetuned": True}).rope_scaling == {"rope_type": "yarn", "factor": 2.0}
    for scaling in ({"type": "su"}, {"rope_type": "linear"}):
        with pytest.raises(
            CheckpointError, match=r"^model\.init\.checkpoint: .*config\.json cannot be used: rope_sc"
        ) as error:
            read(scaling)
        assert "\n" not in str(error.value)
