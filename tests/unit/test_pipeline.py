"""The whole pipeline without Ray: starts that the Ray tests do not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_run import DOMAINS, OneCorpus, config_of, small_config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moedisco_ray.core.errors import CheckpointError, ConfigError, CorpusError, RunDirError
from moedisco_ray.core.records.events import EventLog
from moedisco_ray.core.records.report import build_report
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.models import differences, load_model, open_checkpoint, runnable
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.policies.sync_points import sync_steps
from moedisco_ray.stages import decompose
from moedisco_ray.stages.clustering import ClusterModel
from moedisco_ray.stages.merge.backbone import combine
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.training import TrainJob, World, train

FEW_TOKENS = {"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4}


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    torch_generator = torch.random.get_rng_state()
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=640,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    torch.random.set_rng_state(torch_generator)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run(tmp_path: Path, **changes: Any) -> Path:
    return pipeline.run(small_config(tmp_path / "runs", **{"tokens": FEW_TOKENS, **changes}), backend=OneCorpus())


def test_a_checkpoint_goes_through_in_groups_of_experts(tmp_path: Path, mixtral: Path) -> None:
    directory = run(
        tmp_path,
        model={"family": "mixtral", "config": None, "init": {"checkpoint": str(mixtral)}},
        clusters={"count": 2, "vectors": "hidden_state"},
        tokenizer={"replace": True},
        merge={"router": "ridge", "calibration_tokens": 1024},
    )
    assert "start" not in read_json(directory / "evaluation" / "evaluation.json"), "its tokens were other ones"
    assert not (directory / "decomposed" / "experts.json").exists(), "the merge makes the routers anew"
    held = [
        event.data["pool"]
        for event in EventLog.read(directory / "events.jsonl")
        if event.type == "workers_held" and event.stage == "cluster"
    ]
    assert held == ["low_memory"]
    clustered = read_manifest(directory / "clusters")
    assert clustered is not None
    assert list(clustered.summary["held"]) == ["low_memory"]
    submodel = read_json(directory / "submodels" / "0" / "config.json")
    assert (submodel["num_local_experts"], submodel["num_experts_per_tok"]) == (2, 2)
    finished = open_checkpoint(directory / "model")
    assert set(finished) == set(open_checkpoint(mixtral))
    index = json.loads(next((directory / "model").glob("config.json")).read_text(encoding="utf-8"))
    assert index["num_local_experts"] == 4
    assert AutoModelForCausalLM.from_pretrained(directory / "model").config.model_type == "mixtral"


def test_of_a_pretrained_moe_submodels_that_learn_nothing_become_the_start_again(tmp_path: Path, mixtral: Path) -> None:
    """Before: the routers were computed anew, and the loss of the start was lost.

    The sub-models have the experts that their clusters select, not those that are neighbours in the start.
    """
    still = {"optimizer": {"name": "adamw", "lr": 1e-30, "weight_decay": 0.0, "batch_tokens": 1024}}
    directory = run(
        tmp_path,
        model={"family": "mixtral", "config": None, "init": {"checkpoint": str(mixtral)}},
        clusters={"count": 4, "vectors": "mean_token"},
        tokenizer={"replace": True},
        tokens={"total": 8_000, "seed_share": 0.0, "finetune_share": 0.4},
        evaluation={"max_tokens": 500},
        submodels=still,
        finetune=still,
        merge={"router": None, "calibration_tokens": 1024},
    )
    start = dict(open_checkpoint(mixtral))
    for part in ("merged", "model"):
        assert differences(dict(open_checkpoint(directory / part)), start) == []
    use, cut = read_json(directory / "decomposed" / "experts.json"), read_manifest(directory / "decomposed")
    assert [sorted(layer["experts"]) for layer in use["layers"]] == [list(range(4))] * 2
    assert any(layer["experts"] != list(range(4)) for layer in use["layers"])
    assert cut is not None
    assert cut.summary["own_share"] > cut.summary["own_share_by_index"] > 0
    prefix = Encoder(directory / "corpus" / "tokenizer").prefix
    for k, losses in enumerate(cut.summary["losses"]):
        stream = TokenStream([directory / "clusters" / "shards" / str(k)], 64)
        places = np.linspace(0, len(stream) - 1, min(len(stream), 1024 // 64 // 4)).astype(int)
        ids_BL = torch.from_numpy(np.stack([stream.window(i)[:-1] for i in places]))
        inputs_BL = torch.cat([torch.full_like(ids_BL[:, :1], prefix), ids_BL[:, :-1]], dim=1)
        for name, part in (("start", mixtral), ("submodel", directory / "decomposed" / str(k))):
            logits_BLV = runnable(load_model(part))(inputs_BL).logits
            expected = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL.flatten())
            assert losses[name] == pytest.approx(expected.item(), abs=1e-4)
    assert len(cut.summary["losses"]) == 4
    assert build_report(directory, config_of(directory)).decompose.note is not None


def test_a_cut_that_loses_too_much_ends_the_run_before_any_training(
    tmp_path: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"bytes": [1, 1], "losses": [{"cluster": 1, "start": 3.0, "submodel": 3.2}]}
    monkeypatch.setattr(decompose, "write_measured_submodels", lambda *_, **__: found)
    with pytest.raises(ConfigError, match=r"submodels\.start_loss: 0\.05: sub-model 1 would begin .* 0\.200 above"):
        run(
            tmp_path,
            model={"family": "mixtral", "config": None, "init": {"checkpoint": str(mixtral)}},
            clusters={"count": 2, "vectors": "mean_token"},
            tokenizer={"replace": True},
        )
    assert not [path for path in tmp_path.rglob("manifest.json") if path.parent.name in ("decomposed", "submodels")]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        pytest.param(
            "qwen2_moe", {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}, marks=pytest.mark.slow
        ),
        pytest.param("olmoe", {"norm_topk_prob": False}, marks=pytest.mark.slow),
        (
            "deepseek_v2",
            {"fields": {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}},
        ),
    ],
)
def test_families_with_unnormalised_routers(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    architecture = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 32,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        **sizes,
    }
    directory = run(tmp_path, model={"family": family, "config": architecture})
    layers = read_json(directory / "merged" / "merge.json")["layers"]
    assert all(layer["scale"] > 1 for layer in layers)  # a softmax over two is below one: the experts make up for it
    stages = read_json(directory / "evaluation" / "evaluation.json")["stages"]
    assert stages["finetune"]["perplexity"] < 0.95 * stages["merge"]["perplexity"]


@pytest.mark.slow
def test_what_came_before_the_finished_model_is_measured_only_if_it_is_asked_for(tmp_path: Path) -> None:
    directory = run(tmp_path, evaluation={"stages": False})
    evaluation = read_json(directory / "evaluation" / "evaluation.json")
    assert evaluation["stages"].keys() == {"finetune"}
    assert evaluation["clusters"], "the finished model is still measured per cluster"
    stages = {stage["name"]: stage for stage in read_json(directory / "report.json")["stages"]}
    assert {name for name, stage in stages.items() if stage["perplexity"] is not None} == {"finetune"}


@pytest.fixture(scope="module")
def elaborate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with what the defaults leave out."""
    folder = tmp_path_factory.mktemp("elaborate")
    known = Path(str(DOMAINS["email"].__file__)).parent / "message.py"
    # New text comes first: a source is read from its beginning, and only as far as its share of the tokens.
    (folder / "mixed.py").write_text(
        "# A paragraph that no file of the corpus has.\n\n" + known.read_text(encoding="utf-8")
    )
    return run(
        folder,
        clusters={"count": 2, "vectors": "mean_token", "capacity": None},
        corpus={
            "sources": [
                {
                    "path": f"{Path(str(module.__file__)).parent}/*.py",
                    "name": name,
                    "documents": "paragraph",
                    "format": "text",
                    "weight": 2.0 if name == "asyncio" else 1.0,
                }
                for name, module in DOMAINS.items()
            ]
        },
        evaluation={
            "sources": [
                {
                    "path": str(Path(json.__file__).parent / "*.py"),
                    "name": "json",
                    "documents": "paragraph",
                    "format": "text",
                },
                {"path": str(folder / "mixed.py"), "documents": "paragraph"},
            ]
        },
    )


