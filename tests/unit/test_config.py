import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from moedisco_ray.core.config import FAMILIES, RunConfig, check_config, load_config
from moedisco_ray.core.config.presets import PresetName, preset_text
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.errors import ConfigError, UserError
from moedisco_ray.core.stages import fingerprints
from moedisco_ray.plan import build_plan

BASE = "name: x\ncorpus: {sources: [{path: embedded}]}\n"


def load(tmp_path, text=BASE, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("name", get_args(PresetName))
def test_every_shipped_file_loads_and_fits_its_pools(tmp_path, name):
    config = load(tmp_path, preset_text(name))
    assert build_plan(config).fits


@pytest.mark.parametrize("name", get_args(PresetName))
def test_every_shipped_file_shows_every_section(name):
    assert set(yaml.safe_load(preset_text(name))) == set(RunConfig.model_fields)


def test_no_preset_file_is_missing_from_the_list():
    import moedisco_ray.core.config  # noqa: PLC0415  # only to find its folder

    folder = Path(moedisco_ray.core.config.__file__).parent / "presets"
    assert {path.stem for path in folder.glob("*.yaml")} == set(get_args(PresetName))


def test_the_paper_preset_is_the_paper(tmp_path):
    config = load(tmp_path, preset_text("paper"))
    assert config.tokens.seed == 0
    assert (config.clusters.vectors, config.clusters.capacity) == ("mean_token", None)
    assert config.merge.backbone == "token_weighted"
    assert (config.merge.router, config.merge.from_data(from_moe=True)) == ("random", False)
    assert config.submodels.sync_every is None
    submodels, finetune = config.submodels.optimizer, config.finetune.optimizer
    assert (submodels.lr, submodels.schedule, submodels.warmup, submodels.batch_tokens) == (
        1e-4,
        "constant",
        0,
        16 * 1024,
    )
    assert (finetune.lr, finetune.schedule, finetune.warmup, finetune.weight_decay) == (3e-4, "cosine", 0.03, 0.01)
    assert (finetune.batch_tokens, config.corpus.sequence_length) == (16 * 1024, 1024)
    assert (config.finetune.load_balance, config.finetune.z_loss) == (0, 0)


@pytest.mark.parametrize(
    ("override", "reads"),
    [
        ("tokens.total=5000000", lambda c: c.tokens.total == 5_000_000),
        ("tokens.total=5_000_000", lambda c: c.tokens.total == 5_000_000),
        ("clusters.capacity=null", lambda c: c.clusters.capacity is None),
        ("submodels.optimizer.lr=3e-4", lambda c: c.submodels.optimizer.lr == 3e-4),
        ("submodels.optimizer={lr: 0.5}", lambda c: c.submodels.optimizer.lr == 0.5),
        ("corpus.sources.0.weight=0.5", lambda c: c.corpus.sources[0].weight == 0.5),
        ("tags.team=a=b", lambda c: c.tags == {"team": "a=b"}),
        ("evaluation.prompts=[x, y]", lambda c: c.evaluation.prompts == ("x", "y")),
        ("checkpoint.storage=s3://bucket/x?scheme=http", lambda c: c.checkpoint.storage == "s3://bucket/x?scheme=http"),
        ("checkpoint.storage=gs://bucket", lambda c: c.checkpoint.storage == "gs://bucket"),
        ("model.config.hidden_size=64", lambda c: c.model.architecture.hidden_size == 64),
    ],
)
def test_overrides(tmp_path, override, reads):
    assert reads(load(tmp_path, BASE, override))


def test_the_last_override_wins(tmp_path):
    assert load(tmp_path, BASE, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        (BASE + "tokns: {}\n", (), "tokns: no such setting; did you mean 'tokens'?"),
        (BASE, ("tokens.totl=1",), "tokens.totl: no such setting; did you mean 'total'?"),
        # Before: `remove it`, and `did you mean 'max_tokens'?`.
        (BASE, ("clusters.method=random",), "clusters.method: no such setting; set clusters.vectors to random instead"),
        (BASE, ("clusters.method=kmeans",), "clusters.method: no such setting; remove it"),
        (BASE, ("clusters.text=all",), 'clusters.text: no such setting; remove it: every run has "needed" now'),
        (
            BASE,
            ("evaluation.sample_tokens=64",),
            "evaluation.sample_tokens: no such setting; remove it: every run has 48 now",
        ),
        (BASE, ("evaluation.lm_eval_limit=64",), "evaluation.lm_eval_limit: no such setting; remove it"),
        (
            BASE,
            ("finetune.keep_moments=true",),
            "finetune.keep_moments: no such setting; it is finetune.keep_optimizer_state now",
        ),
        (
            BASE,
            ("model.config.hiden_size=64",),
            "model.config.hiden_size: no such setting; did you mean 'hidden_size'?",
        ),
        (BASE, ("corpus.sources.0.pth=x",), "corpus.sources.0.pth: no such setting; did you mean 'path'?"),
        (
            BASE,
            ("pools.low_memory.zzz=1",),
            "pools.low_memory.zzz: no such setting; remove it; `moedisco schema` lists every setting",
        ),
        ("name: x\n", (), "corpus: is missing; `moedisco init` writes a configuration with every setting"),
        (
            "corpus: {sources: [{path: embedded}]}\n",
            (),
            "name: is missing; `moedisco init` writes a configuration with every setting",
        ),
        (BASE, ("corpus.sources=[]",), "corpus.sources: [].*at least 1"),
        (BASE, ("tokens.total=-1",), "tokens.total: -1: must be greater than 0"),
        (BASE, ("tokens.total=many",), "tokens.total: 'many': must be a whole number"),
        (BASE, ("name='a b'",), "name: 'a b'"),
        (BASE, ("submodels.sync_every=0",), "submodels.sync_every: 0: must be at least 1"),
        (BASE, ("submodels.seed_members=4",), "submodels.seed_members: 4 needs syncs, .* set submodels.sync_every"),
        (BASE, ("submodels.sync_bits=4",), "submodels: sync_bits 4 needs syncs, .* set submodels.sync_every"),
        (BASE, ("submodels.sync_every=9", "submodels.sync_bits=8"), "submodels.sync_bits: 8: must be 4"),
        (BASE, ("submodels.outer.momentum=1",), "submodels.outer.momentum: 1: must be less than 1"),
        (BASE, ("model.family=gpt2",), f"model.family: 'gpt2': must be 'mixtral', 'qwen2_moe', .* or '{FAMILIES[-1]}'"),
        (BASE, ("clusters.count=3",), "clusters.count: 3 does not divide the model's 4 experts; use one of 1, 2, 4"),
        (BASE, ("tokens.seed_share=0",), "clusters.vectors: 'hidden_state' needs a trained model"),
        (BASE, ("tokens.seed_share=0.9",), "tokens: seed_share 0.9 and finetune_share 0.15 are more than 1 together"),
        (BASE, ("submodels.optimizer.batch_tokens=1000",), "submodels.optimizer.batch_tokens: 1000 is not a multiple"),
        (BASE, ("model.config.num_attention_heads=3",), "model.config: hidden_size 256 is not a multiple"),
        (BASE, ("model.config.num_experts_per_tok=9",), "model.config: num_experts_per_tok 9 exceeds num_experts 4"),
        (
            BASE,
            ("corpus.sources.0.path=no/such/place",),
            "corpus.sources.0.path: 'no/such/place': no such file or folder",
        ),
        (BASE, ("tokenizer.path=no/such/place",), "tokenizer.path: 'no/such/place': no such directory"),
        (
            BASE,
            ("corpus.sources=[{path: embedded, name: a}, {path: embedded, name: a, weight: 2}]",),
            "corpus.sources: 'a': two sources",
        ),
        (
            BASE,
            ("evaluation.sources=[{path: no/such}]",),
            "evaluation.sources.0.path: 'no/such': no such file or folder",
        ),
        (
            BASE,
            ("evaluation.sources=[{path: embedded}]",),
            "evaluation.sources.0.path: 'embedded' is a source of the corpus, which is trained on; name other text",
        ),
        (
            BASE,
            ("corpus.sources=[{path: ./tests}]", "evaluation.sources=[{path: s3://b}, {path: tests/}]"),
            "evaluation.sources.1.path: 'tests/' is a source of the corpus",
        ),
        (
            BASE,
            ("evaluation.sources=[{path: s3://a, name: x}, {path: s3://b, name: x}]",),
            "evaluation.sources: 'x': two sources",
        ),
        (
            BASE,
            ("evaluation.lm_eval=[no/such.jsonl]",),
            "evaluation.lm_eval.0: 'no/such.jsonl': cannot be read (No such file",
        ),
        (BASE, ("evaluation.lm_eval=[README.md]",), "evaluation.lm_eval.0: 'README.md': line 1 is no example"),
        (BASE, ("evaluation.lm_eval=[README.md, ./README.md]",), "evaluation.lm_eval: 'README': two task files"),
        (BASE, ("output=s3:/bucket/runs",), "output: .*is no URI; write two slashes"),
        (BASE, ("output=ftp://host/runs",), "output: .*names no storage"),
        (BASE, ("checkpoint.every=sometimes",), "checkpoint.every: 'sometimes'"),
        (
            BASE,
            ("checkpoint.storage=s3:/bucket",),
            "checkpoint.storage: 's3:/bucket': names no storage; give a folder, or a URI",
        ),
        (BASE, ("checkpoint.storage=ftp://host/x",), "checkpoint.storage: 'ftp://host/x': names no storage"),
        (BASE, ("nonsense",), "--set: 'nonsense': must read key.sub=value"),
        (BASE, ("corpus=3",), "corpus: 3: must be a section with settings of its own"),
        (BASE, ("evaluation.prompts=x",), "evaluation.prompts: 'x': must be a list"),
        (BASE, ("=1",), "--set: '=1': must read key.sub=value"),
        (BASE, ("seed.sub=1",), "seed: must be a whole number"),
        (BASE + "seed: 1\n", ("seed.sub=1",), "--set: 'seed.sub=1': 'sub' is not a setting"),
        (BASE, ("corpus.sources.7.path=x",), "--set: 'corpus.sources.7.path=x': '7' is not a section"),
        (BASE, ("seed=[",), "--set: 'seed=[': the value is not YAML.*quote it"),
        ("- a\n", (), "CONFIG: .*must hold a mapping"),
        ("", (), "CONFIG: .*must hold a mapping"),
        ("a: [\n", (), "CONFIG: .*is not YAML at line 2"),
        ("name: 2024-13-45\n", (), "CONFIG: .*is not YAML: month must be in"),
        (BASE, ("name=2024-13-45",), "--set: 'name=2024-13-45': the value is not YAML.*quote it"),
        (
            BASE,
            ("model.init.checkpoint=no/such/place", "tokens.seed_share=0"),
            "model.init.checkpoint: 'no/such/place': no readable config.json",
        ),
        (BASE, ("model.init.chekpoint=x",), "model.init.chekpoint: no such setting; did you mean 'checkpoint'?"),
        (BASE, ("model.init=zeros",), "model.init: 'zeros'"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_field(tmp_path, text, overrides, line):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    pattern = ".*".join(re.escape(part) for part in line.split(".*"))
    assert re.match(pattern, message), message


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a text file"):
        load_config(tmp_path / "binary")


@pytest.mark.parametrize("kind", ["Source", "CorpusSource"])
def test_a_setting_of_a_list_has_its_meaning_in_the_schema(kind):
    path = RunConfig.model_json_schema()["$defs"][kind]["properties"]["path"]
    assert path["description"].startswith("A file, a folder")


def test_a_setting_with_another_default_keeps_the_meaning_of_its_base():
    schema = RunConfig.model_json_schema()
    meaning = schema["$defs"]["MachineType"]["properties"]["memory_gb"]["description"]
    assert meaning.startswith("Memory of a worker")
    for pool in ("LowMemoryPool", "HighMemoryPool"):
        assert schema["$defs"][pool]["properties"]["memory_gb"]["description"] == meaning


TYPES = "pools.low_memory.types=[{name: t4, resource: t4_gpu, memory_gb: 16, price_per_hour: 0.2, speed: 0.2}, "
L4 = "{name: l4, resource: l4_gpu, memory_gb: 24, price_per_hour: 0.4, speed: 0.5, max_workers: 3}]"


def test_a_mixed_pool_is_a_pool_per_type(tmp_path):
    config = load(tmp_path, BASE, "pools.low_memory.gpu=1", TYPES + L4)
    t4, l4 = config.pools.low_memory.node_types
    assert (t4.resource, t4.memory_gb, t4.price_per_hour, t4.speed, t4.gpu, t4.max_workers) == (
        "t4_gpu",
        16,
        0.2,
        0.2,
        1,
        8,
    )
    assert l4.max_workers == 3
    assert list(config.pools.by_key) == ["low_memory.t4", "low_memory.l4", "high_memory"]
    assert config.pools.low_memory.tags == ("t4_gpu", "l4_gpu")
    assert config.pools.at("low_memory.l4").price_per_hour == 0.4
    assert config.pools.at("low_memory.gone").price_per_hour == config.pools.low_memory.price_per_hour
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_pool_of_one_type_is_its_only_kind(tmp_path):
    pools = load(tmp_path).pools
    assert pools.by_key == {"low_memory": pools.low_memory, "high_memory": pools.high_memory}
    with pytest.raises(KeyError):
        pools.at("middle_memory")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("submodels.quorum=5", r"^submodels\.quorum: 5 is more than the 4 sub-models of clusters\.count; lower it"),
        ("submodels.quorum=0", r"^submodels\.quorum: 0: "),
        (TYPES + L4.replace("l4_gpu", "t4_gpu"), r"^pools\.low_memory: two types have the resource 't4_gpu'"),
        (TYPES + L4.replace("name: l4", "name: t4"), r"^pools\.low_memory: two types have the name 't4'"),
        (TYPES + L4.replace("name: l4", "name: l.4"), r"^pools\.low_memory\.types\.1\.name: 'l\.4'"),
    ],
)
def test_a_quorum_or_a_type_that_cannot_be_is_told(tmp_path, override, says):
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, BASE, override)


