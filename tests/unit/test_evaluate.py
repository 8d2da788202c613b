import dataclasses
import hashlib
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_steps import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import model_map, random_tensors, tiny_config
from sklearn.metrics import normalized_mutual_info_score
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from moedisco_ray.core.config import FAMILIES, Architecture
from moedisco_ray.core.errors import CorpusError, RunError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import Role, hf_config, layer_stream, save_model, streamed
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.evaluate.ensemble import ensemble_nats, log_weights
from moedisco_ray.stages.evaluate.measure import (
    evaluate,
    evaluate_ensemble,
    evaluate_stages,
    evaluate_unseen,
    xz_bits_per_byte,
)
from moedisco_ray.stages.routers import (
    RouterMeter,
    dead_experts,
    entropy,
    expert_load,
    expert_similarity,
    normalized_mutual_information,
)
from moedisco_ray.stages.scoring import Score, document_nats, perplexity, plan_batches, predict_tokens, token_nats
from moedisco_ray.stages.text.validation import load_documents

EOS, VOCAB, LENGTH, EXPERTS = 0, 64, 16, 4
LENGTHS = (5, 16, 1, 40, 17, 33, 3, 12, 29, 8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(family, seed=0, **changes):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "moe_intermediate_size": 16,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        **changes,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(hf_config(family, Architecture(**sizes), VOCAB, 64, EOS))


def write_documents(path, lengths=LENGTHS, sources=("code", "prose"), seed=0):
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    rows = []
    for i, length in enumerate(lengths):
        text = f"täxt {i} " + "x" * length
        rows.append(
            {
                "id": hashlib.blake2b(text.encode(), digest_size=16).digest(),
                "source": sources[i % len(sources)],
                "text": text,
                "tokens": rng.integers(1, VOCAB, length).tolist(),
                "copies": 1,
            }
        )
    rows.sort(key=lambda row: row["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        {
            "id": pa.binary(16),
            "source": pa.string(),
            "text": pa.string(),
            "tokens": pa.list_(pa.int32()),
            "copies": pa.int32(),
            "loss_mask": pa.list_(pa.bool_()),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return rows


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "part-00000.parquet"
    write_documents(path)
    return load_documents([path], 10**6)


def naive_nats(model, tokens):
    """One document, one window at a time, by transformers' own loss."""
    stream = torch.tensor([EOS, *tokens])
    total = 0.0
    for start in range(0, len(tokens), LENGTH):
        window = stream[start : start + LENGTH + 1][None]
        total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_nats_are_those_of_transformers_own_loss(family, documents):
    model = tiny_model(family).eval()
    nats = document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH, batch_tokens=64)
    with torch.no_grad():
        expected = [naive_nats(model, tokens.tolist()) for tokens in documents.tokens]
    assert nats == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 100


def test_score_sums_documents_and_leaves_the_model_as_it_was(documents):
    model = tiny_model("qwen3_moe").train()
    score = perplexity(model, documents, prefix=EOS, sequence_length=LENGTH)
    nats = document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH)
    assert model.training
    assert score.nats == pytest.approx(nats.sum())
    assert score.tokens == sum(LENGTHS)
    assert score.bytes == sum(len(text.encode()) for text in documents.texts)
    assert score.perplexity == pytest.approx(math.exp(nats.sum() / sum(LENGTHS)))


def test_bits_per_byte_by_hand():
    # Four tokens at one bit each, over "é" and two ASCII letters: four bytes.
    score = Score(nats=4 * math.log(2), tokens=4, bytes=len("éab".encode()), documents=1)
    assert score.bits_per_byte == pytest.approx(1.0)
    assert score.perplexity == pytest.approx(2.0)


def test_nothing_scores_none():
    assert Score().to_dict() == {
        "loss": None,
        "perplexity": None,
        "bits_per_byte": None,
        "tokens": 0,
        "bytes": 0,
        "documents": 0,
    }


@pytest.mark.parametrize("batch_tokens", [1, 37, 200, 10**6])
def test_batch_size_changes_nothing(documents, batch_tokens):
    model = tiny_model("mixtral")
    reference = document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH, batch_tokens=64)
    nats = document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH, batch_tokens=batch_tokens)
    assert nats == pytest.approx(reference, rel=1e-6)


def test_the_head_in_pieces_gives_the_same(documents, monkeypatch):
    model = tiny_model("mixtral")
    whole = document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH)
    monkeypatch.setattr("moedisco_ray.stages.scoring.MOST_LOGITS", 3 * VOCAB)
    assert document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH) == pytest.approx(whole, rel=1e-6)