def test_text_that_was_never_trained_on_is_measured_beside_the_validation_text(elaborate: Path) -> None:
    evaluation = read_json(elaborate / "report.json")["evaluation"]
    unseen = evaluation["unseen"]
    assert [entry["source"] for entry in unseen["sources"]] == ["json", "unseen-1"]
    assert sum(entry["tokens"] for entry in unseen["sources"]) == unseen["tokens"] <= 8_000
    # Of a file of the corpus only what is held out, or stands in no other file, is left.
    assert unseen["trained_on"] > 10 * unseen["sources"][1]["documents"]
    assert unseen["bits_per_byte"] > 0
    assert "json, never trained on" in (elaborate / "model" / "README.md").read_text(encoding="utf-8")
    assert "lm_eval" not in evaluation


def table_of(directory: Path) -> Any:
    return pa.concat_tables([pq.read_table(path) for path in sorted(directory.glob("*.parquet"))])


def test_weights_and_no_balance(elaborate: Path) -> None:
    assigned = table_of(elaborate / "clusters" / "assignments")
    documents = table_of(elaborate / "corpus" / "train").slice(0, len(assigned))  # there is more text than is needed
    assert documents["id"].to_pylist() == assigned["id"].to_pylist()
    copies = documents["copies"].to_pylist()
    assert copies == [2 if source == "asyncio" else 1 for source in documents["source"].to_pylist()]
    assert set(copies) == {1, 2}
    tokens = [np.array(ids) for ids in documents["tokens"].to_pylist()]
    size_N = np.array([len(ids) + 1 for ids in tokens]) * np.array(copies)
    own_N = assigned["cluster"].to_numpy()
    report = read_json(elaborate / "clusters" / "report.json")
    own = [entry["tokens"] for entry in report["clusters"]]
    assert report["shard_tokens"] == own == [size_N[own_N == k].sum() for k in range(2)]
    # Every document is where it costs least, however full that is.
    model = ClusterModel.load(elaborate / "clusters" / "cluster_model")
    assert not model.prices_E.any()
    np.testing.assert_array_equal(own_N, model.assign(documents["text"].to_pylist(), tokens))
    assert max(own) > 1.05 * sum(own) / 2, "the clusters are as large by chance, so that nothing is tested"


