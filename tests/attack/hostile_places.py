"""What an attacker writes into a setting that names a place, generated for every marked setting of the model."""

from __future__ import annotations

import copy
from typing import Any

from place_settings import marked

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import WritesTo

SECRET = "wJalrXUtnFEMI"
"""Part of every credential below; it must appear in no answer and no log."""

LOCAL = {
    "traversal": "../secret/key.txt",
    "traversal inside": "a/../../secret/key.txt",
    "traversal, backslashes": "..\\secret",
    "traversal, percent-encoded": "%2e%2e/secret",
    "traversal, slash percent-encoded": "a%2f..%2f..%2fsecret",
    "absolute": "/etc/cron.d",
    "absolute, root": "/",
    "absolute, into proc": "/proc/self/environ",
    "link": "link",
    "through a link": "link/key.txt",
    "home": "~/x",
    "other home": "~root/x",
    "NUL": "a\0b",
    "newline": "a\nb",
    "carriage return": "a\rb",
    "too long": "a/" * 3000,
    "file URI": "file:///etc/passwd",
    "file URI without an authority": "file:/etc/passwd",
    "Windows drive": "C:\\Windows",
}
"""Hostile for every setting."""

URIS = {
    "other scheme": "ftp://example.org/x",
    "server-side request": "http://169.254.169.254/latest/meta-data",
    "server-side request, https": "https://internal/x",
    "foreign bucket": "s3://other/x",
    "foreign bucket of another cloud": "gs://texts/wiki",
    "bucket without its prefix": "s3://texts",
    "prefix as a part of a name": "{bucket}2/x",
    "traversal in a bucket": "{bucket}/../x",
    "traversal in a bucket, percent-encoded": "{bucket}/%2e%2e/x",
    "traversal in a bucket, encoded twice": "{bucket}%2f..%2fx",
    "endpoint": "{bucket}/x?endpoint_override=http://169.254.169.254",
    "endpoint, percent-encoded": "{bucket}/x?endpoint%5Foverride=evil",
    "endpoint after a harmless option": "{bucket}/x?region=r&endpoint_override=evil",
    "plain HTTP": "{bucket}/x?scheme=http",
    "proxy": "{bucket}/x?proxy_options=http://evil",
    "certificates": "{bucket}/x?tls_ca_file_path=/etc/x",
    "making buckets": "{bucket}/x?allow_bucket_creation=true",
    "fragment": "{bucket}/x#y",
    "hub": "hf://other/model",
    "hub, an allowed name as a part of another": "hf://allowed2/model",
    "hub, traversal": "hf://allowed/../other/model",
    "hub, traversal percent-encoded": "hf://allowed/%2e%2e/other",
    "hub, a revision that leads elsewhere": "hf://other/allowed@../../allowed",
    "hub, another endpoint": "hf://allowed/model?endpoint=http://169.254.169.254",
    "hub without slashes": "hf:allowed/model",
    "newline in a URI": "{bucket}/x\ny",
    "NUL in a URI": "{bucket}/x\0y",
}
"""Hostile for every setting; `{bucket}` is the one that the operator allows."""

CREDENTIALS = {
    "user and password": f"s3://AKIA:{SECRET}@texts/wiki",
    "password with a slash": f"s3://AKIA:{SECRET}/x+y@texts/wiki",
    "colon percent-encoded": f"s3://AKIA%3A{SECRET}@texts/wiki",
    "key alone": f"s3://{SECRET}@texts/wiki",
    "access key": f"{{bucket}}/x?access_key={SECRET}",
    "secret key": f"{{bucket}}/x?region=r&secret_key={SECRET}",
    "session token": f"{{bucket}}/x?session_token={SECRET}",
    "encoded name": f"{{bucket}}/x?secret%5Fkey={SECRET}",
    "signature": f"{{bucket}}/x?X-Amz-Signature={SECRET}",
    "Azure": f"abfss://c:{SECRET}@account.dfs.core.windows.net/x",
}

NEEDS: dict[str, dict[str, Any]] = {
    "model.init.checkpoint": {"tokens": {"seed_share": 0}},
    "pools.owners.alice.storage": {
        "pools": {"owners": {"alice": {"resource": "alice_gpu"}}},
        "finetune": {"keep_optimizer_state": False},
        "corpus": {"sources": [{"path": "embedded"}, {"path": "s3://texts/wiki/alice", "owner": "alice"}]},
    },
}
"""What else a configuration must say for a setting to be looked at."""

WRITTEN_LINKS = ("link.txt", "link/new")


def cases() -> list[tuple[str, str, str]]:
    """Setting (an entry of a list is its first), kind of attack and value."""
    found = []
    for field, (_, marker) in marked(RunConfig).items():
        written = isinstance(marker, WritesTo)
        bucket = "s3://checkpoints/moe" if written else "s3://texts/wiki"
        table = (
            LOCAL
            | URIS
            | CREDENTIALS
            | ({f"link {i}": link for i, link in enumerate(WRITTEN_LINKS)} if written else {})
        )
        entry = field.replace("owners.*", "owners.alice").replace("*", "0")
        found += [(entry, kind, value.replace("{bucket}", bucket)) for kind, value in table.items()]
    return found


def configuration(field: str, value: str) -> dict[str, Any]:
    """The smallest configuration with one setting."""
    raw: dict[str, Any] = {
        "name": "attack",
        "corpus": {"sources": [{"path": "embedded"}]},
        **copy.deepcopy(NEEDS.get(field, {})),
    }
    put(raw, field.split("."), value)
    return raw


def put(node: Any, parts: list[str], value: Any) -> None:
    """Set an entry of plain data, with the sections and lists above it."""
    first, *rest = parts
    key: Any = int(first) if first.isdigit() else first
    if not rest:
        new: Any = value
    else:
        new = (
            node[key]
            if (key in node if isinstance(node, dict) else key < len(node))
            else ([] if rest[0].isdigit() else {})
        )
        put(new, rest, value)
    if isinstance(node, list) and key == len(node):
        node.append(new)
    else:
        node[key] = new
