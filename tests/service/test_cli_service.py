import functools
import io
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import types
from pathlib import Path

import httpx
import pytest
from client_standin import RUN, URL, Body, event_stream, problem
from run_example import report
from typer.testing import CliRunner

import service.client
from moedisco_ray.cli.app import app as training
from moedisco_ray.core.config.presets import preset_text
from service import process
from service.cli import app
from service.client import Client, load_address
from service.commands import connection
from service.settings import Settings

HEAVY = ("torch", "ray", "sqlalchemy", "fastapi", "starlette", "uvicorn", "numpy", "httpx", "structlog", "alembic")
NAMED = f"moedisco: the service at {URL} (started last by this user)\n"
ID = RUN["id"]
PLAIN = {key: value for key, value in RUN.items() if key != "config"}
OTHERS = [
    PLAIN | {"id": "01JABCDEFGHJKMNPQRSTVWXYZ9", "name": "twin"},
    PLAIN,
    PLAIN | {"id": "01J0BCDEFGHJKMNPQRSTVWXYZ1", "name": "twin"},
]
UNIT = {
    "unit": "submodel-0",
    "stage": "submodels",
    "status": "running",
    "step": 5,
    "steps": 10,
    "tokens": 5000,
    "loss": 3.25,
    "tokens_per_second": 1200.0,
    "restarts": 1,
    "workers": 1,
    "node": "10.0.0.7",
    "started": 2.0,
    "ended": None,
}
EVENTS = [
    {
        "type": "state",
        "stage": None,
        "unit": None,
        "data": {"state": "queued", "reason": "waits for 2 low_mem_gpu"},
        "time": 1.0,
    },
    {
        "type": "run_started",
        "stage": None,
        "unit": None,
        "data": {"name": "demo", "directory": "/runs/demo", "stages": ["corpus"]},
        "time": 2.0,
    },
    {"type": "stage_started", "stage": "corpus", "unit": None, "data": {}, "time": 3.0},
    {"type": "heartbeat", "stage": None, "unit": None, "data": {}, "time": 4.0},
    {"type": "stage_finished", "stage": "corpus", "unit": None, "data": {"seconds": 2.0}, "time": 5.0},
]
POOL = {
    "resource": "low_mem_gpu",
    "slots": 4.0,
    "free": 3.0,
    "gpus": 4.0,
    "price_per_hour": 0.35,
    "lost": 1,
    "pending": 2,
    "nodes": [{"id": "n", "address": "10.0.0.7", "alive": True, "resources": {}, "labels": {}}],
}
TOKEN = {
    "id": "T1",
    "name": "ci",
    "owner": "ann",
    "scopes": ["submit"],
    "created": 1.0,
    "expires": None,
    "revoked": 2.0,
    "used": None,
}
PROJECT = RUN["project"] | {"name": "law", "created": 1.0, "members": [{"name": "bob", "role": "editor"}]}
SPENT = {"owner": "ann", "project": "P1", "project_name": "law", "month": "2026-12", "dollars": 12.5}
SECRET = {"name": "HF_TOKEN", "set_by": "bob", "updated": 1.0}
NOTICES = {"shown": "slack://...", "set_by": "bob", "updated": 1.0, "sent": None, "failure": "status 404"}
POLICIES = {"default": {"prices": {"low_mem_gpu": 0.35}}, "owners": {"ann": {"highest_priority": 5}}}
QUOTA = {
    "owner": "ann",
    "resources": None,
    "prices": {"low_mem_gpu": 0.35},
    "highest_priority": 0,
    "queued_runs": {"used": 12, "limit": 100},
    "active_runs": {"used": 1, "limit": None},
    "dollars": {"used": 1.5, "limit": 500},
    "month": "2026-11",
    "month_ends": 1.0,
    "disk_bytes": {"used": 2e9, "limit": None},
    "retention": {"days": 30},
}
_COMPARED = {"name": "demo", "owner": "ann", "state": "succeeded", "tags": {}, "dollars": 1.5, "seconds": 60.0}
_FIGURES = {"tokens": 1_000_000, "loss": 3.5, "perplexity": 33.1, "bits_per_byte": 1.2}
COMPARISON = {
    "runs": [_COMPARED | _FIGURES | {"id": run_id} for run_id in (ID, "01JABCDEFGHJKMNPQRSTVWXYZ9")],
    "same_text": True,
    "settings": [{"setting": "finetune.optimizer.lr", "values": [0.001, "auto"]}],
    "stages": [
        {
            "stage": "seed",
            "seconds": [60.0, None],
            "dollars": [0.5, None],
            "tokens": [1000, None],
            "perplexity": [40.0, None],
        }
    ],
    "sources": [{"source": "all", "perplexity": [33.1, 34.2], "bits_per_byte": [1.2, 1.3]}],
    "samples": [{"prompt": "The", "texts": ["The end", None]}],
}
DATASET = {
    "id": "01JABCDEFGHJKMNPQRSTVWXYZ2",
    "name": "wiki",
    "hash": "0123456789abcdef" * 4,
    "owner": "ann",
    "project": "01JABCDEFGHJKMNPQRSTVWXYZ1",
    "role": "owner",
    "bytes": 12_345,
    "count": 2,
    "created": 1.0,
}


