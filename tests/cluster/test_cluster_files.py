"""Every file against Ray's own checks, and against what Ray does not check."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import pytest
import yaml
from cluster_files import CLOUDS, FOLDER, KUBERNETES, LAUNCHER, ROOT, load, market, pool, workers
from pyarrow import fs
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private import _azure as azure
from ray.autoscaler._private.util import prepare_config, validate_config

from moedisco_ray.core.cards import LEAST_DRIVER
from moedisco_ray.plan.cluster_file import ClusterMetadata, load_cluster

NODE_CONFIG_KEYS = {
    "aws/spot": {
        "InstanceType",
        "ImageId",
        "IamInstanceProfile",
        "MetadataOptions",
        "BlockDeviceMappings",
        "InstanceInitiatedShutdownBehavior",
        "InstanceMarketOptions",
    },
    "gcp/spot": {"machineType", "guestAccelerators", "serviceAccounts", "networkInterfaces", "disks", "scheduling"},
    "azure/spot": {"azure_arm_parameters"},
}
IMAGES = {
    # The cloud's release notes of the image name its driver: look it up for another image.
    "aws/account.yaml": ("base-oss-nvidia-driver-gpu-ubuntu-22.04/latest", 595),
    "gcp/account.sh": ("common-cu129-ubuntu-2204-nvidia-580", 580),
    "azure/spot.yaml": ("imageVersion: 22.04.2026082801 ", 580),
}
"""What a file calls its image, and the branch of NVIDIA's driver that this image has."""
OWN_DRIVER = ("Standard_NV", "Standard_NG", "Standard_NC_RTX")
"""Machines of Azure with virtual GPUs, which need NVIDIA's GRID driver in place of the image's."""
MACHINE = {
    "aws/spot": r"[a-z0-9]+\.\d*x?large",
    "gcp/spot": r"[a-z]\d-[a-z]+-\d+g?",
    "azure/spot": r"Standard_[A-Z]{1,2}\d+[a-z]*(_[A-Z0-9]+)?_v\d",
}


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_file(name):
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_file_repeats_no_key(name):
    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if key.value != "<<"]
            assert len(keys) == len(set(keys)), f"{name}: {keys}"
            return super().construct_mapping(node, deep)

    yaml.load((FOLDER / f"{name}.yaml").read_text(), Strict)


@pytest.mark.parametrize("name", [*LAUNCHER, "kuberay"])
def test_the_file_says_what_a_plan_is_held_against(name):
    types = load_cluster(FOLDER / f"{name}.yaml").types
    for tag in ("low_mem_gpu", "high_mem_gpu"):
        offering = [kind for kind in types if tag in kind.resources]
        assert offering, f"{name} offers no {tag}"
        assert all(kind.price_per_hour > 0 and (kind.most > 0) is not kind.joins for kind in offering)
        assert all(kind.gpus in (0, kind.resources[tag]) for kind in offering), "one tag for each GPU"
        assert all(bool(kind.gpus) == bool(kind.gpu_memory_gb) for kind in offering)


@pytest.mark.parametrize("name", LAUNCHER)
def test_metadata_names_the_types_of_the_file(name):
    config = load(name)
    metadata = ClusterMetadata.model_validate(config["metadata"]["moedisco"])
    if name == "on-prem":
        assert set(metadata.hosts) == {config["provider"]["head_ip"], *config["provider"]["worker_ips"]}
        assert set(metadata.hosts.values()) == set(metadata.node_types)
    else:
        assert set(metadata.node_types) == {*config["available_node_types"], *metadata.joining}


@pytest.mark.parametrize("name", LAUNCHER)
def test_labels_are_such_as_ray_takes(name):
    config = load(name)
    kinds = list(config.get("available_node_types", config["metadata"]["moedisco"]["node_types"]).values())
    labels = [kind["labels"] for kind in kinds if "labels" in kind]
    assert labels
    for each in labels:
        validate_node_label_syntax(each)
        assert each.keys() >= {"moedisco/pool", "moedisco/market"}
        assert each["moedisco/pool"] in ("low_memory", "high_memory", "cpu")