def test_xz_needs_few_bits_for_text_that_repeats_itself(documents):
    repeated = dataclasses.replace(documents, texts=("the same words over and over again " * 500,))
    noise = "".join(map(chr, np.random.Generator(np.random.Philox(key=3)).integers(32, 127, 20_000)))
    assert xz_bits_per_byte(repeated) < 0.2
    assert 6 < xz_bits_per_byte(dataclasses.replace(documents, texts=(noise,))) < 8.1


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_an_expert_are_told_from_experts_of_their_own(family):
    config = tiny_config(family, EXPERTS, hidden_size=64)
    names, own = model_map(config), random_tensors(config, seed=2)
    copies = {}
    for key, tensor in own.items():
        role = names.classify(key)
        if role.role is Role.EXPERT and role.expert is not None:
            copies[key] = own[names.renumbered(key, role.expert % 2)]
        elif role.role is Role.EXPERT:
            copies[key] = tensor.index_select(role.expert_axis, torch.arange(EXPERTS) % 2)
        else:
            copies[key] = tensor
    apart, alike = expert_similarity(own, names), expert_similarity(copies, names)
    assert apart.keys() == alike.keys() != set()
    assert max(apart.values()) < 0.3
    assert list(alike.values()) == pytest.approx([1.0] * len(alike))


class FreshTensors(dict[str, torch.Tensor]):
    """Tensors that are read from a file each time."""

    def __getitem__(self, key):
        return super().__getitem__(key).clone()


def test_experts_are_compared_one_layer_after_the_other():
    """Before: parts of all layers were in memory together, 300 MB for a model of 48 layers with 128 experts."""
    peaks = []
    for layers in (2, 6):
        config = tiny_config("qwen3_moe", EXPERTS, hidden_size=64, num_hidden_layers=layers)
        tensors = FreshTensors(random_tensors(config, seed=2))
        with LiveBytes() as live:
            assert len(expert_similarity(tensors, model_map(config))) == layers
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=20), st.integers(1, 20), st.integers(1, 100))
def test_windows_cover_every_token_once(lengths, sequence_length, batch_tokens):
    seen = []
    for windows in plan_batches(np.array(lengths, dtype=np.int64), sequence_length, batch_tokens):
        assert len(windows) == 1 or len(windows) * windows[:, 2].max() <= batch_tokens
        assert (windows[:, 1] % sequence_length == 0).all()
        seen += [(int(d), int(s) + i) for d, s, n in windows for i in range(n)]
    assert sorted(seen) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]


def test_the_likeliest_tokens_are_those_of_the_logits(documents):
    model = tiny_model("qwen3_moe").eval()
    predicted = predict_tokens(model, documents.tokens, prefix=EOS, sequence_length=LENGTH, batch_tokens=64)
    hits = 0
    for tokens, (_, likeliest) in zip(documents.tokens, predicted, strict=True):
        stream = torch.tensor([EOS, *tokens.tolist()])
        expected = []
        for start in range(0, len(tokens), LENGTH):
            window = stream[start : start + LENGTH + 1]
            with torch.no_grad():
                expected += (model(input_ids=window[None, :-1]).logits[0].argmax(-1) == window[1:]).tolist()
        assert likeliest.tolist() == expected
        hits += sum(expected)
    assert hits


def test_unseen_text_is_measured_per_source_and_together(tmp_path, documents):
    model = tiny_model("olmoe")
    save_model(model, tmp_path)
    found = evaluate_unseen(open_streamed(tmp_path, dtype=torch.float32), documents, prefix=EOS, sequence_length=LENGTH)
    assert found["bits_per_byte"] == pytest.approx(
        perplexity(model, documents, prefix=EOS, sequence_length=LENGTH).bits_per_byte, rel=1e-6
    )
    assert [entry["source"] for entry in found["sources"]] == list(dict.fromkeys(documents.sources))
    for entry in found["sources"]:
        alone = documents.where(np.array(documents.sources) == entry["source"])
        assert entry["perplexity"] == pytest.approx(
            perplexity(model, alone, prefix=EOS, sequence_length=LENGTH).perplexity, rel=1e-6
        )


def test_a_broken_model_is_an_error(documents):
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        perplexity(model, documents, prefix=EOS, sequence_length=LENGTH)