class Fake:
    """A service with three runs; one of them has events."""

    def __init__(self):
        self.requests = []
        self.final = RUN | {"state": "succeeded"}
        self.answers = {
            ("GET", "/v1/runs"): {"items": OTHERS, "next_cursor": None},
            ("POST", "/v1/runs"): RUN,
            ("POST", f"/v1/runs/{ID}/cancel"): RUN | {"state": "stopping"},
            ("POST", f"/v1/runs/{ID}/resume"): RUN | {"state": "queued"},
            ("POST", f"/v1/runs/{ID}/retry"): RUN | {"state": "queued"},
            ("DELETE", f"/v1/runs/{ID}"): None,
            ("GET", f"/v1/runs/{ID}/submodels"): {"items": [UNIT]},
            ("GET", f"/v1/runs/{ID}/report"): report(),
            ("GET", f"/v1/runs/{ID}/logs"): {
                "items": [
                    {"name": name, "bytes": 10, "updated": 1.0}
                    for name in ("driver", "finetune.1", "finetune.0", "submodel-0.0")
                ]
            },
            ("GET", "/v1/comparison"): COMPARISON,
            ("GET", "/v1/pools"): {"connected": True, "items": [POOL]},
            ("GET", "/v1/policies"): POLICIES,
            ("PUT", "/v1/policies"): POLICIES,
            ("PUT", "/v1/policies/owners/bob"): {},
            ("DELETE", "/v1/policies/owners/ann"): None,
            ("GET", "/v1/quota"): QUOTA,
            ("GET", "/v1/projects"): {"items": [PROJECT], "next_cursor": None},
            ("PATCH", "/v1/projects/law"): PROJECT,
            ("DELETE", "/v1/projects/law"): None,
            ("GET", "/v1/spending"): {"items": [SPENT]},
            ("POST", "/v1/projects"): PROJECT,
            ("PUT", "/v1/projects/law/members/bob"): PROJECT,
            ("DELETE", "/v1/projects/law/members/bob"): None,
            ("GET", "/v1/datasets"): {"items": [DATASET], "next_cursor": None},
            ("GET", f"/v1/datasets/{DATASET['id']}"): DATASET | {"files": []},
            ("POST", "/v1/datasets"): {"dataset": DATASET, "missing": []},
            ("DELETE", f"/v1/datasets/{DATASET['id']}"): None,
            ("GET", "/v1/identity"): {"owner": "ann", "scopes": ["read"], "version": "1", "dashboard_url": None},
            ("GET", "/v1/projects/ann/secrets"): {"items": [SECRET]},
            ("PUT", "/v1/projects/law/secrets/HF_TOKEN"): SECRET,
            ("DELETE", "/v1/projects/law/secrets/HF_TOKEN"): None,
            ("GET", "/v1/projects/ann/notices"): NOTICES,
            ("PUT", "/v1/projects/law/notices"): NOTICES,
            ("POST", "/v1/projects/law/notices/test"): None,
            ("DELETE", "/v1/projects/law/notices"): None,
            ("GET", "/v1/tokens"): {"items": [TOKEN], "next_cursor": None},
            ("POST", "/v1/tokens"): TOKEN | {"token": "mdk_new"},
            ("POST", "/v1/tokens/T1/rotate"): TOKEN | {"token": "mdk_next"},
            ("DELETE", "/v1/tokens/T1"): None,
        }

    def __call__(self, request):
        self.requests.append(request)
        path = request.url.path
        if (request.method, path) == ("GET", f"/v1/runs/{ID}"):
            return httpx.Response(200, json=self.final)
        if path.endswith("/events"):
            return self.events()
        if "/logs/" in path:
            return httpx.Response(200, stream=Body([f"log of {path.rpartition('/')[2]}\nlast\n".encode()]))
        if path.endswith(("/artifacts", "/model.tar")):
            return self.model(path)
        answer = self.answers.get((request.method, path), problem(404, f"nothing at {path}"))
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(204) if answer is None else httpx.Response(200, json=answer)

    def events(self):
        text = "".join(f"id: {n}\nevent: {e['type']}\ndata: {json.dumps(e)}\n\n" for n, e in enumerate(EVENTS))
        return event_stream([text.encode(), b"event: end\ndata: {}\n\n"])

    def model(self, path):
        if path.endswith("/artifacts"):
            return httpx.Response(200, json={"items": [{"path": "model/config.json", "bytes": 2, "updated": 1.0}]})
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w") as tar:
            member = tarfile.TarInfo("demo/config.json")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
        return httpx.Response(200, content=memory.getvalue())

    @property
    def sent(self):
        return json.loads(self.requests[-1].content)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(
        service.client, "Client", functools.partial(Client, URL, "t", transport=httpx.MockTransport(fake))
    )
    return fake


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(preset_text("demo"))
    return "demo.yaml"


