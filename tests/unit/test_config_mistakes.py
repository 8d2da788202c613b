"""What a user reads of a mistake is ours: field, value, and plain words."""

import pickle
import re
import time

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from moedisco_ray.core.config import check_config, load_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.core.errors import ConfigError, UserError, masked
from moedisco_ray.core.limits import BF16_STEP

PYDANTIC = re.compile(
    r"[Ii]nput should|valid (integer|number|string|boolean|tuple|dictionary|list)|unable to parse|instance of|"
    r"Value error|is not valid here|ctx|pydantic|Traceback"
)


def _leaves(node, path=""):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list) and node:
        for i, value in enumerate(node):
            yield from _leaves(value, f"{path}.{i}")
    else:
        yield path


LEAVES = sorted(
    {
        leaf
        for preset in ("demo", "default", "paper")
        for leaf in _leaves(check_config(parse_yaml(preset_text(preset))).model_dump(mode="json"))
    }
)
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.binary(max_size=3),
    st.just(10**30),
    st.dates(),
)


@given(st.sampled_from(LEAVES), WRONG)
def test_no_mistake_is_told_in_pydantics_words(leaf, value):
    raw = parse_yaml(preset_text("demo"))
    node = raw
    *sections, last = leaf.split(".")
    for section in sections:
        node = node[int(section)] if isinstance(node, list) else node.setdefault(section, {})
        if node is None or (isinstance(node, list) and not node):
            return
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    message = _mistake_in(raw)
    assert not PYDANTIC.search(message), message
    assert "\n" not in message


def _mistake_in(raw):
    try:
        check_config(raw)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e5", 400_000),
        ("1e-3", 0.001),
        ("-2E+3", -2000),
        ("1_0e2", 1000),
        ("4.5e5", 450_000),
        ("0x1e5", 0x1E5),
        ("e5", "e5"),
        ("1e", "1e"),
        ("v1e5", "v1e5"),
        ("'4e5'", "4e5"),
        ("12", 12),
        ("no", False),
    ],
)
def test_numbers_are_written_as_people_write_them(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value) or isinstance(parse_yaml(text), float)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_of_json_is_read_as_json_reads_it(number):
    assert parse_yaml(repr(number)) == number
    assert parse_yaml(f"{number:e}") == float(f"{number:e}")