@pytest.mark.parametrize("name", CLOUDS)
def test_pools_start_empty_and_the_head_does_no_work(name):
    config = load(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    for kind in workers(config).values():
        assert kind.get("min_workers", 0) == 0
        assert 0 < kind.get("idle_timeout_s", 60 * config["idle_timeout_minutes"]) <= 600
        assert kind["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_each_pool_has_spot_types_in_order_of_price_and_then_one_on_demand(name):
    config = load(name)
    prices = {kind: facts["price_per_hour"] for kind, facts in config["metadata"]["moedisco"]["node_types"].items()}
    for tier, members in groupby(workers(config).items(), key=lambda item: pool(item[1])):
        kinds = list(members)
        priorities = [kind["priority"] for _, kind in kinds]
        assert priorities == sorted(priorities, reverse=True)
        assert len(set(priorities)) == len(priorities)
        spot = [each for each, kind in kinds if market(kind) == "spot"]
        # Of Google's small cards, only the L4 has bf16.
        alone = tier == "cpu" or (name, tier) == ("gcp/spot", "low_memory")
        assert len(spot) >= (1 if alone else 2), tier
        assert [market(kind) for _, kind in kinds] == ["spot"] * len(spot) + ["on-demand"]
        tag = {"low_memory": "low_mem_gpu", "high_memory": "high_mem_gpu", "cpu": "CPU"}[tier]
        cheapest = [prices[each] for each in spot]
        assert cheapest == sorted(cheapest)
        fallback = kinds[-1][1]
        assert any(kind["resources"] == fallback["resources"] for _, kind in kinds[:-1]), (
            "the fallback does what a spot type does"
        )
        assert all(tag in kind["resources"] for _, kind in kinds)


@pytest.mark.parametrize("name", CLOUDS)
def test_text_processing_has_nodes_of_its_own(name):
    kinds = workers(load(name)).values()
    for kind in kinds:
        if pool(kind) == "cpu":
            assert kind["resources"] == {"CPU": 16}
            assert "guestAccelerators" not in kind["node_config"]
        else:
            assert kind["resources"]["CPU"] == 0
    assert {market(kind) for kind in kinds if pool(kind) == "cpu"} == {"spot", "on-demand"}


def test_a_gang_is_in_one_zone_where_the_file_decides_it():
    # On AWS, `spot_fallback` does: see test_aws_offline.
    assert "," not in load("gcp/spot")["provider"]["availability_zone"]
    for kind in workers(load("azure/spot")).values():
        zone = kind["node_config"]["azure_arm_parameters"].get("availability_zone")
        assert zone == ("1" if pool(kind) == "high_memory" else None)


@pytest.mark.parametrize("name", CLOUDS)
def test_node_config_has_only_keys_that_the_cloud_knows(name):
    for kind in load(name)["available_node_types"].values():
        node = kind["node_config"]
        assert node.keys() <= NODE_CONFIG_KEYS[name]
        arm = node.get("azure_arm_parameters", {})
        machine = node.get("InstanceType") or node.get("machineType") or arm["vmSize"]
        assert re.fullmatch(MACHINE[name], machine), machine


@pytest.mark.parametrize("file", IMAGES)
def test_the_images_driver_runs_the_cuda_of_the_lock_file(file):
    """Before (a0c02aba): azure/spot.yaml named an image with driver 560, and CUDA 13 needs 580."""
    lock = (FOLDER / "node" / "requirements.txt").read_text()
    (runtime,) = re.findall(r"^nvidia-cuda-runtime==(\d+)", lock, re.MULTILINE)
    image, driver = IMAGES[file]
    assert image in (FOLDER / file).read_text(), "another image: look up its driver"
    assert driver >= LEAST_DRIVER[int(runtime)]


def test_azures_machines_run_with_the_driver_of_the_image():
    """Before (a0c02aba): low-a10-spot was Standard_NV36ads_A10_v5, whose virtual GPU needs a GRID driver."""
    for name, kind in load("azure/spot")["available_node_types"].items():
        assert not kind["node_config"]["azure_arm_parameters"]["vmSize"].startswith(OWN_DRIVER), name


def test_a_machine_of_aws_that_shuts_down_is_returned():
    """Before (a0c02aba): a shutdown stopped an on-demand machine, whose disk was billed on."""
    for name, kind in load("aws/spot")["available_node_types"].items():
        assert kind["node_config"].get("InstanceInitiatedShutdownBehavior") == "terminate", name


def test_google_deletes_every_worker_in_the_end():
    """Before (a0c02aba): a worker without a head ran until someone noticed."""
    for name, kind in workers(load("gcp/spot")).items():
        scheduling = kind["node_config"]["scheduling"]
        assert scheduling["instanceTerminationAction"] == "DELETE", name
        assert scheduling.get("maxRunDuration") == {"seconds": str(7 * 24 * 3600)}, name


def test_disks_are_of_a_type_that_machines_with_gpus_take():
    """Google Cloud gives a disk without a type pd-standard, which G2 and A3 machines refuse."""
    file = load("gcp/spot")
    types = {
        node["node_config"]["disks"][0]["initializeParams"].get("diskType")
        for node in file["available_node_types"].values()
    }
    assert types == {f"zones/{file['provider']['availability_zone']}/diskTypes/pd-balanced"}


def test_azure_parameters_are_those_of_rays_template():
    template = json.loads((Path(azure.__file__).parent / "azure-vm-template.json").read_text())
    for kind in load("azure/spot")["available_node_types"].values():
        assert kind["node_config"]["azure_arm_parameters"].keys() <= {*template["parameters"], "availability_zone"}


@pytest.mark.parametrize("name", CLOUDS)
def test_the_market_is_the_one_that_the_label_names(name):
    for kind in workers(load(name)).values():
        node = kind["node_config"]
        spot = (
            node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
            or node.get("scheduling", {}).get("provisioningModel") == "SPOT"
            or node.get("azure_arm_parameters", {}).get("priority") == "Spot"
        )
        assert spot == (market(kind) == "spot")


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERNETES, "aws/account"])
def test_nothing_floats(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert not re.search(r":latest\b|[Vv]ersion: latest|nightly|dev0", text)
    assert "0.0.0.0/0" not in text
    for setting in ("--dashboard-host=0.0.0.0", "RAY_AUTH_MODE=disabled"):
        assert setting not in text


@pytest.mark.parametrize("name", [*CLOUDS, "on-prem", "kuberay"])
def test_three_lines_are_the_users(name):
    head, body = re.split(r"^(?=[a-z])", (FOLDER / f"{name}.yaml").read_text(), maxsplit=1, flags=re.MULTILINE)
    assert "marked (1) to (3)" in head
    assert re.findall(r"# \((\d)\)", body) == ["1", "2", "3"]


@pytest.mark.parametrize("name", [*CLOUDS, "on-prem"])
def test_every_node_installs_from_the_lock_file_alone(name):
    config = load(name)
    assert config["setup_commands"][-1] == "~/moedisco/cluster_yaml/node/install.sh"
    everything = [command for key, commands in config.items() if key.endswith("_commands") for command in commands]
    assert not [command for command in everything if re.search(r"\b(pip3?|uv|conda) ", command)]


@pytest.mark.parametrize("name", [*CLOUDS, "on-prem"])
def test_nodes_share_a_folder_of_a_bucket_and_no_file_system(name):
    config = load(name)
    (place,) = re.findall(r"^echo (\S+) >~/moedisco/bucket$", config["setup_commands"][0])
    assert place == {
        "gcp/spot": "gs://MY_BUCKET/moedisco",
        "azure/spot": "abfs://MY_STORAGE_ACCOUNT.blob.core.windows.net/MY_CONTAINER",
    }.get(name, "s3://MY_BUCKET/moedisco")
    assert config["head_start_ray_commands"][-1].endswith('head.sh "$(cat ~/moedisco/bucket)"')
    system, _ = fs.FileSystem.from_uri(place + ("?region=none" if place.startswith("s3:") else ""))
    assert system.type_name == {"gcp/spot": "gcs", "azure/spot": "abfs"}.get(name, "s3")


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in FOLDER.rglob("*")
        if path.is_file() and not (path.name == "requirements.txt" or path.suffix == ".pyc")
    ),
    ids=lambda path: path.name,
)
def test_nothing_mounts_a_file_system_of_another_machine(path):
    shared = r"\bnfs|exportfs|ReadWriteMany|(?<!MY_BUCKET)/moedisco/(runs|data|shared)\b"
    assert not re.search(shared, path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("name", [*CLOUDS, "on-prem"])
def test_every_node_gets_the_token_and_what_it_installs(name):
    mounts = load(name)["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for local in mounts.values():
        assert local.startswith("~") or (ROOT / local).exists()


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
def test_the_cluster_guide_has_the_prices_of_the_file(name):
    types = load_cluster(FOLDER / f"{name}.yaml").types
    cells = [name]
    for tag in ("low_mem_gpu", "high_mem_gpu"):
        prices = [kind.worker_price(tag) for kind in types if tag in kind.slots]
        cells.append(f"{min(prices):.2f} to {max(prices):.2f}")
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "cluster.md").read_text()


def test_kubernetes_and_the_cloud_files_run_the_same_ray():
    text = (FOLDER / "kuberay.yaml").read_text()
    assert f"rayVersion: {version('ray')}" in text
    assert f"moedisco:{version('moedisco-ray')}" in text