def invoke(*arguments, typed=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed, prog_name="moedisco")


def ran(*arguments, typed=None):
    result = invoke(*arguments, typed=typed)
    assert result.exit_code == 0, result.output
    return result.stdout


def mistake(*arguments, code=2):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    complaint = result.stderr.removeprefix(NAMED)
    assert complaint.count("\n") == 1
    return complaint.rstrip("\n")


def test_every_command_has_help():
    commands = {command.name or command.callback.__name__ for command in training.registered_commands}
    assert commands == {
        "run",
        "plan",
        "init",
        "validate",
        "schema",
        "show",
        "plot",
        "evaluate",
        "export",
        "push",
        "experts",
        "merge",
        "chat",
        "verify",
        "doctor",
        "join",
        "join_token",
        "join_gateway",
    }
    ours = {
        "serve",
        "submit",
        "list",
        "status",
        "watch",
        "logs",
        "cancel",
        "resume",
        "retry",
        "delete",
        "download",
        "pools",
        "estimate",
        "tokens",
        "projects",
        "secrets",
        "notify",
        "spending",
        "policies",
        "quota",
        "change",
    }
    shown = ran("--help")
    for command in {name.replace("_", "-") for name in commands} | ours:
        assert f"│ {command} " in shown
        assert f"Usage: moedisco {command}" in ran(command, "--help")


def test_the_training_commands_work_unchanged(config):
    assert "GiB per worker" in ran("plan", config)
    assert ran("--version") == CliRunner().invoke(training, ["--version"]).stdout
    assert (
        mistake("plan", config, "--set", "tokns.total=1") == "moedisco: tokns: no such setting; did you mean 'tokens'?"
    )


def test_starting_imports_nothing_heavy_and_is_quick():
    program = (
        "import sys, contextlib, io\n"
        "from service.cli import main\n"
        "helps = (['--help'], ['submit', '--help'], ['serve', '--help'])\n"
        "for arguments in (*helps, ['submit', 'missing.yaml'], ['schema']):\n"
        "    sys.argv = ['moedisco', *arguments]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert result.stderr.startswith("moedisco: CONFIG: 'missing.yaml': cannot be read")

    # Function calls, not seconds, which depend on the machine's load. 790,000 calls take 0.6 s, and a command has
    # 10,000 of them. Importing torch doubles them.
    profiled = (
        "import cProfile, contextlib, io, pstats, sys\n"
        "profile = cProfile.Profile()\n"
        "profile.enable()\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    from service.cli import main\n"
        "    main()\n"
        "profile.disable()\n"
        "print(pstats.Stats(profile).total_calls)\n"
    )
    start = subprocess.run([sys.executable, "-c", profiled, "--help"], capture_output=True, text=True, check=True)
    assert 500_000 < int(start.stdout) < 900_000


def test_submit_sends_absolute_paths_and_leaves_the_output_to_the_service(fake, config, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "here").symlink_to(tmp_path)
    paths = ("books", f"here/../{tmp_path.name}/books", "'s3://b/c'", "embedded")
    sources = ", ".join(f"{{path: {path}}}" for path in paths)
    settings = ("--set", f"corpus.sources=[{sources}]")
    line = ran("submit", config, *settings, "--name", "mine", "--priority", "5", "--budget", "2.5")
    assert line == f"{ID}  demo: running; next: moedisco watch {ID}\n"
    assert (fake.sent["priority"], fake.sent["budget_dollars"]) == (5, 2.5)
    asked = fake.sent["config"]
    assert asked["name"] == "mine"
    assert [source["path"] for source in asked["corpus"]["sources"]] == [str(tmp_path / "books")] * 2 + [
        "s3://b/c",
        "embedded",
    ]
    assert "output" not in asked
    ran("submit", config, "--set", "output=elsewhere", "--json")
    assert fake.sent["config"]["output"] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["123", "2026-10-01", "null", "a𐐀"])
def test_a_name_is_text(fake, config, name):
    ran("submit", config, "--name", name)
    assert fake.sent["config"]["name"] == name
    assert mistake("submit", config, "--name", f"{name} #2").startswith(f"moedisco: name: '{name} #2': ")


def test_submit_refuses_a_mistake_before_anything_is_sent(fake, config):
    assert mistake("submit", config, "--set", "clusters.count=3").startswith(
        "moedisco: clusters.count: 3 does not divide"
    )
    assert not fake.requests