def test_an_exponent_is_as_good_for_tokens_as_for_rates(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ncorpus: {sources: [{path: embedded}]}\ntokens: {total: 4e5}\n")
    assert load_config(path).tokens.total == 400_000
    assert load_config(path, ["tokens.total=2.5e6"]).tokens.total == 2_500_000
    with pytest.raises(ConfigError, match=r"tokens\.total: 0\.5: must be a whole number"):
        load_config(path, ["tokens.total=5e-1"])


def test_a_kind_of_mistake_without_words_of_its_own_still_has_plain_ones():
    found = {"type": "frozen_set_type", "msg": "Input should be a valid frozenset"}
    assert plain_words(found) == "is not valid here (frozen set type)"


def test_only_plain_data_is_read():
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.system ['true']")


def test_every_setting_with_a_mistake_is_told_once():
    raw = parse_yaml(preset_text("demo"))
    raw |= {"tokns": 1, "seed": "x"}
    raw["corpus"]["sequence_length"] = -3
    raw["pools"]["low_memory"]["seed_workers"] = [4, "x"]  # a union of a number, a pair and a word
    raw["model"] |= {"init": {"upcycel": "x"}}  # a union of kinds of starts
    raw["model"]["config"]["num_expert"] = 4
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    found = {mistake.field: mistake.remedy for mistake in (caught.value, *caught.value.others)}
    assert len(found) == 1 + len(caught.value.others)
    assert set(found) == {
        "tokns",
        "seed",
        "corpus.sequence_length",
        "pools.low_memory.seed_workers.1",
        "model.init.upcycel",
        "model.config.num_expert",
    }
    assert pickle.loads(pickle.dumps(caught.value)).others[0].field == caught.value.others[0].field


@pytest.mark.parametrize(
    ("section", "setting", "form"),
    [
        ("model", "init", "must be random, {checkpoint: MODEL} or {upcycle: MODEL}"),
        ("corpus", "sources", "must be a list, such as [{path: my.txt}]"),
    ],
)
def test_a_text_in_place_of_a_section_names_the_forms_of_the_section(section, setting, form):
    """Before: `must be 'random'`, and `must be a list`."""
    raw = parse_yaml(preset_text("demo"))
    raw[section] |= {setting: "x"}
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert str(caught.value) == f"{section}.{setting}: 'x': {form}"


def test_every_missing_file_is_told(tmp_path):
    raw = parse_yaml(preset_text("demo"))
    raw["corpus"]["sources"] = [{"path": str(tmp_path / name), "name": "same"} for name in "ab"]
    raw["tokenizer"] |= {"path": str(tmp_path / "c")}
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert [mistake.field for mistake in (caught.value, *caught.value.others)] == [
        "corpus.sources.0.path",
        "corpus.sources.1.path",
        "corpus.sources",
        "tokenizer.path",
    ]


def test_thousands_of_mistakes_are_told_in_bounded_time():
    raw = parse_yaml(preset_text("demo")) | {f"setting{i}": i for i in range(4000)}
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert time.process_time() - started < 2
    assert len(caught.value.others) == 19


def test_credentials_are_found_in_bounded_time():
    started = time.process_time()
    for text in ("a" * 1_000_000, "a:/" * 300_000, "hf:/" * 250_000 + "@"):
        masked(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("sizes", "field", "remedy"),
    [
        (
            {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1},
            "hidden_size: 36",
            "set it to 40, or set submodels.optimizer.precision to fp32",
        ),
        ({"moe_intermediate_size": 500}, "moe_intermediate_size: 500", "set it to 504, or set"),
    ],
)
def test_sizes_that_gpus_cannot_multiply_are_refused_before_they_train(sizes, field, remedy):
    """Before: the training ended with torch's "strides should be multiple of 16 bytes"."""
    model = {"config": {"num_experts": 4, "num_experts_per_tok": 2, **sizes}}
    base = parse_yaml(preset_text("demo")) | {"model": model, "clusters": {"count": 2}}
    assert check_config(base)
    base["pools"] = {"low_memory": {"gpu": 1, "memory_gb": 24}}
    with pytest.raises(
        ConfigError, match=rf"^model\.config\.{field}: GPUs compute experts in bf16 only if .*; {remedy}"
    ):
        check_config(base)
    in_fp32 = {"optimizer": {"precision": "fp32", "batch_tokens": 4096}}
    assert check_config(base | {"submodels": in_fp32, "finetune": in_fp32})
    alone = base | {"clusters": {"count": 4}}
    assert check_config(alone)  # one expert in each sub-model, and a fine-tune on CPUs
    with pytest.raises(ConfigError, match=r"or set finetune\.optimizer\.precision to fp32"):
        check_config(alone | {"pools": base["pools"] | {"high_memory": {"gpu": 1, "memory_gb": 80}}})


@pytest.mark.parametrize("size", [BF16_STEP * 5, BF16_STEP * 5 - 4])
def test_torch_multiplies_experts_in_bf16_only_in_these_steps(size):
    x_SD, w_EDF = torch.ones(4, size, dtype=torch.bfloat16), torch.ones(2, size, BF16_STEP, dtype=torch.bfloat16)
    ends_E = torch.tensor([2, 4], dtype=torch.int32)
    if size % BF16_STEP == 0:
        assert functional.grouped_mm(x_SD, w_EDF, offs=ends_E).shape == (4, BF16_STEP)
    else:
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            functional.grouped_mm(x_SD, w_EDF, offs=ends_E)