def test_a_quorum_changes_no_fingerprint_so_that_it_can_be_lowered_while_a_run_waits(tmp_path):
    waiting, hurried = load(tmp_path), load(tmp_path, BASE, "submodels.quorum=2")
    assert fingerprints(waiting) == fingerprints(hurried)


def test_a_gang_is_of_one_size_or_between_two(tmp_path):
    fixed = load(tmp_path, BASE, "pools.high_memory.workers=3").pools.high_memory
    assert (fixed.fewest_workers, fixed.most_workers, fixed.elastic) == (3, 3, False)
    elastic = load(tmp_path, BASE, "pools.high_memory.workers=[1, 8]")
    pool = elastic.pools.high_memory
    assert (pool.fewest_workers, pool.most_workers, pool.elastic) == (1, 8, True)
    assert RunConfig.model_validate_json(elastic.model_dump_json()) == elastic
    # It must fit, and may take as long as it would, with the fewest.
    assert next(stage for stage in build_plan(elastic).stages if stage.stage == "finetune").workers == 1


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("[3, 2]", "fewest first"),
        ("[0, 2]", "must be at least 1"),
        ("[1, 2, 3]", "pools.high_memory.workers"),
        ("[9, 15]", "no number that divides"),
    ],
)
def test_a_gang_that_could_never_be_is_refused(tmp_path, workers, message):
    # The default batch is of 16 sequences.
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, BASE, f"pools.high_memory.workers={workers}")