def test_submit_may_go_on_to_watch(fake, config):
    out = ran("submit", config, "--watch")
    assert out.startswith(f"{ID}  demo\n")
    assert "corpus: finished" in out
    assert [json.loads(line)["type"] for line in ran("submit", config, "--watch", "--json").splitlines()] == [
        event["type"] for event in EVENTS
    ]


def test_list(fake):
    out = ran("list", "--state", "running", "--state", "queued", "--tag", "team:a", "--owner", "ann")
    assert str(fake.requests[0].url.query, "ascii") == "state=running&state=queued&owner=ann&tag=team%3Aa&limit=50"
    assert re.search(f"{ID} +demo +ann +running ", out)
    assert len(json.loads(ran("list", "--limit", "2", "--json"))) == 2
    assert mistake("list", "--tag", "team") == "moedisco: --tag: 'team': must read KEY:VALUE"


def test_a_list_has_the_figures_of_models_and_is_sorted_by_the_service(fake):
    figures = [{"perplexity": 31.5, "bits_per_byte": 1.234, "tokens": 2_000_000}, {}, {"perplexity": 30.25}]
    items = [run | {"results": each} for run, each in zip(OTHERS, figures, strict=True)]
    items[0]["note"] = "a higher rate\nthan before"
    fake.answers["GET", "/v1/runs"] = {"items": items, "next_cursor": None}
    out = ran("list", "--sort", "-perplexity", "--where", "perplexity<40", "--where", "tokens>=1e6")
    assert str(fake.requests[0].url.query, "ascii") == (
        "where=perplexity%3C40&where=tokens%3E%3D1e6&order_by=-perplexity&limit=50"
    )
    assert re.search(r"31.50 +1.234 +2.00M +a higher rate$", out, re.MULTILINE)
    assert "30.25 best" in out
    assert "31.50 best" not in out


def test_a_run_gets_a_note(fake):
    fake.answers["PATCH", f"/v1/runs/{ID}"] = RUN | {"note": "a higher rate"}
    ran("change", "demo", "--note", "a higher rate")
    assert json.loads(fake.requests[-1].content) == {"note": "a higher rate"}


def test_status(fake):
    fake.final = RUN | {"reason": "waits for 2 low_mem_gpu", "tags": {"team": "a"}, "position": 3, "state": "queued"}
    out = ran("status", "demo")
    for words in (
        "demo",
        "queued (#3)",
        "waits for 2 low_mem_gpu",
        "team: a",
        "corpus",
        "submodel-0",
        "5/10",
        "3.2500",
        "10.0.0.7",
        "$0.5000, or $0.7500 with idle machines, in 1 min 30 s; planned $1.00 and 1 min 30 s",
    ):
        assert words in out
    assert json.loads(ran("status", ID, "--json"))["position"] == 3


@pytest.mark.parametrize("text", [ID, ID.lower(), "demo", "01JABCDEFGHJKMNPQRSTVWXYZ0"[:25] + "0", " demo "])
def test_a_run_is_found_by_id_and_by_name(fake, text):
    assert ran("resume", text).startswith(f"{ID}  demo: queued")


def test_a_run_is_found_by_the_first_letters_of_its_id(fake):
    fake.answers["GET", "/v1/runs"]["items"] = OTHERS[1:]
    assert ran("resume", "01ja").startswith(ID)


def test_a_run_that_is_not_one(fake):
    assert mistake("status", "nobody") == "moedisco: RUN: 'nobody': no such run; `moedisco list` shows your runs"
    assert mistake("status", "").startswith("moedisco: RUN: '': no such run")
    assert "is the name of 2 runs; give the id of one: 01JABCDEFGHJKMNPQRSTVWXYZ9, 01J0" in mistake("status", "twin")
    assert "begins the ids of 3 runs; give more letters" in mistake("status", "01J")


def test_watch_shows_a_run_as_a_local_run_is_shown(fake):
    out = ran("watch", "demo")
    assert "queued: waits for 2 low_mem_gpu\n" in out
    assert out.index("run demo in /runs/demo") < out.index("corpus: started") < out.index("corpus: finished in 2.0 s")
    assert "joint training on 1 x A100 (estimate)" in out
    assert out.endswith(f"To get the model: moedisco download {ID}\n")
    assert [json.loads(line)["type"] for line in ran("watch", "demo", "--json").splitlines()] == [
        event["type"] for event in EVENTS
    ]


@pytest.mark.parametrize(
    ("state", "reason", "line"),
    [
        ("failed", "the loss is\nnan", "moedisco: run demo failed: the loss is nan"),
        ("cancelled", None, "moedisco: run demo cancelled: no reason is known"),
    ],
)
def test_watch_of_a_run_that_does_not_succeed(fake, state, reason, line):
    fake.final = RUN | {"state": state, "reason": reason}
    assert mistake("watch", ID, code=1) == line