def test_documents_come_in_order_of_id_up_to_the_limit(tmp_path):
    rows = write_documents(tmp_path / "part-00000.parquet")
    table = pq.read_table(tmp_path / "part-00000.parquet")
    parts = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table.slice(0, 4), parts[0])
    pq.write_table(table.slice(4), parts[1])
    everything = load_documents(parts, 10**6)
    assert list(everything.ids) == [row["id"] for row in rows]
    assert [tokens.tolist() for tokens in everything.tokens] == [row["tokens"] for row in rows]
    assert everything.sources[3] == rows[3]["source"]
    lengths = [len(row["tokens"]) for row in rows]
    assert len(load_documents(parts, sum(lengths[:6]))) == 6
    assert len(load_documents(parts, sum(lengths[:6]) - 1)) == 5
    assert len(load_documents(parts, 1)) == 1


def test_a_digest_is_of_tokens_and_masks_whatever_their_source_is_called(tmp_path):
    write_documents(tmp_path / "part.parquet")
    documents = load_documents([tmp_path / "part.parquet"], 10**6)
    named = dataclasses.replace(documents, sources=tuple("renamed" for _ in documents.sources))
    assert named.digest() == documents.digest()
    first, *rest = documents.tokens
    masks = (np.arange(len(first)) > 0, *documents.loss_masks[1:])
    changed = [
        dataclasses.replace(documents, tokens=(first + 1, *rest)),
        dataclasses.replace(documents, loss_masks=masks),
        documents.where(np.arange(len(documents)) > 0),
    ]
    assert len({documents.digest(), *(each.digest() for each in changed)}) == 4


def test_no_document_is_the_users_error(tmp_path):
    write_documents(tmp_path / "part.parquet", lengths=())
    with pytest.raises(CorpusError, match="validation_fraction"):
        load_documents([tmp_path / "part.parquet"], 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_counts_are_those_of_the_routers_logits(family, documents):
    model, kind = tiny_model(family).eval(), DECLARATIONS[family].router.scores
    group = np.arange(len(documents)) % 3
    with RouterMeter(model, group, 3) as meter:
        document_nats(
            model, documents.tokens, prefix=EOS, sequence_length=LENGTH, batch_tokens=50, observe=meter.observe
        )
    found = meter.statistics()
    selections, first = np.zeros((2, 3, EXPERTS)), np.zeros((2, 3, EXPERTS))
    by_document = np.zeros((2, len(documents), EXPERTS))
    entropies = [[], []]
    for number, tokens in enumerate(documents.tokens):
        stream = [EOS, *tokens.tolist()[:-1]]
        for start in range(0, len(stream), LENGTH):
            window = torch.tensor(stream[start : start + LENGTH])[None]
            with torch.no_grad():
                logits = model(input_ids=window, output_router_logits=True).router_logits
            for layer, layer_logits in enumerate(logits):
                probabilities = (
                    normalize(layer_logits.sigmoid(), p=1, dim=-1) if kind == "sigmoid" else layer_logits.softmax(-1)
                )
                for row in probabilities.topk(2).indices:
                    selections[layer, group[number], row] += 1
                    first[layer, group[number], row[0]] += 1
                    by_document[layer, number, row[0]] += 1
                entropies[layer] += torch.special.entr(probabilities).sum(-1).tolist()
    assert found.layers == (0, 1)
    np.testing.assert_array_equal(found.selections_RGE, selections)
    np.testing.assert_array_equal(found.top1_RGE, first)
    np.testing.assert_array_equal(found.document_top1_RNE, by_document)
    assert found.token_entropy_R == pytest.approx([np.mean(e) for e in entropies], rel=1e-5)
    document_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH)
    np.testing.assert_array_equal(meter.statistics().selections_RGE, selections)  # nobody counts any more


def test_a_model_without_routers_is_refused():
    config = tiny_model("qwen3_moe").config
    config.mlp_only_layers = [0, 1]
    with pytest.raises(RunError, match="has no router"):
        RouterMeter(AutoModelForCausalLM.from_config(config), np.zeros(1, dtype=np.int64), 1)


def test_entropy_has_its_bounds():
    assert entropy(np.array([0.0, 1.0, 0.0])) == 0.0
    assert entropy(np.full(8, 1 / 8)) == pytest.approx(math.log(8))


def test_load_of_nothing_is_zero():
    np.testing.assert_array_equal(expert_load(np.array([[3, 1], [0, 0]])), [[0.75, 0.25], [0.0, 0.0]])


def test_an_expert_is_dead_under_a_hundredth_of_an_even_share():
    assert dead_experts(np.array([0.5, 0.4975, 0.0025, 0.0])) == 1
    assert dead_experts(np.array([0.5, 0.4976, 0.0024, 0.0])) == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=60))
def test_nmi_is_that_of_scikit_learn(pairs):
    a, b = np.array(pairs).T
    table = np.bincount(a * 5 + b, minlength=20).reshape(4, 5)
    assert normalized_mutual_information(table) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-9)


