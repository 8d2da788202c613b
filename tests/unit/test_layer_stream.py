"""Streamed models give the bits of models in memory; files written tensor by tensor are those of safetensors."""

from __future__ import annotations

import errno
import gc
import json
import resource
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import LENGTH, VOCAB, moe, random_tensors, tiny_config
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from moedisco_ray.core.config import FAMILIES
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import (
    Checkpoint,
    Stored,
    check_same,
    checkpoint_writer,
    load_model,
    open_checkpoint,
    specialise,
    write_checkpoint,
)
from moedisco_ray.models.layer_stream import final_states, grouped
from moedisco_ray.models.shard_file import ShardFile
from moedisco_ray.models.streamed import loaded, open_streamed, streamed_model
from moedisco_ray.training.sharded_files import read_tensors

TOKENS = torch.arange(2 * LENGTH).mul(7).remainder(VOCAB).view(2, LENGTH)


def on_device(model):
    return [parameter for parameter in model.parameters() if not parameter.is_meta]


@pytest.mark.parametrize(
    ("dtype", "resident"),
    [
        (torch.float32, False),
        (torch.bfloat16, True),
        pytest.param(torch.float32, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_gives_the_bits_of_the_model_in_memory(family, dtype, resident, tmp_path):
    config = tiny_config(family, num_hidden_layers=3, tie_word_embeddings=family == "olmoe")
    write_checkpoint(tmp_path, random_tensors(config, dtype).items(), config, max_shard_bytes=4000)
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    for change in (lambda model: model, specialise):
        memory = change(load_model(tmp_path, dtype)).eval()
        model = change(streamed_model(open_checkpoint(tmp_path), memory.config, dtype=dtype, resident=resident))
        with torch.inference_mode():
            assert torch.equal(model(TOKENS).logits, memory(TOKENS).logits)
            plain, masked = final_states(model, [TOKENS, TOKENS], masks=[None, mask])
            assert torch.equal(plain, memory.base_model(TOKENS).last_hidden_state)
            assert torch.equal(masked, memory.base_model(TOKENS, attention_mask=mask).last_hidden_state)
            with loaded(model.lm_head):
                divisor = getattr(memory.config, DECLARATIONS[family].logits_divisor or "", 1)
                assert torch.equal(model.lm_head(plain) / divisor, memory(TOKENS).logits)
        stay = model if resident else model.model.norm
        assert len(on_device(model)) == len(list(stay.parameters()))


@pytest.mark.parametrize(
    "read",
    [
        lambda stored, _: [*stored.stream()],
        lambda stored, memory: streamed_model(stored, memory.config, dtype=torch.float32, resident=False)(TOKENS),
        lambda stored, memory: read_tensors(memory.state_dict(), stored, stored.model_map),
    ],
)
def test_one_thread_reads_ahead_and_ends(read, tmp_path, monkeypatch):
    config = tiny_config("qwen3_moe", 12, num_hidden_layers=3)
    write_checkpoint(tmp_path, random_tensors(config).items(), config)
    memory = load_model(tmp_path)
    threads, asked, start, read_ahead = [], [], threading.Thread.start, Checkpoint.read_ahead
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (threads.append(thread), start(thread)))
    monkeypatch.setattr(Checkpoint, "read_ahead", lambda *given: (asked.append(given), read_ahead(*given)))
    read(open_checkpoint(tmp_path), memory)
    assert len(asked) > 1
    (thread,) = threads
    thread.join(10)
    assert not thread.is_alive()


def test_generation_with_a_cache_gives_the_same_bits(tmp_path):
    config = tiny_config("qwen3_moe")
    write_checkpoint(tmp_path, random_tensors(config).items(), config)
    memory = load_model(tmp_path).eval()
    model = streamed_model(open_checkpoint(tmp_path), config, dtype=torch.float32, resident=False)
    found = []
    for each in (memory, model):
        cache = DynamicCache(config=each.config)
        with torch.inference_mode():
            found.append([each(TOKENS[:1, at : at + 4], None, None, cache, use_cache=True).logits for at in (0, 4, 8)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_tokens_read_only_the_experts_that_they_select(family, tmp_path):
    config = tiny_config(family, 12, num_hidden_layers=1)
    write_checkpoint(tmp_path, random_tensors(config).items(), config)
    memory, read = load_model(tmp_path).eval(), set()

    class Noted(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    model = streamed_model(Noted(random_tensors(config)), config, dtype=torch.float32, resident=False, few_tokens=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS[:1, :2]).logits, memory(TOKENS[:1, :2]).logits, rtol=1e-4, atol=1e-4)
    experts = {key.split(".experts.")[1].split(".")[0] for key in read if ".experts." in key}
    assert DECLARATIONS[family].stacks or 2 <= len(experts) <= 4


def test_one_layer_is_loaded_at_a_time_and_once_for_all_batches():
    config = tiny_config("olmoe", num_hidden_layers=5)
    tensors = random_tensors(config)
    model = streamed_model(tensors, config, dtype=torch.float32, resident=False)
    most, passes, order = [], [], []
    for layer in model.model.layers:
        load = layer.streamed_part.load
        layer.streamed_part.load = lambda load=load: (passes.append(1), load())
    with torch.inference_mode():
        list(
            final_states(
                model,
                [TOKENS] * 4,
                before=order.append,
                after=lambda *_: most.append(sum(map(torch.numel, on_device(model)))),
            )
        )
    assert len(passes) == 5
    layer = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("model.layers.0."))
    assert max(most) <= layer + len(tensors["model.norm.weight"])
    assert len(most) == 5 * 4
    assert order == [0, 1, 2, 3] * 5


@pytest.mark.parametrize("experts", [1, 4])
def test_weights_that_stay_loaded_are_freed_with_the_model(experts):
    """Two models that each take 40 % of a GPU never have to fit it together."""
    config = tiny_config("olmoe", num_experts=experts, norm_topk_prob=True)
    model = specialise(streamed_model(random_tensors(config), config, dtype=torch.float32, resident=True))
    model(TOKENS)
    weights = [weakref.ref(parameter) for parameter in on_device(model)]
    assert len(weights) == len(list(model.parameters()))
    gc.disable()
    try:
        del model
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_groups_fit_in_memory_and_keep_the_order(monkeypatch):
    config = tiny_config("olmoe")
    model = streamed_model(random_tensors(config), config, dtype=torch.float32)
    monkeypatch.setattr("moedisco_ray.models.layer_stream.CPU_STATES", 100 * 16 * 4)
    groups = list(grouped([30, 30, 30, 30, 200, 1], lambda positions: positions, model))
    assert groups == [[30, 30, 30], [30], [200], [1]]


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_the_configuration_are_an_error(change, tmp_path):
    config = tiny_config("qwen3_moe")
    tensors = random_tensors(config)
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    if change == "shape":
        tensors[key] = tensors[key][:-1]
    else:
        del tensors[key]
        tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.zeros(8, 16)
    write_checkpoint(tmp_path, tensors.items(), config)
    with pytest.raises(CheckpointError, match="has shape" if change == "shape" else "is missing"):
        open_streamed(tmp_path, dtype=torch.float32)(TOKENS)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(max_examples=40, deadline=None)
@given(moe(), st.integers(500, 9000))
def test_a_layout_gives_the_bytes_of_the_librarys_own_writer(tmp_path_factory, case, limit):
    config, tensors, _ = case
    home = tmp_path_factory.mktemp("files")
    layout = {key: Stored(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    write_checkpoint(home / "held", tensors.items(), config, limit)
    write_checkpoint(home / "streamed", tensors.items(), config, limit, layout=layout)
    assert contents(home / "held") == contents(home / "streamed")
    check_same(open_checkpoint(home / "streamed"), tensors)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.lists(st.integers(0, 4), max_size=3)
        ),
        min_size=1,
        max_size=6,
    ).filter(lambda names: "__metadata__" not in names),
    st.randoms(use_true_random=False),
)
def test_a_file_of_any_dtypes_and_names_is_the_librarys(tmp_path_factory, named, random):
    home = tmp_path_factory.mktemp("file")
    tensors = {key: torch.randn(shape).to(dtype) for key, (dtype, shape) in named.items()}
    save_file(tensors, home / "library", metadata={"format": "pt"})
    order = list(tensors)
    random.shuffle(order)
    with ShardFile(home / "ours", {key: Stored(tuple(t.shape), t.dtype) for key, t in tensors.items()}) as file:
        for key in order:
            file.put(key, tensors[key])
        file.complete()
    assert (home / "ours").read_bytes() == (home / "library").read_bytes()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "twice"),
        ([("a", torch.ones(2))], "was not written"),
        ([("a", torch.ones(2)), ("b", torch.ones(3, dtype=torch.bfloat16)), ("c", torch.ones(1))], "not announced"),
        ([("c", torch.ones(1))], "not announced"),
        ([("a", torch.ones(3))], "was announced"),
        ([("a", torch.ones(2, dtype=torch.float16))], "was announced"),
    ],
)
def test_tensors_that_are_not_those_of_the_layout_are_an_error(tmp_path, written, message):
    layout = {"a": Stored((2,), torch.float32), "b": Stored((3,), torch.bfloat16)}
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path, written, {}, layout=layout)
    assert not (tmp_path / "config.json").exists()