def test_watch_and_status_say_first_that_a_run_ended_worse_than_its_start(fake):
    """The verdict stands above the report, and next to the state.

    Before (af276e38): the report began with `demo  qwen3_moe`, and a succeeded run had no reason.
    """
    worse = "WORSE THAN ITS START: perplexity 94.50, the start had 67.30 on the same text"
    figures = {"loss": math.log(94.5), "documents": 4, "tokens": 50, "start": {"loss": math.log(67.3)}}
    path = f"/v1/runs/{ID}/report"
    fake.answers["GET", path] = fake.answers["GET", path] | {"evaluation": figures}
    out = ran("watch", "demo").splitlines()
    assert next(line for line in out[out.index("") + 1 :] if line) == worse
    fake.final |= {"reason": worse}
    assert ran("status", "demo").splitlines()[2] == worse


def test_ctrl_c_ends_watching_and_not_the_run(fake):
    def interrupted():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return event_stream([])

    fake.events = interrupted
    assert mistake("watch", "demo", code=130) == f"moedisco: the run continues: moedisco watch {ID}"
    assert {request.method for request in fake.requests} == {"GET"}


def test_logs(fake):
    assert ran("logs", "demo", "--tail", "7") == "log of driver\nlast\n"
    assert fake.requests[-1].url.params["tail"] == "7"
    assert ran("logs", "demo", "--unit", "submodel-0") == "log of submodel-0.0\nlast\n"
    assert ran("logs", "demo", "--unit", "finetune.1") == "log of finetune.1\nlast\n"
    assert ran("logs", "demo", "--unit", "finetune", "--follow") == "log of finetune.0\nlast\n"
    assert json.loads(ran("logs", "demo", "--json")) == {"name": "driver", "lines": ["log of driver", "last"]}
    assert "submodel-0.0" in ran("logs", "demo", "--list")
    assert "--unit: 'seed': has no log; the run's logs: driver, finetune.0, " in mistake(
        "logs", "demo", "--unit", "seed"
    )


def test_cancel_resume_retry_delete(fake):
    assert ran("cancel", "demo", "--force") == f"{ID}  demo: stopping\n"
    assert fake.sent == {"force": True}
    assert json.loads(ran("resume", "demo", "--json"))["state"] == "queued"
    assert ran("retry", "demo", "--set", "tokens.total=5", "--set", "name=b", "--budget", "3") == (
        f"{ID}  demo: queued; next: moedisco watch {ID}\n"
    )
    assert fake.sent == {"changes": {"tokens.total": 5, "name": "b"}, "budget_dollars": 3.0, "reuse": "auto"}
    for value in ("2026-10-01", "[2026-10-01]", ".inf", "!!binary aa=="):
        assert f"--set: 'name={value}': JSON has no such value" in mistake("retry", "demo", "--set", f"name={value}")
    ran("retry", "demo", "--budget", "none")
    assert fake.sent == {"changes": {}, "budget_dollars": None, "reuse": "auto"}
    assert "must read key.sub=value" in mistake("retry", "demo", "--set", "tokens")
    assert ran("delete", "demo", "--keep-artifacts") == f"{ID}  demo: deleted\n"
    assert fake.requests[-1].url.params["keep_artifacts"] == "true"


def test_download(fake, config, tmp_path):
    assert ran("download", "demo") == f"The model is in {tmp_path / 'demo'}\n"
    assert (tmp_path / "demo" / "config.json").read_text() == "{}"
    assert "exists already" in mistake("download", "demo")
    assert json.loads(ran("download", "demo", "other", "--json")) == {"directory": str(tmp_path / "other")}


def test_names_are_neither_paths_nor_markup(fake, config, tmp_path):
    fake.final = RUN | {"name": "../[red]a/b", "reason": "[bold]"}
    assert ran("download", ID) == f"The model is in {tmp_path / 'red-a-b'}\n"
    assert "../[red]a/b" in ran("status", ID)
    fake.answers["GET", "/v1/runs"]["items"] = [PLAIN | {"name": "[red]a", "reason": "[bold]"}]
    assert all(words in ran("list") for words in ("[red]a", "[bold]"))


def test_estimate(fake, config):
    fake.answers["POST", "/v1/estimates"] = json.loads(ran("plan", config, "--json"))
    assert ran("estimate", config) == ran("plan", config)
    assert json.loads(ran("estimate", config, "--json")) == json.loads(ran("plan", config, "--json")) | {"notes": []}