def test_evaluation_of_one_model(tmp_path, documents):
    model = tiny_model("qwen2_moe")
    save_model(model, tmp_path / "model")
    labels = np.arange(len(documents)) % 3 + 1
    found = evaluate(tmp_path / "model", documents, labels, prefix=EOS, sequence_length=LENGTH)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    overall = perplexity(model, documents, prefix=EOS, sequence_length=LENGTH)
    assert found["perplexity"] == pytest.approx(overall.perplexity, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(overall.bits_per_byte, rel=1e-6)
    for part, key, name, mask in (
        ("clusters", "cluster", 2, labels == 2),
        ("sources", "source", "prose", np.array(documents.sources) == "prose"),
    ):
        alone = perplexity(model, documents.where(mask), prefix=EOS, sequence_length=LENGTH)
        entry = next(entry for entry in found[part] if entry[key] == name)
        assert entry["perplexity"] == pytest.approx(alone.perplexity, rel=1e-6)
        assert sum(entry["tokens"] for entry in found[part]) == sum(LENGTHS)
    assert [entry["cluster"] for entry in found["clusters"]] == [1, 2, 3]
    for router in found["routers"]:
        assert sum(router["load"]) == pytest.approx(1.0)
        assert 0 < router["token_entropy"] <= math.log(EXPERTS)
        assert 0 < router["load_entropy"] <= math.log(EXPERTS) + 1e-12
    assert np.sum(found["load_by_cluster"], axis=1) == pytest.approx([1.0] * 3)
    assert sum(found["load_by_source"]["code"]) == pytest.approx(1.0)
    assert 0 <= found["specialisation"]["source"] <= 1


def test_a_router_that_knows_the_source_is_seen(tmp_path):
    # The router reads the token itself, and each source has tokens of its own: specialisation is complete.
    model = tiny_model("qwen3_moe", num_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[0, 0], layer.mlp.gate.weight[1, 0] = 5.0, -5.0
        model.model.embed_tokens.weight[:, 0] = torch.where(torch.arange(VOCAB) < 32, 3.0, -3.0)
    save_model(model, tmp_path / "model")
    path = tmp_path / "part.parquet"
    rows = write_documents(path)
    for row in rows:
        low = row["source"] == "code"
        row["tokens"] = [token % 31 + (1 if low else 33) for token in [1, 2, *row["tokens"]]]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    documents = load_documents([path], 10**6)
    found = evaluate(tmp_path / "model", documents, None, prefix=EOS, sequence_length=LENGTH)
    assert found["specialisation"] == {"cluster": None, "source": pytest.approx(1.0)}
    assert found["routers"][0]["nmi_source"] > 0.5
    assert found["load_by_source"]["code"][0] == 1.0
    assert [router["dead"] for router in found["routers"]] == [0, 0]
    assert found["clusters"] == []
    assert found["load_by_cluster"] == []


@pytest.mark.parametrize(
    ("sources", "reported"),
    [(("source-0",), []), (("source-0", "source-1"), ["source-0", "source-1"]), (("wiki",), ["wiki"])],
)
def test_sources_are_reported_where_they_say_something(tmp_path, sources, reported):
    save_model(tiny_model("olmoe"), tmp_path / "model")
    write_documents(tmp_path / "part.parquet", sources=sources)
    found = evaluate(
        tmp_path / "model", load_documents([tmp_path / "part.parquet"], 200), prefix=EOS, sequence_length=LENGTH
    )
    assert [entry["source"] for entry in found["sources"]] == reported


@pytest.mark.parametrize("states", [1, 2**30])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_does_not_stay_in_memory_gives_the_same_figures(family, states, tmp_path, documents, monkeypatch):
    save_model(tiny_model(family), tmp_path)
    labels = np.arange(len(documents)) % 3
    settings = {"prefix": EOS, "sequence_length": LENGTH, "batch_tokens": 50}
    counts = []
    expected = evaluate(tmp_path, documents, labels, **settings)
    monkeypatch.setattr(streamed, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(layer_stream, "CPU_STATES", states)  # 1: every batch is a group of its own
    assert evaluate(tmp_path, documents, labels, **settings, advance=counts.append) == expected
    assert sum(counts) == sum(map(len, documents.tokens))


def test_a_run_measures_every_model_and_submodels_on_their_own_cluster(tmp_path, documents):
    models = {name: tiny_model("mixtral", seed) for seed, name in enumerate(("merged", "finetuned"))}
    parts = [tiny_model("mixtral", 10 + k, num_experts=1, num_experts_per_tok=1) for k in range(3)]
    for name, model in models.items():
        save_model(model, tmp_path / name)
    for k, model in enumerate(parts):
        save_model(model, tmp_path / "submodels" / str(k))
    labels = np.array([0, 1] * 5)  # no validation document is in cluster 2
    found = evaluate_stages(
        {"merge": tmp_path / "merged", "finetune": tmp_path / "finetuned"},
        [tmp_path / "submodels" / str(k) for k in range(3)],
        documents,
        labels,
        prefix=EOS,
        sequence_length=LENGTH,
    )
    assert list(found["stages"]) == ["merge", "submodels", "finetune"]
    assert found["stages"]["finetune"]["perplexity"] == found["perplexity"]
    expected = [perplexity(parts[k], documents.where(labels == k), prefix=EOS, sequence_length=LENGTH) for k in (0, 1)]
    units = found["stages"]["submodels"]["units"]
    assert [unit["perplexity"] for unit in units[:2]] == pytest.approx([e.perplexity for e in expected], rel=1e-5)
    assert units[2]["perplexity"] is None
    total = sum(expected, Score())
    assert found["stages"]["submodels"]["perplexity"] == pytest.approx(total.perplexity, rel=1e-5)
    assert found["stages"]["submodels"]["tokens"] == sum(LENGTHS)


def mixed_directly(models, documents, distance_of, block):
    """Token by token, from the models' probabilities and weights that know only what came before the token's block."""

    def weights(known):
        if not len(known):
            return np.full(3, 1 / 3)
        d_C = distance_of[known.tobytes()]
        w_C = np.exp(-d_C / 0.1)
        return w_C / w_C.sum()

    total = 0.0
    for tokens in documents.tokens:
        stream = torch.tensor([EOS, *tokens.tolist()])
        for start in range(0, len(tokens), LENGTH):
            window = stream[start : start + LENGTH + 1]
            with torch.no_grad():
                p_CLV = torch.stack(
                    [model(input_ids=window[None, :-1]).logits[0].softmax(-1) for model in models]
                ).double()
            for i, token in enumerate(window[1:]):
                w_C = torch.tensor(weights(tokens[: (start + i) // block * block]))
                total -= math.log(float((w_C * p_CLV[:, i, token]).sum()))
    return total


def test_the_ensemble_is_the_mixture_of_its_models_probabilities(tmp_path, documents):
    models = [tiny_model("mixtral", 20 + k, num_experts=1, num_experts_per_tok=1).eval() for k in range(3)]
    for k, model in enumerate(models):
        save_model(model, tmp_path / str(k))
    rng = np.random.default_rng(0)
    distance_of = {}

    def distances(contexts):
        for context in contexts:
            distance_of.setdefault(context.tobytes(), rng.uniform(0, 0.4, 3))
        return np.array([distance_of[context.tobytes()] for context in contexts])

    for block in (8, 16, 1000):
        nats = ensemble_nats(
            documents,
            (token_nats(model, documents.tokens, prefix=EOS, sequence_length=LENGTH) for model in models),
            distances,
            block=block,
        )
        assert nats.sum() == pytest.approx(mixed_directly(models, documents, distance_of, block), rel=1e-5)
    found = evaluate_ensemble(
        [tmp_path / str(k) for k in range(3)], documents, None, distances, prefix=EOS, sequence_length=LENGTH
    )
    directly = mixed_directly(models, documents, distance_of, 64)
    assert found["loss"] * sum(LENGTHS) == pytest.approx(directly, rel=1e-5)


def test_one_near_cluster_gets_all_the_weight():
    weights = np.exp(log_weights(np.array([[0.0, 1.0, 1.0], [0.2, 0.2, 0.2]])))
    assert weights[0] == pytest.approx([1 / (1 + 2 * math.exp(-10)), *[math.exp(-10) / (1 + 2 * math.exp(-10))] * 2])
    assert weights[1] == pytest.approx([1 / 3] * 3)


def test_a_second_smaller_try_measures_the_same_up_to_rounding(documents, tmp_path):
    save_model(tiny_model("qwen3_moe"), tmp_path / "model")
    settings = {"prefix": EOS, "sequence_length": LENGTH}
    usual = evaluate(tmp_path / "model", documents, **settings)
    smaller = evaluate(tmp_path / "model", documents, **settings, batch_tokens=LENGTH, resident=False)
    assert smaller["perplexity"] == pytest.approx(usual["perplexity"], rel=1e-6)
    assert smaller["tokens"] == usual["tokens"]
