"""The arms of the comparison and of the grid, and the levers, as configurations."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from grid_example import cell

from benchmarks.study.compare.arms import ARMS, REFERENCE, arm_config
from benchmarks.study.grid import cells, levers, pieces
from benchmarks.study.recipe import recipe
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.plan import build_plan, with_cluster_count

BASE = cells.base_config(cell(corpus="embedded", scale="cpu"), 0, None, Path("runs"))


def preset(name: str) -> RunConfig:
    return with_cluster_count(check_config(yaml.safe_load(preset_text(name))))


def of(base: RunConfig, name: str) -> RunConfig:
    return arm_config(base, name, levers.KNOWN[name], Path("runs"), "tokens", base.tokens.total)


def trains_all_tokens(config: RunConfig) -> bool:
    """Whether the plan of a run trains on its tokens, less at most what is no whole batch in each phase."""
    plan = build_plan(config)
    batches = (config.finetune if stage.stage == "finetune" else config.submodels for stage in plan.stages)
    return 0 <= config.tokens.total - plan.tokens < sum(section.optimizer.batch_tokens for section in batches)


@pytest.fixture(scope="module", params=["the grid", "the preset"])
def base(request) -> RunConfig:
    return BASE if request.param == "the grid" else preset("default")


def test_every_arm_and_lever_is_a_configuration_of_its_own(base):
    configs = {name: of(base, name) for name in levers.KNOWN}
    assert all(map(trains_all_tokens, configs.values()))
    assert {config.tokens.total for config in configs.values()} == {base.tokens.total}
    recipes = {name: (recipe(config), config.model.architecture) for name, config in configs.items()}
    assert recipes["disco"] == (recipe(base), base.model.architecture)
    assert [pair for pair in itertools.combinations(recipes, 2) if recipes[pair[0]] == recipes[pair[1]]] == []


def test_the_papers_arm_agrees_with_the_papers_preset():
    named = yaml.safe_load(preset_text("paper"))
    for path, value in ARMS["paper"].settings.items():
        section = named
        *sections, last = path.split(".")
        for each in sections:
            section = section[each]
        assert callable(value) or section.get(last, value) == value, path
    assert recipe(of(preset("paper"), "paper")) == recipe(preset("paper"))


@pytest.mark.parametrize("name", ["paper", "btx"])
def test_recipes_that_know_of_no_moments_begin_with_fresh_ones(base, name):
    config = of(base, name)
    assert (config.submodels.keep_optimizer_state, config.finetune.keep_optimizer_state) == (False, False)


def test_the_rivals_are_what_their_papers_say(base):
    # BTX (arXiv 2403.07816): branches from one seed that never meet, a plain mean, a router that begins at random, a
    # fine-tune.
    btx = of(base, "btx")
    assert btx.submodels.sync_every is None
    assert (btx.merge.backbone, btx.merge.router) == ("uniform", "random")
    assert btx.tokens.seed > 0 < btx.tokens.finetune
    # Expert Upcycling (arXiv 2604.19835): a small MoE, then the whole one, without sub-models.
    grown = of(base, "expert-upcycling")
    assert (grown.tokens.submodels, grown.tokens.finetune) == (0, base.tokens.finetune)
    whole = base.model.architecture
    assert whole.num_experts > whole.num_experts // grown.clusters.count >= whole.num_experts_per_tok
    # c-BTM (arXiv 2303.14177): balanced k-means of tf-idf, branches that never meet or merge.
    cbtm = of(base, "ensemble")
    assert (cbtm.clusters.vectors, cbtm.submodels.sync_every, cbtm.tokens.finetune) == ("tfidf_svd", None, 0)
    assert cbtm.clusters.capacity is not None
    # Sparse upcycling (arXiv 2212.05055): one dense model, then all of it at once. Joint training: all of it from the
    # start.
    assert (of(base, "upcycle").tokens.submodels, of(base, "joint").tokens.finetune) == (0, base.tokens.total)
    assert of(base, "upcycle").clusters.count == whole.num_experts
    assert of(base, "joint-low").finetune_pool == base.pools.low_memory


@pytest.mark.parametrize("name", pieces.ARMS)
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_of_the_sparse_cell_are_what_they_are_called(name: str, scale: str) -> None:
    shape = cells.GPU_SHAPE if scale == "gpu" else cells.SHAPES[0]
    own = cell(corpus="embedded", experts=shape[0], top_k=shape[1], scale=scale)
    base = cells.base_config(own, 0, None, Path("runs"))
    config = arm_config(base, name, ARMS[name], Path("runs"), "tokens", base.tokens.total)
    assert trains_all_tokens(config)
    assert config.tokens.total == own.tokens
    experts_of_seed = own.experts // config.clusters.count
    group = own.experts // own.groups
    seeded = {"joint": 0, "half": 0, "disco": group, "expert-upcycling": group, "upcycle": 1}
    assert (experts_of_seed if config.tokens.seed else 0) == seeded[name]
    assert config.tokens.decoupled == (name == "disco")
    if config.tokens.seed:  # all arms make as many steps in the seed phase
        assert (config.seed_members, config.submodels.optimizer.batch_tokens) == (
            1,
            base.finetune.optimizer.batch_tokens,
        )
    assert config.pools.low_memory.max_workers == own.groups
    flops = sum(stage.cost.flops for stage in build_plan(config).stages)
    reference = "joint-low" if config.finetune.pool == "low_memory" else REFERENCE
    joint = arm_config(base, reference, ARMS[reference], Path("runs"), "tokens", base.tokens.total)
    # waiting for a network would add to them
    assert flops <= sum(stage.cost.flops for stage in build_plan(joint).stages)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("small-groups", {"clusters.count": 4}),
        ("random-router", {"merge.router": "random"}),
        ("no-syncs", {"submodels.sync_every": None}),
        ("fresh-states", {"submodels.keep_optimizer_state": False, "finetune.keep_optimizer_state": False}),
        (
            "disco-adamw",
            {
                "submodels.optimizer.name": "adamw",
                "submodels.optimizer.schedule": "constant",
                "finetune.optimizer.name": "adamw",
                "finetune.optimizer.schedule": "cosine",
                "finetune.optimizer.warmup": 0.03,
                "finetune.optimizer.lr": 2e-3,
            },
        ),
        ("longer-finetune", {"tokens.seed_share": 0.65, "tokens.finetune_share": 0.2}),
    ],
)
def test_a_lever_changes_its_settings_alone(name: str, changes: dict[str, Any]) -> None:
    ours, lever = (recipe(of(BASE, each)) for each in ("disco", name))
    assert {path: value for path, value in lever.items() if ours[path] != value} == changes


def test_each_small_group_has_a_card() -> None:
    pool = of(BASE, "small-groups").pools.low_memory
    assert (pool.max_workers, pool.seed_workers) == (4, 4)


def test_levers_of_the_rivals_are_the_rivals_with_one_change() -> None:
    with_adamw = ((name, name.removesuffix("-adamw")) for name in levers.WITH_ADAMW)
    for lever, rival in (("early-growth", "expert-upcycling"), *with_adamw):
        one, other = (of(BASE, each) for each in (lever, rival))
        assert trains_all_tokens(one)
        assert trains_all_tokens(other)
        assert one.tokens.total == other.tokens.total == BASE.tokens.total
        assert one.tokens.decoupled == other.tokens.decoupled
        assert one.seed_members == other.seed_members
        assert other.finetune.optimizer.name == "muon"
        assert (one.finetune.optimizer.name == "adamw") == lever.endswith("adamw")


def test_text_of_other_sources_is_that_of_the_domains_a_corpus_has_not(tmp_path):
    for corpus, domains in {"a": ["go", "law"], "b/train": ["law", "poems"], "c": ["poems", "songs"]}.items():
        for domain in domains:
            (tmp_path / corpus).mkdir(parents=True, exist_ok=True)
            (tmp_path / corpus / f"{domain}.txt").write_text("Some text.\n")
    config = cells.base_config(cell(corpus="a", family="mixtral"), 0, tmp_path, tmp_path)
    assert [source.name for source in config.corpus.sources] == ["go", "law"]
    assert [source.name for source in config.evaluation.sources] == ["poems", "songs"]
