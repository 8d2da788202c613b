"""AWS on loopback: a moto server with the account of aws/account.yaml, and the environment that its clients need."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qsl

import boto3
import yaml
from moto.moto_api._internal import moto_api_backend
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws.utils import client_cache, resource_cache

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-east-1"
IMAGE_PARAMETER = "/vendor/image"
"""Stands for the vendor's public parameter, which moto does not have."""


class Template(yaml.SafeLoader):
    """Reads a stack's template, with its functions in their long form."""


def _function(loader, name, node):
    construct = {yaml.ScalarNode: loader.construct_scalar, yaml.SequenceNode: loader.construct_sequence}[type(node)]
    arguments = construct(node, deep=True) if isinstance(node, yaml.SequenceNode) else construct(node)
    return {name if name == "Ref" else f"Fn::{name}": arguments}


Template.add_multi_constructor("!", _function)


def empty():
    """Make AWS as it was: accounts live in the process, not in the server."""
    moto_api_backend.reset()
    for cache in (resource_cache, client_cache, aws_config._get_subnets_or_die):
        cache.cache_clear()


@contextlib.contextmanager
def aws_server():
    """Yield the URL of an empty AWS."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    empty()
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}"
    finally:
        server.stop()


def credentials(url):
    """Environment variables that lead any AWS client to the server, and to nowhere else."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@functools.cache
def client(url, service):
    return boto3.client(
        service, region_name=REGION, endpoint_url=url, aws_access_key_id="testing", aws_secret_access_key="testing"
    )


@functools.cache
def _image(url):
    """An image of the server, which has the same ones after `empty`."""
    return client(url, "ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]


def deploy_account(url):
    """Make the stack, as `aws cloudformation deploy` does."""
    client(url, "ssm").put_parameter(Name=IMAGE_PARAMETER, Value=_image(url), Type="String")
    stacks = client(url, "cloudformation")
    # moto's stacks cannot make a service-linked role.
    given = {"Bucket": "corpus", "Zone": "us-east-1a", "SshFrom": "203.0.113.7/32", "SpotRole": "exists"}
    template = (ROOT / "cluster_yaml" / "aws/account.yaml").read_text()
    stacks.create_stack(
        StackName="moedisco",
        TemplateBody=re.sub(r"/aws/service/deeplearning/\S+", IMAGE_PARAMETER, template),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
    )
    (disk,) = client(url, "ec2").describe_volumes()["Volumes"]
    # moto's stacks leave out a volume's tags.
    volume = yaml.load(template, Template)["Resources"]["StateDisk"]["Properties"]
    client(url, "ec2").create_tags(Resources=[disk["VolumeId"]], Tags=volume["Tags"])


def instances(url, *states):
    """All instances, or those in the given states."""
    found = client(url, "ec2").describe_instances()
    machines = [machine for reservation in found["Reservations"] for machine in reservation["Instances"]]
    return [machine for machine in machines if not states or machine["State"]["Name"] in states]


def tags(machine):
    return {tag["Key"]: tag["Value"] for tag in machine.get("Tags", ())}


def role_statements(url, role):
    """Statements of a role, flat."""
    iam = client(url, "iam")
    names = iam.list_role_policies(RoleName=role)["PolicyNames"]
    documents = [iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"] for name in names]
    assert not iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]
    # As text it comes in Python's quotes or in JSON's: YAML reads both.
    return [statement for document in documents for statement in yaml.safe_load(str(document))["Statement"]]


class Role:
    """Answers requests to S3 as AWS does for a role: those that its statements do not allow are refused.

    Args:
        app: The server.
        statements: Statements of the role, with actions, resources, and conditions on the prefix of a listing.
    """

    def __init__(self, app, statements):
        self._app = app
        self._statements = statements
        self.refused = []

    def __call__(self, environ, start_response):
        needed = list(self._needed(environ))
        if all(self._allows(*each) for each in needed):
            return self._app(environ, start_response)
        self.refused.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", "")))
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]

    def _needed(self, environ):
        """Action, resource and prefix of each permission that a request needs."""
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        query = dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
        method, arn = environ["REQUEST_METHOD"], f"arn:aws:s3:::{bucket}"
        if bucket.startswith("$"):  # pyarrow asks what kind of server this is
            return
        if not key and method == "POST" and "delete" in query:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = io.BytesIO(body)
            for found in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                yield "s3:DeleteObject", f"{arn}/{found}", None
        elif not key:
            yield ("s3:ListBucket" if method in ("GET", "HEAD") else "s3:CreateBucket"), arn, query.get("prefix")
        elif method == "DELETE":
            yield ("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"), f"{arn}/{key}", None
        else:
            yield ("s3:GetObject" if method in ("GET", "HEAD") else "s3:PutObject"), f"{arn}/{key}", None
            if method in ("GET", "HEAD"):  # a missing key is a 404 only for roles that may list it
                yield "s3:ListBucket", arn, key

    def _allows(self, action, resource, prefix):
        return any(allows(each, action, resource, prefix) for each in self._statements)


def allows(statement, action, resource, prefix):
    if action not in listed(statement["Action"]) or not matches(resource, listed(statement["Resource"])):
        return False
    if "Condition" not in statement:
        return True
    return prefix is not None and matches(prefix, statement["Condition"]["StringLike"]["s3:prefix"])


def matches(text, patterns):
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def listed(value):
    return [value] if isinstance(value, str) else value


def stand_ins(folder, log):
    """`ssh` and `rsync` that write down what they were asked and succeed; `ssh` answers what the launcher reads."""
    folder.mkdir()
    for name, answer in (("ssh", 'case "$*" in *uptime*) echo up ;; esac'), ("rsync", "")):
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >>"{log}"\n{answer}\nexit 0\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def cluster_file(name="aws/spot.yaml"):
    return yaml.safe_load((ROOT / "cluster_yaml" / name).read_text())