def test_syncs_are_in_the_report_and_their_last_backbone_is_kept(tmp_path: Path) -> None:
    directory = run(tmp_path, submodels={"optimizer": {"batch_tokens": 256, "lr": 2e-3}, "sync_every": 14})
    submodels = read_manifest(directory / "submodels")
    assert submodels is not None
    steps = {unit["name"]: unit["steps"] for unit in submodels.summary["units"]}
    met = dict(zip(steps, sync_steps(list(steps.values()), 14), strict=True))
    assert [len(at) for at in met.values()] == [1, 1]
    [sync] = read_json(directory / "report.json")["syncs"]
    sent = sync.pop("bytes")
    assert sync == {"members": {name: 256 * at[0] for name, at in met.items()}, "late": []}
    assert sent.keys() == met.keys()
    assert len(set(sent.values())) == 1  # backbones of one size
    assert min(sent.values()) > 0
    start, common = (open_checkpoint(directory / part) for part in ("decomposed/0", "submodels/common"))
    parts = [open_checkpoint(directory / "submodels" / str(k)) for k in range(2)]
    assert any(not torch.equal(common[key], start[key]) for key in common)
    apart = set(parts[0]) - set(common)
    assert any("experts" in key for key in apart)
    assert not any(torch.equal(parts[0][key], start[key]) for key in apart if "experts" in key)
    assert not (directory / "checkpoints").exists()


@pytest.mark.slow
def test_after_syncs_the_merged_backbone_is_the_mean_of_the_sub_models(tmp_path: Path) -> None:
    directory = run(tmp_path, submodels={"sync_every": 3}, merge={"backbone": "uniform"})
    common = open_checkpoint(directory / "submodels" / "common")
    parts = [open_checkpoint(directory / "submodels" / str(k)) for k in range(2)]
    merged = open_checkpoint(directory / "merged")
    assert len(common) > 5
    for key in common:
        expected, _ = combine(key, [part[key] for part in parts], common[key], (0.5, 0.5))
        assert torch.equal(merged[key], expected)
        assert not torch.equal(merged[key], parts[0][key])