@pytest.mark.parametrize(
    ("changes", "members"),
    [
        ((), 1),
        (("submodels.sync_every=10",), 1),
        (("submodels.sync_every=10", "submodels.seed_members=7"), 7),
        (("submodels.sync_every=10", "submodels.seed_members=null"), 4),
        (("submodels.seed_members=null",), 1),
        (("submodels.sync_every=10", "submodels.seed_members=null", "clusters.count=2"), 2),
        # the seed phase has three batches
        (("submodels.sync_every=10", "submodels.seed_members=null", "tokens.total=250000"), 3),
        (
            (
                "submodels.sync_every=10",
                "submodels.seed_members=7",
                "tokens.seed_share=0",
                "clusters.vectors=mean_token",
            ),
            1,
        ),
    ],
)
def test_the_seed_has_as_many_members_as_are_set_or_one_per_cluster(tmp_path, changes, members):
    assert load(tmp_path, BASE, *changes).seed_members == members


def test_a_round_waits_for_ever_only_where_the_merge_does(tmp_path):
    assert load(tmp_path).submodels.sync_patience is None
    assert load(tmp_path, BASE, "submodels.quorum=2", "submodels.sync_every=10").submodels.sync_patience == 600


@pytest.mark.parametrize("family", ["deepseek_v2", "phimoe", "qwen3_moe"])
def test_what_a_run_stores_is_valid_when_it_is_read_again(family):
    config = check_config({"name": "x", "model": {"family": family}, "corpus": {"sources": [{"path": "embedded"}]}})
    assert stored_config(config.model_dump(mode="json")) == config
    config = check_config(
        {
            "name": "x",
            "model": {"family": family, "config": {"hidden_size": 32}},
            "corpus": {"sources": [{"path": "embedded"}]},
        }
    )
    assert stored_config(config.model_dump(mode="json")) == config
    assert config.model.config.norm_topk_prob == (family == "qwen3_moe") == config.model.architecture.norm_topk_prob
