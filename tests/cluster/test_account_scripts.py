"""The scripts that prepare an account, with stand-ins for the clouds' programs: who gets which rights, and reruns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from cluster_files import FOLDER, load

from moedisco_ray.execution.ray.autoscaling import spot_fallback

ACCOUNT = "/subscriptions/me/resourceGroups/data/providers/Microsoft.Storage/storageAccounts/acc"
GROUP = "/subscriptions/me/resourceGroups/moedisco"
STAND_IN = """#!{python}
import json, pathlib, sys
words, log = sys.argv[1:], pathlib.Path({log!r})
read = sys.stdin.read() if "@-" in words else ""
earlier = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
calls = [call["words"] for call in earlier]
verb = next((i for i, word in enumerate(words) if word in ("create", "describe")), 0)
group = [word for word in words[:verb] if word[:1] != "-"]
creation = [*group, "create", words[verb + 1].partition("@")[0]]
made = any(call[:len(creation)] == creation for call in calls)
if words[:2] == ["role", "definition"]:
    made = {{"words": words, "read": read}} in earlier
if words[verb] == "describe":
    sys.exit(not made)
if words[verb] == "create" and made and (words[:2] == ["role", "definition"] or {program!r} == "gcloud"):
    sys.exit("it exists")
with log.open("a") as file:
    print(json.dumps({{"words": words, "read": read}}), file=file)
if words[:2] == ["identity", "create"]:
    print("principal of " + words[words.index("--name") + 1])
elif words[:2] == ["group", "create"]:
    print({group!r})
elif words[:3] == ["storage", "account", "show"]:
    print({account!r})
elif words[:3] == ["role", "definition", "list"]:
    if made:    # it was asked before, and created then
        print("known")
"""


@pytest.fixture
def prepare(tmp_path):
    """Runs a script, and returns the calls of the cloud's program that did not only look, with what they read."""

    def run(program, script, *arguments):
        log = tmp_path / "calls"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        (tmp_path / program).write_text(
            STAND_IN.format(python=sys.executable, program=program, log=str(log), account=ACCOUNT, group=GROUP)
        )
        (tmp_path / program).chmod(0o755)
        subprocess.run(
            ["bash", FOLDER / script, *arguments],
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            check=True,
        )
        return [json.loads(line) for line in log.read_text().splitlines()[before:]]

    return run


def option(words, name):
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


@pytest.mark.slow
def test_a_project_lets_machines_into_one_folder_and_the_head_start_machines(prepare):
    arguments = ("gcloud", "gcp/account.sh", "mine", "bucket/runs", "192.0.2.7/32")
    first = [call["words"] for call in prepare(*arguments)]
    again = [call["words"] for call in prepare(*arguments)]
    head, worker = (f"moedisco-{who}@mine.iam.gserviceaccount.com" for who in ("head", "worker"))
    bound = {
        (
            *words[: words.index("add-iam-policy-binding")],
            words[words.index("add-iam-policy-binding") + 1],
            option(words, "role"),
            option(words, "member"),
        )
        for words in first
        if "add-iam-policy-binding" in words
    }
    assert bound == {
        *(
            ("storage", "managed-folders", "gs://bucket/runs/", "roles/storage.objectUser", f"serviceAccount:{who}")
            for who in (head, worker)
        ),
        ("projects", "mine", "projects/mine/roles/moediscoHead", f"serviceAccount:{head}"),
        ("iam", "service-accounts", worker, "roles/iam.serviceAccountUser", f"serviceAccount:{head}"),
    }
    assert all("gs://bucket/runs/" in words for words in first if words[0] == "storage")
    [role] = [words for words in first if words[:3] == ["iam", "roles", "create"]]
    permissions = option(role, "permissions").split(",")
    assert len(set(permissions)) == 17  # as docs/security.md says
    assert all(re.fullmatch(r"compute\.\w+\.\w+", permission) for permission in permissions)
    assert not [each for each in permissions if "irewall" in each or "setIamPolicy" in each]
    [ssh] = [words for words in first if "moedisco-ssh" in words]
    assert (option(ssh, "allow"), option(ssh, "source-ranges")) == ("tcp:22", "192.0.2.7/32")
    kept = [words for words in first if "create" not in words or words is role]
    assert again == [["iam", "roles", "update", *words[3:]] if words is role else words for words in kept]


def test_a_subscription_lets_machines_into_one_container_that_they_cannot_delete(prepare):
    first, again = (prepare("az", "azure/account.sh", "sub", "acc", "runs") for _ in range(2))
    definition, of_worker = (json.loads(call["read"]) for call in first if call["read"])
    blobs = "Microsoft.Storage/storageAccounts/blobServices/containers"
    assert definition["Actions"] == [f"{blobs}/read"]
    assert set(definition["DataActions"]) == {
        f"{blobs}/blobs/{what}" for what in ("read", "write", "add/action", "delete")
    }
    assert definition["AssignableScopes"] == ["/subscriptions/me/resourceGroups/data"]
    assert of_worker["Actions"] == ["Microsoft.Compute/virtualMachines/deallocate/action"]
    assert "DataActions" not in of_worker
    assert of_worker["AssignableScopes"] == [GROUP]
    assignments = [call["words"] for call in first if call["words"][:3] == ["role", "assignment", "create"]]
    options = [dict(zip(words[3::2], words[4::2], strict=True)) for words in assignments]
    container = f"{ACCOUNT}/blobServices/default/containers/runs"
    assert [(each["--role"], each["--assignee-object-id"], each["--scope"]) for each in options] == [
        (definition["Name"], "principal of moedisco", container),
        (definition["Name"], "principal of moedisco-worker", container),
        (of_worker["Name"], "principal of moedisco-worker", GROUP),
    ]
    # `az` itself keeps what exists, except for a role of the same name, which is an error.
    assert again == [call for call in first if call["words"][:3] != ["role", "definition", "create"]]


def test_a_worker_of_azure_does_not_get_the_heads_identity(monkeypatch):
    """Before (a0c02aba): all machines had the identity `moedisco`, a contributor to the resource group."""
    provider = load("azure/spot")["provider"]
    identities = f"{GROUP}/providers/Microsoft.ManagedIdentity/userAssignedIdentities"
    made = []

    class Launcher:
        def __init__(self, provider_config, _cluster_name):
            self.provider_config = provider_config

        def create_node(self, _node_config, tags, _count):
            made.append((tags["ray-node-type"], self.provider_config["msi"]))

        def create_node_with_resources_and_labels(self, node_config, tags, count, _resources, _labels):
            self.create_node(node_config, tags, count)

    monkeypatch.setattr(spot_fallback, "node_provider_class", lambda _name: Launcher)
    head, autoscaler = (
        spot_fallback.Azure(provider | {"msi": f"{identities}/{provider['msi_name']}"}, "moedisco") for _ in range(2)
    )
    head.create_node({}, {"ray-node-type": "head"}, 1)
    for _ in range(2):
        autoscaler.create_node_with_resources_and_labels({}, {"ray-node-type": "worker"}, 1, {}, {})
    assert made == [("head", f"{identities}/moedisco"), *[("worker", f"{identities}/moedisco-worker")] * 2]
    assert "az identity create --name moedisco-worker " in (FOLDER / "azure" / "account.sh").read_text()
