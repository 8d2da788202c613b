"""What the machines of a cluster file must hold, and what their traffic costs."""

from __future__ import annotations

import re

import pytest
from cluster_files import CLOUDS, FOLDER, load
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan import GIB, build_plan
from moedisco_ray.plan.capacity import cluster_needs, head_memory_mb, lacking, usable_mb
from moedisco_ray.plan.cluster_checks import disagreements
from moedisco_ray.plan.cluster_file import load_cluster, read_cluster
from moedisco_ray.plan.files import checkpoint_count

SHIPPED = (*CLOUDS, "kuberay", "on-prem", "local-fake")


def preset(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("plan") / f"{name}.yaml"
    path.write_text(preset_text(name))
    config = load_config(path, ["recipe=null"])
    return config, build_plan(config)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return preset(tmp_path_factory, "default")


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return preset(tmp_path_factory, "paper")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_holds_its_own_number_of_workers(default, name):
    assert lacking(load_cluster(FOLDER / f"{name}.yaml"), *default) == ()


@pytest.mark.parametrize("name", [each for each in SHIPPED if each != "local-fake"])
def test_every_shipped_file_states_what_is_checked(name):
    cluster = load_cluster(FOLDER / f"{name}.yaml")
    assert all(machine.memory_gb and machine.disk_gb for machine in (cluster.head, *cluster.types))


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_that_join_are_priced_with_their_traffic(default, name):
    file = load(name)
    alone = read_cluster([file], "file")
    file["metadata"]["moedisco"]["joining"]["rtx4090"] = 40
    joined = read_cluster([file], "file")
    assert joined.room("low_mem_gpu") == alone.room("low_mem_gpu") + 40
    assert lacking(joined, *default) == ()
    wrong = {each.field for each in disagreements(joined, *default)}
    assert wrong == ({"pools.low_memory.card"} if name == "azure/spot" else set())  # Azure has no L4
    [rtx4090] = [node for node in joined.types if node.joins]
    assert rtx4090.worker_price("low_mem_gpu") == 0.35
    assert cluster_needs(joined, *default).transfer_dollars > cluster_needs(alone, *default).transfer_dollars == 0
    assert cluster_needs(joined, *default).submodels == cluster_needs(alone, *default).submodels + 40


@pytest.mark.parametrize("name", CLOUDS)
def test_a_files_disks_are_those_that_it_asks_the_cloud_for(name):
    file = load(name)
    for kind, node in file["available_node_types"].items():
        config = node["node_config"]
        disks = {
            "aws/spot": lambda config: config["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"],
            "gcp/spot": lambda config: config["disks"][0]["initializeParams"]["diskSizeGb"],
            "azure/spot": lambda config: config["azure_arm_parameters"]["osDiskSize"],
        }
        assert file["metadata"]["moedisco"]["node_types"][kind]["disk_gb"] == disks[name](config)


def crowded(workers, memory_gb):
    file = load("aws/spot")
    file["max_workers"] = workers
    file["available_node_types"]["low-l4-spot"]["max_workers"] = workers
    file["metadata"]["moedisco"]["node_types"]["head"]["memory_gb"] = memory_gb
    return read_cluster([file], "file")


@settings(deadline=None, max_examples=30)
@given(workers=st.integers(24, 2000), memory_gb=st.integers(4, 64))
def test_a_head_that_is_too_small_names_a_number_of_workers_that_it_holds(default, workers, memory_gb):
    found = lacking(crowded(workers, memory_gb), *default)
    assert bool(found) == (head_memory_mb(workers, gang=True) > usable_mb(memory_gb))
    if found:
        line = str(found[0])
        assert line.startswith(f"head.memory_gb: {memory_gb}")
        fits = re.search(r"at most (\d+) \(`max_workers`\)", line)
        if fits:
            assert lacking(crowded(int(fits[1]), memory_gb), *default) == ()
            assert lacking(crowded(int(fits[1]) + 1, memory_gb), *default)
        else:
            assert head_memory_mb(1, gang=True) > usable_mb(memory_gb)


@pytest.mark.parametrize(
    ("node", "fact", "value", "says"),
    [
        ("head", "disk_gb", 40, "the head needs 80 GB; give it a larger disk"),
        ("low-l4-spot", "disk_gb", 60, "a node needs 62 GB"),
        ("low-l4-spot", "memory_gb", 2, "a node needs 3.7 GiB"),
        ("cpu", "disk_gb", 60, "a node needs 61 GB"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line_with_field_value_and_remedy(default, node, fact, value, says):
    file = load("aws/spot")
    file["metadata"]["moedisco"]["node_types"][node][fact] = value
    [found] = lacking(read_cluster([file], "file"), *default)
    assert str(found).startswith(f"{node}.{fact}: {value}")
    assert says in str(found)
    assert "give it a larger" in str(found) or "set the maximum number of nodes to 0" in str(found)


def test_large_submodels_do_not_fit_small_disks(paper):
    file = load("aws/spot")
    file["metadata"]["moedisco"]["node_types"]["low-l4-spot"]["disk_gb"] = 75
    found = {each.field: str(each) for each in lacking(read_cluster([file], "file"), *paper)}
    assert "a node needs 79 GB" in found["low-l4-spot.disk_gb"]


def test_decompose_needs_the_disk_of_a_node_with_cpus(paper):
    [decompose] = [stage for stage in paper[1].storage if stage.stage == "decompose"]
    assert decompose.pool == "cpu"
    file = load("aws/spot")
    needed = 60 + decompose.worker_disk / GIB
    for size, fits in ((int(needed), False), (int(needed) + 60, True)):
        file["metadata"]["moedisco"]["node_types"]["cpu"]["disk_gb"] = size
        fields = {each.field for each in lacking(read_cluster([file], "file"), *paper)}
        assert ("cpu.disk_gb" not in fields) == fits


def test_a_priced_network_costs_its_bytes(default):
    file = load("aws/spot")
    assert cluster_needs(read_cluster([file], "file"), *default).transfer_dollars == 0
    file["metadata"]["moedisco"]["node_types"]["low-a10g-spot"]["transfer_price_per_gb"] = 0.09
    needs = cluster_needs(read_cluster([file], "file"), *default)
    moved = sum(stage.moved for stage in default[1].storage if stage.pool == "low_memory")
    assert needs.transfer_dollars == pytest.approx(0.09 * moved / GIB)
    assert 0 < moved < needs.moved_bytes


def test_a_memory_limit_of_kubernetes_is_read_in_its_units(default):
    documents = [
        {
            "kind": "RayCluster",
            "spec": {
                "headGroupSpec": {"template": {"spec": {"containers": [{"resources": {"limits": {"memory": limit}}}]}}},
                "workerGroupSpecs": [],
            },
        }
        for limit in ("8Gi", "8192Mi", "8589934592", "lots")
    ]
    assert [read_cluster([each], "file").head.memory_gb for each in documents[:3]] == [8, 8, 8]
    with pytest.raises(ConfigError, match="lacks a part"):
        read_cluster(documents[3:], "file")


@given(steps=st.integers(1, 100_000), hours=st.floats(0, 100), size=st.integers(1, 10**12), workers=st.integers(1, 64))
def test_checkpoints_are_no_more_than_steps_and_not_closer_than_they_can_be_stored(steps, hours, size, workers):
    count = checkpoint_count(steps, hours, None, size, workers)
    assert 0 <= count <= steps
    assert count * size / workers / 125e6 <= 3600 * hours
    assert checkpoint_count(steps, hours, 10, size, workers) == steps // 10