def test_a_disk_that_fills_up_ends_the_stream(tmp_path, monkeypatch):
    asked, put = [], ShardFile.put

    def full(self, key, tensor):
        if key == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, key, tensor)

    def stream():
        for number in range(100):
            asked.append(number)
            yield str(number), torch.ones(250)

    monkeypatch.setattr(ShardFile, "put", full)
    monkeypatch.setattr(checkpoint_writer, "MOST_WAITING", 4_000)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(
            tmp_path, stream(), {}, layout={str(number): Stored((250,), torch.float32) for number in range(100)}
        )
    assert len(asked) == 6  # one is written, one fails, three wait, and the last one asked for the failure
    assert not (tmp_path / "config.json").exists()


def test_a_header_that_fits_only_in_part_is_an_error(tmp_path):
    # The disk has room for a part of the header, and again for everything when the tensors follow.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            ShardFile(tmp_path / "file", {"a": Stored((2,), torch.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_tensors_that_wait_to_be_written_are_limited(tmp_path, monkeypatch):
    made, most, put = [0], [], ShardFile.put
    written = [0]

    def slow(self, key, tensor):
        most.append(made[0] - written[0])
        put(self, key, tensor)
        written[0] += 1

    def stream():
        for number in range(50):
            made[0] += 1
            yield str(number), torch.full((250,), float(number))

    monkeypatch.setattr(ShardFile, "put", slow)
    monkeypatch.setattr(checkpoint_writer, "MOST_WAITING", 3_000)
    write_checkpoint(
        tmp_path, stream(), {}, layout={str(number): Stored((250,), torch.float32) for number in range(50)}
    )
    assert max(most) <= 4
    assert torch.equal(load_file(tmp_path / "model.safetensors")["49"], torch.full((250,), 49.0))


def test_a_dtype_that_model_files_do_not_have_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"has dtype torch\.int64"):
        ShardFile(tmp_path / "file", {"a": Stored((1,), torch.int64)})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_of_transformers_4_gives_the_same_rotation(family, tmp_path):
    """A published `config.json` names rope_theta and rope_scaling at its top."""
    config = tiny_config(family)
    rope = config.pop("rope_parameters")
    assert rope
    scaling = (
        {"type": "linear", "factor": 2.0}
        if DECLARATIONS[family].scalings is None
        else {
            "type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [4.0] * 4,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
            "original_max_position_embeddings": LENGTH,
        }
    )
    config |= {"rope_theta": 777.0, "rope_scaling": scaling}
    write_checkpoint(tmp_path, random_tensors(config).items(), config)
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
    memory = load_model(tmp_path).eval()
    values = streamed_model(open_checkpoint(tmp_path), config, dtype=torch.float32)
    for model in (values, open_streamed(tmp_path, dtype=torch.float32)):
        with torch.inference_mode():
            assert torch.equal(model(TOKENS).logits, memory(TOKENS).logits)