def test_another_familys_checkpoint_is_refused(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a model of family 'mixtral', but model.family is 'olmoe'"):
        run(tmp_path, model={"family": "olmoe", "config": None, "init": {"checkpoint": str(mixtral)}})
    assert not (tmp_path / "runs").exists()


def test_clusters_that_do_not_divide_a_checkpoints_experts_are_refused(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(ConfigError, match=r"clusters\.count"):
        run(
            tmp_path,
            model={"family": "mixtral", "config": None, "init": {"checkpoint": str(mixtral)}},
            clusters={"count": 3},
        )


def test_a_binary_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_bytes(bytes(range(256)) * 64)
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.path"):
        run(tmp_path, corpus={"sources": [{"path": str(tmp_path / "photo.txt")}]})


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab"):
        run(tmp_path, model={"config": {"num_experts": 2, "vocab_size": 400}})


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(RunDirError, match="is not empty and holds no run"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "runs" / "small").iterdir()] == ["thesis.txt"]


def trained_whole(directory: Path) -> Any:
    """The pipeline's input to a fine-tune of everything, trained again by the bare loop with the pipeline's steps."""
    config = config_of(directory)
    recipe = config.finetune.optimizer
    job = TrainJob(
        stage="finetune",
        name="again",
        model=directory / "merged",
        packed_dirs=(directory / "corpus" / "shards",),
        output=directory.parent / "again",
        checkpoints=directory.parent / "steps",
        steps=config.tokens.finetune // recipe.batch_tokens,
        sequence_length=config.corpus.sequence_length,
        optimizer=recipe,
        checkpoint_every=1000,
        load_balance=config.finetune.load_balance,
        z_loss=config.finetune.z_loss,
        seed=config.seed + 1 + config.clusters.count,
    )
    return train(job, World(), lambda _: None, lambda: False)


def test_joint_training_is_a_share_of_all(tmp_path: Path) -> None:
    directory = pipeline.run(
        small_config(
            tmp_path / "runs",
            tokens={"total": 12_000, "seed_share": 0.0, "finetune_share": 1.0},
            clusters={"count": 2, "vectors": "hidden_state"},
            evaluation={"every_tokens": 4096},
        ),
        backend=OneCorpus(),
    )
    report = read_json(directory / "report.json")
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (stages["submodels"]["tokens"], stages["seed"]["tokens"]) == (0, 0)
    assert report["bill"]["saving"] is None  # it is joint training itself
    assert report["clusters"] == {}
    assert report["evaluation"]["clusters"] == []
    assert [source["source"] for source in report["evaluation"]["sources"]] == ["asyncio", "email", "unittest"]
    assert "trained jointly, on high-memory workers" in (directory / "model" / "README.md").read_text(encoding="utf-8")
    assert report["held_out"]["finetune"]["tokens"] == [4096, 8192, 11_264]
    # The looks change no bit: the same loop without them ends at the same loss.
    assert trained_whole(directory).losses[-1] == read_manifest_units(directory)[0]["loss"]
    initial = open_checkpoint(directory / "merged")
    assert set(initial) == set(open_checkpoint(directory / "model"))
    assert not check_rows_equal(initial)


def read_manifest_units(directory: Path) -> Any:
    manifest = read_manifest(directory / "finetuned")
    assert manifest is not None
    return manifest.summary["units"]


def check_rows_equal(tensors: Any) -> bool:
    first, second = (tensors[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in (0, 1))
    return bool(torch.equal(first, second))


@pytest.mark.parametrize("normalised", [pytest.param(True, marks=pytest.mark.slow), False])
def test_upcycling_copies_the_seeds_expert_and_keeps_its_scale(tmp_path: Path, normalised: bool) -> None:
    directory = pipeline.run(
        small_config(
            tmp_path / "runs",
            tokens={"total": 12_000, "seed_share": 0.4, "finetune_share": 0.6},
            merge={"calibration_tokens": 1024},
            clusters={"count": 4},
            model={
                "config": {
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "moe_intermediate_size": 32,
                    "num_experts": 4,
                    "num_experts_per_tok": 2,
                    "norm_topk_prob": normalised,
                }
            },
            finetune={"pool": "low_memory"},
        ),
        backend=OneCorpus(),
    )
    upcycled = open_checkpoint(directory / "merged")
    assert check_rows_equal(upcycled)
    stages = read_json(directory / "evaluation" / "evaluation.json")["stages"]
    assert list(stages) == ["seed", "finetune"]
    report = read_json(directory / "report.json")
    whole = next(stage for stage in report["stages"] if stage["name"] == "finetune")
    assert (whole["pool"], whole["workers"], whole["tokens"]) == ("low_memory", 1, 7168)
    assert "It was upcycled" in (directory / "model" / "README.md").read_text(encoding="utf-8")
    # Before any training of its own the MoE says what the seed says: all experts are the same, at a weight of 1
    # together.
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        seed, whole_model = (
            AutoModelForCausalLM.from_pretrained(directory / part)(input_ids=tokens).logits
            for part in ("seed", "merged")
        )
    tolerance = 1e-5 if normalised else 0.05 * float(seed.abs().max())
    assert torch.allclose(seed, whole_model, atol=tolerance)


@pytest.mark.slow
def test_without_a_fine_tune_the_model_is_the_merged_one(tmp_path: Path) -> None:
    directory = pipeline.run(
        small_config(
            tmp_path / "runs",
            tokens={"total": 12_000, "seed_share": 0.0, "finetune_share": 0.0},
            export={"keep_apart": "always"},
        ),
        backend=OneCorpus(),
    )
    assert read_manifest_units(directory) == []
    merged, finished = (directory / part / "model.safetensors" for part in ("merged", "finetuned"))
    assert merged.read_bytes() == finished.read_bytes()
    evaluation = read_json(directory / "evaluation" / "evaluation.json")
    assert evaluation["ensemble"]["tokens"] == evaluation["tokens"]
    assert evaluation["ensemble"]["perplexity"] != evaluation["perplexity"]
    assert read_json(directory / "report.json")["bill"]["baseline"] is None


@pytest.mark.parametrize("choice", ["always", "never"])
def test_keeping_nothing_apart_is_refused(tmp_path: Path, choice: str) -> None:
    with pytest.raises(ConfigError, match=rf"export\.keep_apart: '{choice}' needs sub-models"):
        small_config(tmp_path, tokens={"seed_share": 0.0, "finetune_share": 1.0}, export={"keep_apart": choice})