def test_the_estimate_of_a_retry_is_a_sentence(fake, config):
    sentence = "reuses corpus, seed of docs: $0.38 instead of $7.10"
    plan = json.loads(ran("plan", config, "--json"))
    reuse = {"reuses": [{"run": ID, "name": "docs", "stages": ["corpus", "seed"]}], "reuse_in_words": sentence}
    fake.answers["POST", f"/v1/runs/{ID}/retry/estimate"] = plan | reuse | {"notes": [], "dollars_with_reuse": 0.38}
    assert ran("retry", "demo", "--set", "seed=2", "--reuse", "parent", "--estimate") == f"{sentence}\n"
    assert fake.sent == {"changes": {"seed": 2}, "reuse": "parent"}
    assert json.loads(ran("retry", "demo", "--estimate", "--json"))["dollars_with_reuse"] == 0.38
    assert invoke("retry", "demo", "--reuse", "all").exit_code == 2


def test_pools(fake):
    for words in ("low_mem_gpu", "3", "0.35"):
        assert words in ran("pools")
    fake.answers["GET", "/v1/pools"]["connected"] = False
    assert "Ray does not answer" in ran("pools")
    assert json.loads(ran("pools", "--json"))["items"] == [POOL]


def test_policies(fake):
    assert "low_mem_gpu $0.35" in ran("policies", "show")
    assert json.loads(ran("policies", "show", "--json")) == POLICIES
    ran("policies", "set", "--owner", "bob", "retention.days=30", "active_runs=null")
    assert fake.sent == {"retention": {"days": 30}, "active_runs": None}
    assert fake.requests[-1].url.path == "/v1/policies/owners/bob"
    assert "low_mem_gpu $0.4" in ran("policies", "set", "prices.low_mem_gpu=0.4")
    assert fake.sent == {**POLICIES, "default": {"prices": {"low_mem_gpu": 0.4}}}
    assert mistake("policies", "set", "queued_runs=-1").startswith("moedisco: default.queued_runs: -1: ")
    assert "no such setting" in mistake("policies", "set", "queue=1")
    assert "must read key=value" in mistake("policies", "set", "queue")
    assert ran("policies", "remove", "ann") == "ann: the default policy applies\n"


