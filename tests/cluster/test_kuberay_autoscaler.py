"""The literal `ray kuberay-autoscaler` with the files that kuberay.yaml mounts, against a stand-in for Kubernetes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_files import kubernetes_objects
from test_kuberay_file import mounted_files

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: own namespaces of networks, mounts and processes"),
]

SCRIPT = """
set -e
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p "$MOUNTED"; cp $FILES "$MOUNTED"
export KUBERNETES_SERVICE_HOST=127.0.0.1 KUBERNETES_SERVICE_PORT_HTTPS=8443 RAY_enable_autoscaler_v2=1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32)
export RAY_CLOUD_INSTANCE_ID=moedisco-head RAY_NODE_TYPE_NAME=headgroup
python "$API" . 8443 >api.log 2>&1 &
ray start --head --num-cpus=0 --port=6379 --include-dashboard=false --no-monitor --temp-dir=/run/ray >ray.log 2>&1
ray kuberay-autoscaler --cluster-name moedisco --cluster-namespace default >autoscaler.log 2>&1 &
python demand.py >demand.log 2>&1 &
for _ in $(seq 100); do [ -s patches.jsonl ] && exit 0; sleep 1; done
exit 1
"""
DEMAND = """
import time
import ray

ray.init("127.0.0.1:6379", logging_level="ERROR")


@ray.remote(num_cpus=0, resources={"low_mem_gpu": 1})
def train():
    pass


waiting = [train.remote() for _ in range(3)]
time.sleep(200)
"""


def test_waiting_sub_models_make_the_pool_grow(tmp_path: Path) -> None:
    """Before: `FileNotFoundError: /var/run/secrets/kubernetes.io/serviceaccount/token`, and no worker ever."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    cluster = next(each for each in kubernetes_objects() if each["kind"] == "RayCluster")["spec"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "ca.crt", *subject],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (tmp_path / "server.pem").write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "ca.crt").read_bytes())
    (tmp_path / "token").write_text("the autoscaler's")
    (tmp_path / "namespace").write_text("default")
    (tmp_path / "demand.py").write_text(DEMAND)
    environment = {
        "API": str(Path(__file__).with_name("kubernetes_api.py")),
        "FILES": " ".join(mounted_files(cluster)),
        "MOUNTED": cluster["autoscalerOptions"]["volumeMounts"][0]["mountPath"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    logs = "".join(path.read_text(errors="replace")[-1500:] for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    asked = json.loads((tmp_path / "patches.jsonl").read_text().splitlines()[0])
    group = next(i for i, each in enumerate(cluster["workerGroupSpecs"]) if each["groupName"] == "low-l4-spot")
    assert asked == [{"op": "replace", "path": f"/spec/workerGroupSpecs/{group}/replicas", "value": 3}]
