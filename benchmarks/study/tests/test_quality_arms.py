"""The arms of the benchmark, the comparison's and the levers, as configurations."""

from pathlib import Path

import pytest
import yaml

from benchmarks.study.compare.arms import ARMS, arm_config
from benchmarks.study.quality import cells, levers
from benchmarks.study.recipe import recipe
from moedisco_ray.core.config import RunConfig, check_config, put
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.plan import build_plan, with_cluster_count

CELL = cells.Cell("embedded", "qwen3_moe", "random")


def preset(name: str) -> RunConfig:
    return with_cluster_count(check_config(yaml.safe_load(preset_text(name))))


def of(base: RunConfig, name: str) -> RunConfig:
    return arm_config(base, name, levers.KNOWN[name], Path("runs"), "tokens", base.tokens.total)


@pytest.fixture(scope="module", params=["the benchmark", "the preset"])
def base(request) -> RunConfig:
    if request.param == "the benchmark":
        return cells.base_config(CELL, 0, 200_000, None, Path("runs"))
    raw = preset("default").model_dump(mode="json")
    put(raw, "finetune.optimizer.lr", raw["finetune"]["optimizer"]["lr"] / 2)       # else a lever would change nothing
    return check_config(raw)


@pytest.mark.parametrize("name", levers.KNOWN)
def test_every_arm_and_lever_is_a_configuration_of_its_own(base, name):
    config = of(base, name)
    assert build_plan(config).tokens == base.tokens.total
    assert (recipe(config) == recipe(base)) == (name == "disco")
    alike = [other for other in levers.KNOWN if recipe(of(base, other)) == recipe(config)]
    assert alike == [name]


def test_the_papers_arm_agrees_with_the_papers_preset():
    named = yaml.safe_load(preset_text("paper"))
    for path, value in ARMS["paper"].settings.items():
        section = named
        *sections, last = path.split(".")
        for each in sections:
            section = section[each]
        assert callable(value) or section.get(last, value) == value, path
    assert recipe(of(preset("paper"), "paper")) == recipe(preset("paper"))


@pytest.mark.parametrize("name", ["paper", "btx", "spes"])
def test_recipes_that_know_of_no_moments_begin_with_fresh_ones(base, name):
    config = of(base, name)
    assert (config.submodels.keep_optimizer_state, config.finetune.keep_optimizer_state) == (False, False)


def test_the_rivals_are_what_their_papers_say(base):
    # BTX (arXiv 2403.07816): branches from one seed that never meet, a plain mean, a router that begins at random, a fine-tune.
    btx = of(base, "btx")
    assert btx.submodels.sync_every is None
    assert (btx.merge.backbone, btx.merge.router) == ("uniform", "random")
    assert btx.tokens.seed > 0 < btx.tokens.finetune
    # SPES (arXiv 2602.11543): no seed, a group of experts with its router on each card, averages every 50 to 100 steps.
    spes = of(base, "spes")
    assert (spes.tokens.seed, spes.submodels.sync_every, spes.submodels.outer.lr, spes.submodels.outer.momentum) == (0, 50, 1, 0)
    # Expert Upcycling (arXiv 2604.19835): a small MoE, then the whole one, without sub-models.
    grown = of(base, "expert-upcycling")
    assert (grown.tokens.submodels, grown.tokens.finetune) == (0, base.tokens.finetune)
    whole = base.model.architecture
    for small in (spes, grown):
        assert whole.num_experts > whole.num_experts // small.clusters.count >= whole.num_experts_per_tok
    # c-BTM (arXiv 2303.14177): balanced k-means of tf-idf, branches that never meet or merge.
    cbtm = of(base, "ensemble")
    assert (cbtm.clusters.vectors, cbtm.submodels.sync_every, cbtm.tokens.finetune) == ("tfidf_svd", None, 0)
    assert cbtm.clusters.capacity is not None
    # Sparse upcycling (arXiv 2212.05055): one dense model, then all of it at once. Joint training: all of it from the start.
    assert (of(base, "upcycle").tokens.submodels, of(base, "joint").tokens.finetune) == (0, base.tokens.total)
    assert of(base, "upcycle").clusters.count == whole.num_experts
    assert of(base, "joint-low").finetune_pool == base.pools.low_memory


def test_text_of_other_sources_is_that_of_the_domains_a_corpus_has_not(tmp_path):
    for corpus, domains in {"a": ["go", "law"], "b/train": ["law", "poems"], "c": ["poems", "songs"]}.items():
        for domain in domains:
            (tmp_path / corpus).mkdir(parents=True, exist_ok=True)
            (tmp_path / corpus / f"{domain}.txt").write_text("Some text.\n")
    config = cells.base_config(cells.Cell("a", "mixtral", "random"), 0, 200_000, tmp_path, tmp_path)
    assert [source.name for source in config.corpus.sources] == ["go", "law"]
    assert [source.name for source in config.evaluation.sources] == ["poems", "songs"]
