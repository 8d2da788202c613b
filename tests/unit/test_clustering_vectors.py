"""Document vectors and the fitted cluster model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from clustering_corpus import WORDS, ids_of, write_model
from moe_models import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moedisco_ray.core.errors import CheckpointError, CorpusError
from moedisco_ray.models import layer_stream, skeleton, streamed
from moedisco_ray.stages.clustering import ClusterModel
from moedisco_ray.stages.clustering.vectors import load_vectoriser
from moedisco_ray.stages.clustering.vectors.hidden_state import HiddenState
from moedisco_ray.stages.clustering.vectors.mean_token import MeanToken
from moedisco_ray.stages.clustering.vectors.tfidf import TfidfSvd


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, n)) for words in WORDS.values() for n in (3, 9, 5, 40, 9, 1, 8, 7)]
    return texts, [np.array(ids_of(text.split()), np.int32) for text in texts]


def make(kind, model_dir, documents):
    texts, tokens = documents
    if kind == "mean_token":
        return MeanToken.of_model(model_dir)
    if kind == "tfidf_svd":
        return TfidfSvd.of_texts(texts, 6, 0)
    vectoriser = HiddenState(model_dir, 16)
    vectoriser.centre(vectoriser.embed(texts, tokens))
    return vectoriser


KINDS = ["mean_token", "tfidf_svd", "hidden_state"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_gives_the_same_bits(kind, model_dir, documents, tmp_path):
    vectoriser = make(kind, model_dir, documents)
    vectoriser.save(tmp_path)
    loaded = load_vectoriser(tmp_path)
    x_ND = vectoriser.transform(*documents)
    assert x_ND.dtype == np.float32
    np.testing.assert_array_equal(loaded.transform(*documents), x_ND)
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_its_company(kind, model_dir, documents):
    vectoriser = make(kind, model_dir, documents)
    texts, tokens = documents
    together_ND = vectoriser.transform(texts, tokens)
    for i in (0, 3, 5, 11):
        np.testing.assert_array_equal(vectoriser.transform(texts[i : i + 1], tokens[i : i + 1])[0], together_ND[i])


def test_mean_token_is_the_mean_of_the_embeddings(model_dir, documents):
    table_VD = AutoModelForCausalLM.from_pretrained(model_dir).get_input_embeddings().weight.detach()
    tokens = [*documents[1], np.empty(0, np.int32)]
    x_ND = MeanToken.of_model(model_dir).transform([""] * len(tokens), tokens)
    for x_D, ids in zip(x_ND[:-1], tokens[:-1], strict=True):
        np.testing.assert_allclose(x_D, table_VD[torch.from_numpy(ids).long()].mean(dim=0).numpy(), atol=1e-6)
    assert not x_ND[-1].any()


def test_mean_token_reads_a_sharded_checkpoint_and_refuses_one_without_embedding(model_dir, documents, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    shutil.copy(model_dir / "config.json", tmp_path)
    table = tensors.pop("model.embed_tokens.weight")
    for name, part in (("a", {"model.embed_tokens.weight": table}), ("b", tensors)):
        save_file(part, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    places = {"model.embed_tokens.weight": "a.safetensors", **dict.fromkeys(tensors, "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    expected = MeanToken.of_model(model_dir).transform(*documents)
    np.testing.assert_array_equal(MeanToken.of_model(tmp_path).transform(*documents), expected)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "b.safetensors")})
    )
    with pytest.raises(CheckpointError, match="embed_tokens"):
        MeanToken.of_model(tmp_path)


def test_mean_token_reads_the_text_part_of_a_composite_model(tmp_path):
    model = AutoModelForCausalLM.from_config(skeleton(tiny_config("qwen3_5_moe_text")).config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    composite = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in stored.items()}
    save_file(composite, tmp_path / "model.safetensors", metadata={"format": "pt"})
    table_VD = model.get_input_embeddings().weight.detach().numpy()
    found = MeanToken.of_model(tmp_path).transform([""], [np.array([3, 5], np.int32)])
    np.testing.assert_allclose(found[0], table_VD[[3, 5]].mean(0), atol=1e-6)


def test_hidden_state_is_the_mean_last_hidden_state_of_the_first_tokens(model_dir, documents):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    vectoriser = HiddenState(model_dir, 16)
    raw_ND = vectoriser.embed(*documents)
    for x_D, ids in zip(raw_ND, documents[1], strict=True):
        with torch.no_grad():
            states = model(torch.from_numpy(ids[:16]).long()[None], output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(x_D, states.mean(dim=0).numpy(), atol=1e-5)
    vectoriser.centre(raw_ND)
    centred_ND = raw_ND - raw_ND.mean(axis=0)
    np.testing.assert_allclose(
        vectoriser.transform(*documents), centred_ND / np.linalg.norm(centred_ND, axis=1, keepdims=True), atol=1e-5
    )


def test_hidden_states_of_a_model_that_does_not_stay_in_memory_are_the_same(model_dir, documents, monkeypatch):
    texts, tokens = documents
    expected = HiddenState(model_dir, 16).embed(texts, tokens)
    monkeypatch.setattr(streamed, "RESIDENT_BYTES", 0)
    for states in (1, 2**30):
        monkeypatch.setattr(layer_stream, "CPU_STATES", states)
        np.testing.assert_array_equal(HiddenState(model_dir, 16).embed(texts, tokens), expected)


def test_batches_of_hidden_states_differ_by_rounding_alone(model_dir, documents):
    alone, batched = HiddenState(model_dir, 16), HiddenState(model_dir, 16)
    batched._batch_tokens = 64  # what a GPU does
    texts, tokens = [*documents[0], ""], [*documents[1], np.empty(0, np.int32)]
    np.testing.assert_allclose(batched.embed(texts, tokens), alone.embed(texts, tokens), atol=1e-5)


def test_tfidf_vectors_have_unit_length_and_tell_topics_apart(documents):
    x_ND = TfidfSvd.of_texts(documents[0], 6, 0).transform([*documents[0], "unheard of"], [])
    np.testing.assert_allclose(np.linalg.norm(x_ND[:-1], axis=1), 1, atol=1e-5)
    assert not x_ND[-1].any()
    cosine_NN = x_ND[:-1] @ x_ND[:-1].T
    same_NN = np.repeat(np.arange(3), 8)[:, None] == np.repeat(np.arange(3), 8)
    assert cosine_NN[same_NN].mean() > cosine_NN[~same_NN].mean() + 0.3


def test_tfidf_needs_words():
    with pytest.raises(CorpusError, match="no words"):
        TfidfSvd.of_texts(["!", "?"], 4, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_cluster_model_assigns_equally(kind, model_dir, documents, tmp_path):
    vectoriser = make(kind, model_dir, documents)
    centroids_ED = vectoriser.transform(*documents)[[0, 9, 20]].astype(np.float64)
    fitted = ClusterModel(vectoriser, centroids_ED, np.array([0.0, 5.0, 10.0]))
    fitted.save(tmp_path / "cluster_model")
    loaded = ClusterModel.load(tmp_path / "cluster_model")
    np.testing.assert_array_equal(loaded.assign(*documents), fitted.assign(*documents))
    assert loaded.assign(*documents)[[0, 9, 20]].tolist() == [0, 1, 2]
    assert not loaded.assign(*documents, balanced=True).any()


def test_an_unknown_kind_is_named(tmp_path):
    (tmp_path / "vectoriser.json").write_text('{"kind": "word2vec"}')
    with pytest.raises(CheckpointError, match="word2vec"):
        load_vectoriser(tmp_path)


def test_holding_vectors_needs_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'ray'}"
    code = f"import sys, moedisco_ray.stages.clustering.store; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
