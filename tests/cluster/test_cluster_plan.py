"""What a configuration's pools and a cluster file say of each other."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import yaml
from cluster_files import FOLDER, load
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.train import ScalingConfig
from rich.console import Console
from typer.testing import CliRunner

from moedisco_ray.backend import Placement
from moedisco_ray.cli.app import app
from moedisco_ray.cli.display.cluster import cluster_view
from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan import GIB, build_plan
from moedisco_ray.plan.capacity import cluster_needs
from moedisco_ray.plan.cluster_checks import disagreements
from moedisco_ray.plan.cluster_file import load_cluster, read_cluster

ON_AZURE = ("pools.low_memory.card=T4", "pools.low_memory.price_per_hour=0.16")
"""Azure has no L4."""


@pytest.fixture(scope="module")
def default_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "default.yaml"
    path.write_text(preset_text("default").replace("recipe: auto", "recipe: null"))
    return path


def found(default_file, cluster, *overrides):
    config = load_config(default_file, overrides)
    return [
        (each.field, str(each)) for each in disagreements(read_cluster([cluster], "file"), config, build_plan(config))
    ]


@pytest.mark.parametrize("name", ["aws/spot", "gcp/spot", "azure/spot", "kuberay"])
def test_the_default_configuration_agrees_with_every_cloud(default_file, name):
    config = load_config(default_file, ON_AZURE if name == "azure/spot" else ())
    assert disagreements(load_cluster(FOLDER / f"{name}.yaml"), config, build_plan(config)) == ()


CARDS = {
    "aws/spot": (["L4", "A10G"], ["H100", "A100-80GB"]),
    "gcp/spot": (["L4"], ["H100", "A100-80GB"]),
    "azure/spot": (["T4"], ["H100 NVL", "A100-80GB"]),
    "kuberay": (["L4"], ["A100-80GB"]),
    "on-prem": (["RTX 4090"], ["A100-80GB"]),
}
"""Small and large cards of each cluster file."""


@pytest.mark.parametrize("name", CARDS)
def test_every_cluster_file_is_compared_with_the_configuration_by_card(default_file, name):
    cluster = load_cluster(FOLDER / f"{name}.yaml")
    for tag, cards in zip(("low_mem_gpu", "high_mem_gpu"), CARDS[name], strict=True):
        assert {node.card.name for node in cluster.types if node.most and tag in node.slots} == set(cards)
    for pool, cards in zip(("low_memory", "high_memory"), CARDS[name], strict=True):
        for card in (*cards, "RTX 3090"):
            config = load_config(default_file, (f"pools.{pool}.card={card}",))
            fields = [each.field for each in disagreements(cluster, config, build_plan(config))]
            assert (f"pools.{pool}.card" in fields) == (card not in cards)


def test_node_types_that_no_pool_names_are_said(default_file):
    """Before: a plan passed over them without a word."""
    config, cluster = load_config(default_file), load_cluster(FOLDER / "aws/spot.yaml")
    plan = build_plan(config)
    assert cluster_needs(cluster, config, plan).unused == ()
    other = load_config(default_file, ("pools.high_memory.resource=other_gpu",))
    needs = cluster_needs(cluster, other, plan)
    assert needs.unused == ("high-h100-spot", "high-a100-spot", "high-h100")
    console = Console(width=200)
    with console.capture() as text:
        console.print(cluster_view(cluster, needs, "spot.yaml", agrees=False))
    assert "because no pool names their tags: high-h100-spot, high-a100-spot, high-h100" in text.get()


def test_more_main_memory_than_the_files_machines_have_is_told(default_file):
    told = dict(found(default_file, load("gcp/spot"), "pools.low_memory.host_memory_gb=512"))
    assert "a node low-l4" in told["pools.low_memory.host_memory_gb"]
    assert found(default_file, load("gcp/spot"), "pools.low_memory.host_memory_gb=8") == []


@pytest.mark.parametrize(
    ("override", "field", "says"),
    [
        ("pools.low_memory.resource=tiny_gpu", "pools.low_memory.resource", "the file has high_mem_gpu, low_mem_gpu"),
        ("pools.low_memory.gpu=0", "pools.low_memory.gpu", "would idle"),
        ("pools.low_memory.max_workers=200", "pools.low_memory.max_workers", "room for 24"),
        ("pools.high_memory.workers=32", "pools.high_memory.workers", "room for 24"),
        ("pools.high_memory.price_per_hour=0.1", "pools.high_memory.price_per_hour", "1.50 to 6.88"),
        ("pools.low_memory.card=RTX 4090", "pools.low_memory.card", "the file starts L4, A10G; name one of these"),
        ("pools.high_memory.card=null", "pools.high_memory.card", "the file starts H100, A100-80GB; name the one"),
        ("pools.high_memory.gpus_per_node=8", "pools.high_memory.gpus_per_node", "high-h100 has room for 1"),
        (
            "model.config.hidden_size=32768",
            "pools.low_memory.memory_gb",
            "low-l4-spot, low-a10g-spot, low-l4 has only 22",
        ),
    ],
)
def test_a_contradiction_is_told_with_field_value_and_remedy(default_file, override, field, says):
    told = dict(found(default_file, load("aws/spot"), override))
    assert field in told
    assert says in told[field]
    assert told[field].startswith(f"{field}: ")


def test_each_data_owner_needs_a_node_type_with_its_tag(default_file):
    owned = (
        "corpus.sources=[{path: embedded}, {path: /data, owner: alice}]",
        "finetune.keep_optimizer_state=false",
        "pools.owners.alice.storage=s3://alice/runs",
        "pools.owners.alice.resource=alice_gpu",
    )
    cluster = load("aws/spot")
    told = dict(found(default_file, cluster, *owned))
    assert told.keys() == {"pools.owners.alice.resource"}
    assert "no node type offers it" in told["pools.owners.alice.resource"]
    kinds = cluster["available_node_types"]
    kinds["alice"] = {**kinds["low-l4-spot"], "resources": {"GPU": 1, "alice_gpu": 1}, "max_workers": 1}
    facts = cluster["metadata"]["moedisco"]["node_types"]
    facts["alice"] = facts["low-l4-spot"]
    assert found(default_file, cluster, *owned) == []


def test_tags_without_gpus_are_told(default_file):
    cluster = load("aws/spot")
    cluster["available_node_types"]["low-a10g-spot"]["resources"] = {"CPU": 4, "GPU": 1, "low_mem_gpu": 2}
    assert any("offers more low_mem_gpu than it has GPUs" in text for _, text in found(default_file, cluster))


def test_nodes_without_gpus_train_on_cpus(default_file):
    overrides = ("pools.low_memory.gpu=0", "pools.high_memory.gpu=0", "pools.low_memory.max_workers=4")
    assert found(default_file, load("local-fake"), *overrides) == []


@pytest.mark.parametrize("name", ["aws/spot", "gcp/spot", "azure/spot", "kuberay", "on-prem"])
@pytest.mark.parametrize("kind", ["low_memory", "high_memory"])
def test_every_node_of_a_pool_has_what_its_workers_ask_ray_for(default_file, name, kind):
    pool = getattr(load_config(default_file).pools, kind)
    bundle = Placement(pool, 1, 0).bundle
    scaling = ScalingConfig(num_workers=1, use_gpu=True, resources_per_worker=bundle)
    assert scaling.total_resources == bundle == {pool.resource: 1, "GPU": 1}, (
        "Ray Train adds no CPU: big nodes offer none"
    )
    nodes = [node for node in load_cluster(FOLDER / f"{name}.yaml").types if pool.resource in node.slots]
    assert nodes
    for node in nodes:
        assert all(node.resources[part] >= amount * node.slots[pool.resource] for part, amount in bundle.items())


@pytest.fixture(scope="module")
def planned(default_file):
    config = load_config(default_file)
    return config, build_plan(config), load_cluster(FOLDER / "gcp/spot.yaml")


@settings(deadline=None)
@given(memory=st.integers(1, 40))
def test_a_type_is_too_small_exactly_when_a_worker_needs_more(planned, memory):
    config, plan, cluster = planned
    first, *others = cluster.types
    small = dataclasses.replace(cluster, types=(dataclasses.replace(first, gpu_memory_gb=memory), *others))
    need = max(stage.memory.total for stage in plan.stages if stage.pool == "low_memory") / GIB
    assert bool(disagreements(small, config, plan)) == (need > memory)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda cluster: cluster.pop("metadata"), "metadata"),
        (lambda cluster: cluster["metadata"]["moedisco"]["node_types"].pop("low-l4"), "low-l4"),
        (
            lambda cluster: cluster["metadata"]["moedisco"]["node_types"]["low-l4"].pop("price_per_hour"),
            "price_per_hour",
        ),
        (lambda cluster: cluster["metadata"]["moedisco"]["node_types"]["low-l4"].update(price=1), "price"),
        (lambda cluster: cluster.pop("provider"), "neither"),
    ],
)
def test_a_file_that_lacks_something_is_a_user_error(change, says):
    cluster = load("aws/spot")
    change(cluster)
    with pytest.raises(ConfigError, match=says):
        read_cluster([cluster], "mine.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "just words", "a: [", "kind: RayCluster"])
def test_what_is_no_cluster_file_is_a_user_error(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--cluster"):
        load_cluster(path)


def test_a_host_is_counted_once_for_its_type():
    cluster = load("on-prem")
    cluster["provider"]["worker_ips"].append("192.168.0.13")
    cluster["metadata"]["moedisco"]["hosts"]["192.168.0.13"] = "low"
    assert {kind.name: kind.most for kind in read_cluster([cluster], "file").types} == {"low": 2, "high": 1}


def test_the_command_ends_with_2_where_they_differ_and_still_prints_the_plan(default_file, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(load("aws/spot")))
    runner = CliRunner()
    agreeing = runner.invoke(app, ["plan", str(default_file), "--cluster", str(path)])
    assert (agreeing.exit_code, agreeing.stderr) == (0, "")
    assert agreeing.stdout.splitlines()[-1].startswith("The pools agree with ")
    assert re.search(r"low-l4-spot +up to 16 +low_mem_gpu +22\.05 +0\.33", agreeing.stdout)
    differing = runner.invoke(
        app, ["plan", str(default_file), "--cluster", str(path), "--json", "--set", "pools.low_memory.gpu=0"]
    )
    assert differing.exit_code == 2
    assert json.loads(differing.stdout)["name"] == "my-moe"
    assert differing.stderr.startswith("moedisco: pools.low_memory.gpu: 0: ")
    missing = runner.invoke(app, ["plan", str(default_file), "--cluster", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 2


def mixed(**changes):
    a10g = {"name": "a10g", "resource": "a10g_gpu", "card": "A10G", "price_per_hour": 0.42, "max_workers": 16} | changes
    l4 = {"name": "l4", "resource": "low_mem_gpu", "card": "L4", "price_per_hour": 0.33, "max_workers": 8}
    return f"pools.low_memory.types={json.dumps([a10g, l4])}"


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({}, None, None),
        ({"resource": "other_gpu"}, "pools.low_memory.types.0.resource", "no node type offers it"),
        (
            {"card": "RTX 4090", "memory_gb": 22},
            "pools.low_memory.types.0.card",
            "the file starts A10G; name one of these",
        ),
        ({"max_workers": 17}, "pools.low_memory.types.0.max_workers", "room for 16"),
        ({"price_per_hour": 0.5}, "pools.low_memory.types.0.price_per_hour", "0.42 to 0.42"),
    ],
)
def test_every_type_of_a_mixed_pool_is_held_against_the_file(default_file, change, field, says):
    cluster = load("aws/spot")
    cluster["available_node_types"]["low-a10g-spot"]["resources"] = {"CPU": 4, "GPU": 1, "a10g_gpu": 1}
    told = dict(found(default_file, cluster, mixed(**change)))
    assert list(told) == ([] if field is None else [field])
    assert field is None or says in told[field]