def test_policies_come_from_a_file(fake, tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("default: {dollars_per_month: 10}\nowners: {ann: {dollars_per_month: null}}\n")
    assert "$10" in ran("policies", "apply", file)
    assert fake.sent == {"default": {"dollars_per_month": 10.0}, "owners": {"ann": {"dollars_per_month": None}}}
    for text, words in (
        ("default: [", "is not YAML"),
        ("- 1", "must contain the sections"),
        ("owner: {}", "no such setting"),
        ("default: {dollars_per_month: .inf}", "default.dollars_per_month: inf"),
        ("default: {queued_runs: 1}\n\ndefault: {}\n", "has the key 'default' in line 1 and again in line 3"),
    ):
        file.write_text(text)
        assert words in mistake("policies", "apply", file)
    assert "cannot be read" in mistake("policies", "apply", tmp_path / "absent.yaml")


def test_quota(fake):
    for words in ("Quota of ann", "low_mem_gpu $0.35", "12", "$500", "30 days"):
        assert words in ran("quota")
    assert json.loads(ran("quota", "--json"))["month"] == "2026-11"
    fake.answers["GET", "/v1/quota"] = QUOTA | {
        "dollars": {"used": 1, "limit": 12_345.67},
        "queued_runs": {"used": 1_234_567, "limit": 1_000_000},
    }
    for words in ("$12,345.67", "1,234,567", "1,000,000"):
        assert words in ran("quota")


def test_change(fake):
    fake.answers["PATCH", f"/v1/runs/{ID}"] = RUN | {
        "kept": True,
        "priority": 3,
        "money": RUN["money"] | {"budget_dollars": 12.5},
    }
    for given, sent in (
        (("--keep",), {"kept": True}),
        (("--no-keep",), {"kept": False}),
        (("--budget", "none"), {"budget_dollars": None}),
        (("--budget", "12.5", "--priority", "0"), {"budget_dollars": 12.5, "priority": 0}),
        (("--name", "b"), {"name": "b"}),
        (("--tag", "team:a:b", "--untag", "draft"), {"tags": {"draft": None, "team": "a:b"}}),
    ):
        assert ran("change", ID, *given) == f"{ID}  demo: budget $12.50, priority 3, kept\n"
        assert fake.sent == sent
    assert "no new value" in mistake("change", ID)
    assert ran("change", ID, ID, "--name", "b").count("demo:") == 2


@pytest.mark.parametrize("command", ["submit", "retry", "change"])
@pytest.mark.parametrize("text", ["much", "nan", "inf"])
def test_a_budget_is_a_number_or_none(fake, config, command, text):
    given = config if command == "submit" else ID
    assert (
        mistake(command, given, "--budget", text)
        == f"moedisco: --budget: '{text}': must be a number of dollars, or none"
    )


def test_projects(fake, config):
    assert "bob (editor)" in ran("projects", "list")
    assert "next: moedisco projects add law MEMBER" in ran("projects", "create", "law")
    assert fake.sent == {"name": "law"}
    assert "bob (editor)" in ran("projects", "add", "law", "bob", "--role", "editor")
    assert fake.sent == {"role": "editor"}
    assert ran("projects", "remove", "law", "bob") == "law: bob removed\n"
    assert ran("projects", "rename", "law", "contracts").endswith("  law\n")
    assert fake.sent == {"name": "contracts"}
    assert ran("projects", "delete", "law") == "law: deleted\n"
    ran("submit", config, "--project", "law")
    assert fake.sent["project"] == "law"
    assert "project" not in ran("list")
    other = OTHERS[0] | {"project": RUN["project"] | {"name": "law"}}
    fake.answers["GET", "/v1/runs"] = {"items": [other], "next_cursor": None}
    assert "project law of ann" in ran("list", "--project", "law")
    assert b"project=law" in fake.requests[-1].url.query


def test_spending(fake):
    shown = ran("spending", "--by", "owner, project,month", "--month", "2026-12")
    assert all(part in shown for part in ("month", "2026-12", "ann", "law", "$12.50"))
    assert fake.requests[-1].url.query == b"group_by=owner%2Cproject%2Cmonth&month=2026-12"


def test_secrets(fake):
    assert ran("secrets", "set", "HF_TOKEN", "--project", "law", typed="hf_1\n").startswith(
        "HF_TOKEN: set; a run names it"
    )
    assert fake.sent == {"value": "hf_1"}
    assert "is empty" in mistake("secrets", "set", "HF_TOKEN", "--project", "law")
    assert "HF_TOKEN" in ran("secrets", "list")  # of the caller's own project
    assert ran("secrets", "delete", "HF_TOKEN", "--project", "law") == "HF_TOKEN: deleted\n"


def test_notices(fake):
    url = "slack://a/b/c"
    assert ran("notify", "set", "--project", "law", typed=f"{url}\n") == "slack://...: set, and a test was sent\n"
    assert fake.requests[-1].url.path == "/v1/projects/law/notices/test"
    assert "is empty" in mistake("notify", "set", "--project", "law")
    assert "not accepted: status 404" in ran("notify", "show")
    assert ran("notify", "test", "--project", "law") == "sent\n"
    assert ran("notify", "clear", "--project", "law") == "law: no more notices are sent\n"


def test_tokens(fake):
    assert "revoked" in ran("tokens", "list")
    assert ran("tokens", "create", "ci", "--owner", "ann", "--scope", "read", "--forever") == "mdk_new\n"
    assert fake.sent == {"name": "ci", "owner": "ann", "scopes": ["read"], "expires_in_days": None}
    ran("tokens", "create", "ci")
    assert fake.sent == {"name": "ci", "owner": None, "scopes": ["submit"], "expires_in_days": 90}
    assert "--owner: is required" in mistake("tokens", "create", "ci", "--state-dir", "x")
    assert ran("tokens", "rotate", "T1") == "mdk_next\n"
    assert ran("tokens", "revoke", "T1") == "T1: revoked\n"


@pytest.mark.parametrize(
    ("answer", "code", "line"),
    [
        (problem(404, "no such run"), 2, "moedisco: no such run"),
        (problem(409, "the run is running; cancel it"), 2, "moedisco: the run is running; cancel it"),
        (problem(422, "mistakes", [("config.seed", "is negative")]), 2, "moedisco: seed: is negative"),
        (problem(401, "unknown token"), 2, "moedisco: unknown token; set MOEDISCO_TOKEN to a valid token"),
        (problem(500, "database broken"), 1, "moedisco: database broken"),
        (problem(500, "internal"), 1, "moedisco: internal"),
    ],
)
def test_how_refusals_end(fake, answer, code, line):
    fake.answers["POST", f"/v1/runs/{ID}/cancel"] = answer
    assert mistake("cancel", ID, code=code) == line


def test_commands_name_a_service_that_is_not_the_default_one(fake, monkeypatch):
    assert invoke("list").stderr == NAMED
    assert [run["id"] for run in json.loads(invoke("list", "--json").stdout)] == [run["id"] for run in OTHERS]
    monkeypatch.setenv("MOEDISCO_URL", URL)
    assert invoke("pools").stderr == f"moedisco: the service at {URL} (MOEDISCO_URL)\n"
    monkeypatch.setattr(
        service.client,
        "Client",
        functools.partial(Client, connection.DEFAULT_URL, "t", transport=httpx.MockTransport(fake)),
    )
    assert invoke("list").stderr == ""
    assert f"{Settings.model_fields['host'].default}:{Settings.model_fields['port'].default}" in connection.DEFAULT_URL


def test_a_service_that_is_away(monkeypatch):
    def refuse(request):
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(connection, "BRIEF_SECONDS", 0)
    monkeypatch.setattr(service.client, "Client", functools.partial(Client, URL, transport=httpx.MockTransport(refuse)))
    assert mistake("list", code=1).startswith(
        f"moedisco: no service answers at {URL} (connection refused); start one with"
    )


def test_no_service_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MOEDISCO_URL", raising=False)
    assert mistake("pools").startswith("moedisco: MOEDISCO_URL: is not set and you have started no service here")


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A stand-in for `service.serve`, with the settings of each start and the announcement it makes."""
    module = types.ModuleType("service.serve")
    module.settings = []
    module.announcement = types.SimpleNamespace(
        url="http://127.0.0.1:8300", token="mdk_first", token_file=tmp_path / "token", sign_in_code="mdc_first"
    )

    def serve(settings, announce):
        module.settings.append(settings)
        announce(module.announcement)
        return True

    module.serve = serve
    monkeypatch.setitem(sys.modules, "service.serve", module)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return module


def test_serve_sets_what_was_given_and_leaves_its_address(served, tmp_path):
    out = ran(
        "serve",
        "--port",
        "0",
        "--output-root",
        "a",
        "--output-root",
        "b",
        "--input-root",
        "s3://bucket",
        "--home-dir",
        str(tmp_path / "homes"),
        "--storage-root",
        "gs://checkpoints/moe",
        "--map-function",
        "clean:keep",
        "--max-active-runs",
        "7",
        "--webhook-url",
        "https://hooks.test/x",
        "--log-format",
        "json",
        "--public-url",
        "https://moe.test",
    )
    assert served.settings == [
        Settings(
            state_dir=tmp_path / "state" / "moedisco",
            port=0,
            output_roots=("a", "b"),
            input_roots=("s3://bucket",),
            home_dir=tmp_path / "homes",
            storage_roots=("gs://checkpoints/moe",),
            map_functions=("clean:keep",),
            max_active_runs=7,
            webhook_url="https://hooks.test/x",
            log_format="json",
            public_url="https://moe.test",
        )
    ]
    assert "mdk_first" not in out
    assert out.endswith("the next `moedisco serve` finds them\n")
    path = tmp_path / "config" / "moedisco" / "service.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_address(path).token == "mdk_first"
    assert Client().url == "http://127.0.0.1:8300"


def test_a_further_start_keeps_the_token(served):
    ran("serve")
    served.announcement.url, served.announcement.token = "http://127.0.0.1:9000", None
    assert "To sign in: http://127.0.0.1:9000, with your token\n" in ran("serve")
    assert (load_address().url, load_address().token) == ("http://127.0.0.1:9000", "mdk_first")


def test_detaching_a_second_service_is_refused(served, tmp_path):
    state = tmp_path / "its"
    state.mkdir()
    remedy = f"stop it first with `moedisco stop --state-dir {state}`"
    with process.locked(state) as listening:
        start = ("serve", "--detach", "--port", "0", "--state-dir", state)
        assert mistake(*start) == f"moedisco: --state-dir: '{state}': a service already runs; {remedy}"
        listening("http://127.0.0.1:8301")
        assert (
            mistake(*start)
            == f"moedisco: --state-dir: '{state}': a service already runs at http://127.0.0.1:8301; {remedy}"
        )


def test_serve_refuses_mistakes_in_one_line(served):
    assert mistake("serve", "--port", "70000").startswith("moedisco: --port: 70000: ")
    assert mistake("serve", "--input-root", "ftp://x").startswith("moedisco: --input-root: ")
    here = Path.cwd()
    for place in ("state/moedisco/runs", "there", "there/deeper", "kept"):
        said = mistake(
            "serve",
            "--state-dir",
            "state/moedisco",
            "--output-root",
            "there",
            "--storage-root",
            "kept",
            "--input-root",
            place,
        )
        assert said.startswith(
            f"moedisco: --input-root: '{here / place}': is in a directory of the service or its runs"
        )
    for output, storage in (
        ("there", "there"),
        ("there/runs", "there"),
        ("s3://b/runs", "s3://b/runs"),
        ("gs://b/runs", "gcs://b"),
    ):
        named = storage if "://" in storage else here / storage
        said = mistake("serve", "--output-root", output, "--storage-root", storage)
        assert said.startswith(f"moedisco: --storage-root: '{named}': contains the runs in ")
    assert mistake("serve", "--map-function", "keep").startswith("moedisco: --map-function: ")
    said = mistake("serve", "--driver-user", "nobody", "--output-root", "s3://x")
    assert said.startswith("moedisco: --driver-user: 'nobody': cannot read the service's files of its runs; ")
    assert not served.settings


def test_a_real_process_ends_in_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MOEDISCO_")}
    result = subprocess.run(
        [sys.executable, "-c", "from service.cli import main; main()", "list"],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"XDG_CONFIG_HOME": str(tmp_path)},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("moedisco: MOEDISCO_URL: is not set")
    assert result.stderr.count("\n") == 1
