"""No command of the command line passes control characters of other people on to a terminal, a pipe or a log."""

from __future__ import annotations

import functools
import io
import json
import shutil
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
import typer.testing
import yaml
from client_standin import URL, Body, event_stream, problem
from hostile_text import HOSTILE, control_characters, poisoned
from pydantic import TypeAdapter, ValidationError
from run_example import events, report
from test_cli_service import DATASET, EVENTS, ID, RUN, Fake
from typer.testing import CliRunner, Result

import service.client
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import RunError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.measurements import Check, Measurements
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.execution.doctor import here
from moedisco_ray.execution.doctor.work import Work
from service import schemas
from service.cli import app
from service.client import Client, RetryPolicy
from service.domain.policies import Policies

NAME = HOSTILE.replace("/", "")
"""Hostile name of a file."""
MODELS: dict[str, Any] = {
    "/v1/runs": schemas.Run,
    f"/v1/runs/{ID}/submodels": schemas.Unit,
    f"/v1/runs/{ID}/report": RunReport,
    f"/v1/runs/{ID}/logs": schemas.LogFile,
    "/v1/comparison": schemas.Comparison,
    "/v1/pools": schemas.PoolList,
    "/v1/policies": Policies,
    "/v1/quota": schemas.Quota,
    "/v1/projects": schemas.ProjectInfo,
    "/v1/spending": schemas.SpentDollars,
    "/v1/projects/ann/secrets": schemas.SecretInfo,
    "/v1/projects/ann/notices": schemas.NoticeUrl,
    "/v1/identity": schemas.Identity,
    "/v1/tokens": schemas.TokenInfo,
    "/v1/datasets": schemas.DatasetInfo,
    f"/v1/datasets/{DATASET['id']}": schemas.DatasetDetail,
}


def commands() -> list[tuple[str, ...]]:
    """All commands, also those of groups, such as `tokens list`."""

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield path
        for name, each in (inner or {}).items():
            yield from walk(each, (*path, name))

    return list(walk(command_line(app), ()))


@pytest.fixture(autouse=True)
def _one_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the parsers once: typer's runner makes those of all commands for each call, which takes most of its time."""
    monkeypatch.setattr(typer.testing, "_get_command", command_line)


@functools.cache
def command_line(app: typer.Typer) -> Any:
    return typer.main.get_command(app)


def accepts(model: Any, document: Any) -> bool:
    try:
        TypeAdapter(model).validate_python(document)
    except (ValidationError, ValueError):
        return False
    return True


@functools.cache
def hostile(path: str) -> Any:
    """What a hostile service, or one with a hostile tenant, answers at a path."""
    answer = RUN if path == f"/v1/runs/{ID}" else Fake().answers["GET", path]
    items = answer.get("items") if isinstance(answer, dict) else None
    model = MODELS.get(path, schemas.RunDetail)
    if items is None or path == "/v1/pools":
        return poisoned(answer, functools.partial(accepts, model))
    return answer | {"items": [poisoned(item, functools.partial(accepts, model)) for item in items]}


class HostileService(Fake):
    """A service whose answers hold hostile text wherever the client accepts it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = "succeeded"
        self.refusal: httpx.Response | None = None
        for method, path in self.answers:
            if method == "GET":
                self.answers[method, path] = hostile(path)
        detail = hostile(f"/v1/runs/{ID}")
        for path in ("/v1/runs", *(f"/v1/runs/{ID}/{verb}" for verb in ("cancel", "resume", "retry"))):
            self.answers["POST", path] = detail
        [project] = hostile("/v1/projects")["items"]
        self.answers["POST", "/v1/projects"] = self.answers["PUT", "/v1/projects/law/members/bob"] = project
        self.answers["PATCH", "/v1/projects/law"] = project
        self.answers["POST", "/v1/tokens"] |= {"token": HOSTILE, "name": HOSTILE}
        self.answers["POST", "/v1/tokens/T1/rotate"] |= {"token": HOSTILE, "name": HOSTILE}
        self.answers["POST", "/v1/sign-in-codes"] = {"code": HOSTILE, "expires": 1.0}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.refusal is not None:
            return self.refusal
        self.final = hostile(f"/v1/runs/{ID}") | {"state": self.state}
        if "/logs/" in request.url.path:
            self.requests.append(request)
            return httpx.Response(200, stream=Body([f"a line\n{HOSTILE}\n\ttab\n".encode()]))
        return super().__call__(request)

    def events(self) -> httpx.Response:
        found = [*EVENTS, *(hostile_event(event).__dict__ for event in events())]
        found = [
            event if event["type"] != "state" else event | {"data": {"state": HOSTILE, "reason": HOSTILE}}
            for event in found
        ]
        text = "".join(f"id: {n}\nevent: {each['type']}\ndata: {json.dumps(each)}\n\n" for n, each in enumerate(found))
        return event_stream([text.encode(), b"event: end\ndata: {}\n\n"])


def hostile_event(event: Event) -> Event:
    data = poisoned(event.data, lambda _: True) | {"message": HOSTILE, "reason": HOSTILE}
    data.pop(HOSTILE, None)
    return Event(
        event.type, event.stage and event.stage + HOSTILE, event.unit and event.unit + HOSTILE, data, event.time
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> HostileService:
    made = HostileService()

    def client(*_: object, **__: object) -> Client:
        return Client(URL, "t", retry=RetryPolicy(0.0), transport=httpx.MockTransport(made))

    monkeypatch.setattr(service.client, "Client", client)
    monkeypatch.setenv("MOEDISCO_URL", URL)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return made


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of other people, under hostile names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    demo = yaml.safe_load(preset_text("demo"))
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(demo))
    (tmp_path / f"{NAME}.yaml").write_text(yaml.safe_dump(demo))
    sources = [{"path": f"{tmp_path}/{NAME}/missing.txt", "text_column": HOSTILE, "exclude": [HOSTILE]}]
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(demo | {"corpus": {"sources": sources}}))
    (tmp_path / "keys.yaml").write_text(
        yaml.safe_dump(demo | {HOSTILE: HOSTILE, "tokens": {HOSTILE: 1}, "name": HOSTILE})
    )
    (tmp_path / "broken.yaml").write_text(f'a: [\n"{NAME}')
    (tmp_path / "file").write_text("")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / f"{NAME}.txt").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "binary.yaml").write_text(
        yaml.safe_dump(demo | {"corpus": {"sources": [{"path": f"{tmp_path}/binary"}]}})
    )
    with tarfile.open(tmp_path / "later.tar.gz", "w:gz") as backup:
        manifest = json.dumps({"format": 2, "version": HOSTILE}).encode()
        member = tarfile.TarInfo("manifest.json")
        member.size = len(manifest)
        backup.addfile(member, io.BytesIO(manifest))
    finished = tmp_path / "runs" / NAME
    finished.mkdir(parents=True)
    (finished / "report.json").write_text(json.dumps(stored_report()))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text(
        json.dumps(check_config(demo).model_dump(mode="json") | {"tags": {HOSTILE: HOSTILE}})
    )
    lines = [hostile_event(event).to_json() for event in events() if event.type != "run_finished"]
    (unfinished / "events.jsonl").write_text("\n".join([*lines, ""]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({HOSTILE: HOSTILE, "name": HOSTILE}))
    model = tmp_path / NAME
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": HOSTILE, "architectures": [HOSTILE], "dtype": HOSTILE})
    )
    (model / f"{NAME}.bin").write_text(HOSTILE)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": HOSTILE}))
    return tmp_path


@functools.cache
def stored_report() -> Any:
    return poisoned(report(), functools.partial(accepts, RunReport))


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, place: Path) -> types.ModuleType:
    """A pipeline whose events hold hostile text, and that ends with `outcome`."""
    module = types.ModuleType("moedisco_ray.execution.pipeline")

    def run(config: RunConfig, listeners: tuple[Callable[[Event], None], ...], redo: bool, **options: Any) -> Path:
        for event in events():
            for listener in listeners:
                listener(hostile_event(event))
        if isinstance(module.outcome, Exception):
            raise module.outcome
        return Path(module.outcome)

    monkeypatch.setattr(module, "run", run, raising=False)
    monkeypatch.setattr(module, "outcome", place / "runs" / NAME, raising=False)
    monkeypatch.setitem(sys.modules, "moedisco_ray.execution.pipeline", module)
    return module


@pytest.fixture
def _examination(monkeypatch: pytest.MonkeyPatch) -> None:
    """An examination whose machine, card and errors have hostile names; a real one takes half a minute."""
    check = Check(part="system", name=HOSTILE, state="failed", found=HOSTILE, remedy=HOSTILE)
    found = Measurements(place=HOSTILE, measured_at=0.0, checks=[check])

    def examine_here(_config: RunConfig, _work: Work, show: here.Show) -> Measurements:
        show(HOSTILE, [check])
        return found

    monkeypatch.setattr(here, "examine_here", examine_here)


RUN_DIRS = [[f"runs/{NAME}"], ["unfinished"], ["other"], [f"{NAME}/{NAME}"]]
RUN_COMMANDS = [["demo"], [ID], [HOSTILE], ["demo", "--json"]]
SCENARIOS: dict[str, list[list[str]]] = {
    "run": [["demo.yaml"], ["demo.yaml", "--json"], ["keys.yaml"], ["demo.yaml", "--set", f"{HOSTILE}=1"]],
    "plan": [
        ["demo.yaml"],
        [f"{NAME}.yaml", "--json"],
        ["keys.yaml"],
        ["broken.yaml"],
        ["text.yaml"],
        [f"{NAME}/{NAME}.yaml"],
        ["demo.yaml", "--cluster", f"{NAME}.yaml"],
        ["demo.yaml", "--measured", f"runs/{NAME}"],
    ],
    "init": [[f"{NAME}-new.yaml", "--preset", "demo"], [f"{NAME}.yaml"], [f"missing/{NAME}/{NAME}.yaml"]],
    "validate": [["demo.yaml"], ["text.yaml"], ["binary.yaml"], ["keys.yaml"], ["broken.yaml"], [NAME]],
    "schema": [[]],
    "doctor": [
        ["demo.yaml"],
        ["demo.yaml", "--json"],
        ["missing.yaml"],
        [f"missing/{NAME}.yaml"],
        ["keys.yaml"],
        ["broken.yaml"],
    ],
    "verify": [*RUN_DIRS, [NAME]],
    "show": [*RUN_DIRS, *([*each, "--json"] for each in RUN_DIRS)],
    "plot": [["other"], [NAME], ["unfinished"], [f"runs/{NAME}"]],
    "export": [[*each, "--to", kind] for each in RUN_DIRS for kind in ("hf", "ensemble")],
    "push": [[*each, f"ann/{HOSTILE}"] for each in RUN_DIRS],
    "chat": [*RUN_DIRS, [NAME]],
    "evaluate": [
        [NAME, "--sources", NAME],
        [NAME, "--lm-eval", NAME],
        ["file", "--sources", "file"],
        [HOSTILE, "--sources", "x"],
    ],
    "merge": [
        [NAME, NAME, "--base", NAME, "--output", f"{NAME}-merged"],
        [HOSTILE, "x", "--base", HOSTILE, "--output", "o"],
    ],
    "experts": [
        [NAME, HOSTILE, "--output", "o"],
        [NAME, "0", "--output", NAME],
        [f"runs/{NAME}", "0", "--output", "o"],
    ],
    "submit": [
        ["demo.yaml"],
        ["demo.yaml", "--json"],
        ["demo.yaml", "--watch"],
        ["keys.yaml"],
        ["demo.yaml", "--name", HOSTILE],
    ],
    "estimate": [["demo.yaml"], ["demo.yaml", "--json"], ["text.yaml"]],
    "retry": [
        *RUN_COMMANDS,
        ["demo", "--set", f"{HOSTILE}=1"],
        ["demo", "--set", HOSTILE],
        ["demo", "--budget", HOSTILE],
        ["demo", "--reuse", HOSTILE],
        ["demo", "--estimate"],
    ],
    "watch": RUN_COMMANDS,
    "logs": [
        *RUN_COMMANDS,
        ["demo", "--list"],
        ["demo", "--unit", HOSTILE],
        ["demo", "--follow"],
        ["demo", "--follow", "--json"],
    ],
    "list": [[], ["--json"], ["--tag", HOSTILE], ["--where", HOSTILE, "--sort", HOSTILE]],
    "status": RUN_COMMANDS,
    "compare": [["demo", "other"], [ID, ID], ["demo", ID, "--json"], ["demo", HOSTILE], ["demo"]],
    "change": [[*each, "--priority", "1"] for each in RUN_COMMANDS],
    "cancel": RUN_COMMANDS,
    "resume": RUN_COMMANDS,
    "delete": [*([*each, "--yes"] for each in RUN_COMMANDS), ["demo"]],
    "download": [["demo", NAME], ["demo", f"{NAME}-new"], [HOSTILE, "x"]],
    "quota": [[], ["--json"], ["--owner", HOSTILE]],
    "policies show": [[], ["--json"]],
    "policies set": [[HOSTILE], [f"{HOSTILE}=1"], [f"default.prices.{HOSTILE}=1"]],
    "policies apply": [["keys.yaml"], ["broken.yaml"], [NAME], [f"{NAME}.yaml"]],
    "policies remove": [[HOSTILE], ["ann"]],
    "pools": [[], ["--json"]],
    "projects list": [[], ["--json"]],
    "projects create": [[HOSTILE], ["law"], ["law", "--json"]],
    "projects add": [[HOSTILE, HOSTILE], ["law", "bob"], ["law", "bob", "--role", HOSTILE]],
    "projects remove": [[HOSTILE, HOSTILE], ["law", "bob"], ["law", "bob", "--json"]],
    "datasets list": [[], ["--json"], ["--name", HOSTILE]],
    "datasets upload": [[HOSTILE], ["demo.yaml"], ["demo.yaml", "--name", HOSTILE, "--json"]],
    "datasets download": [[HOSTILE], ["wiki"], ["wiki", NAME]],
    "datasets delete": [[HOSTILE, "--yes"], ["wiki", "--yes"], ["wiki", "--yes", "--json"]],
    "secrets list": [["--project", "ann"], ["--project", "ann", "--json"], ["--project", HOSTILE]],
    "secrets set": [[HOSTILE], ["HF_TOKEN"]],
    "secrets delete": [[HOSTILE], ["HF_TOKEN", "--project", "law"]],
    "notify show": [["--project", "ann"], ["--project", "ann", "--json"]],
    "notify set": [["--project", HOSTILE]],
    "notify test": [["--project", HOSTILE], ["--project", "law"]],
    "notify clear": [["--project", HOSTILE], ["--project", "law"]],
    "projects rename": [[HOSTILE, HOSTILE], ["law", "x"], ["law", "x", "--json"]],
    "projects delete": [[HOSTILE], ["law"]],
    "spending": [[], ["--json"], ["--by", HOSTILE, "--month", HOSTILE]],
    "tokens list": [[], ["--json"]],
    "tokens create": [
        [HOSTILE, "--owner", HOSTILE],
        ["x", "--owner", "ann", "--json"],
        ["x", "--owner", "ann", "--state-dir", NAME],
    ],
    "tokens rotate": [[HOSTILE], ["T1"], ["T1", "--json"]],
    "tokens revoke": [[HOSTILE], ["T1"], ["T1", "--json"]],
    "serve": [["--public-url", HOSTILE], ["--port", HOSTILE], ["--input-root", HOSTILE, "--map-function", HOSTILE]],
    "stop": [["--state-dir", NAME]],
    "backup": [
        [f"{NAME}.tar.gz", "--state-dir", NAME],
        ["x", "--database-url", f"sqlite:///{HOSTILE}"],
        ["x", "--database-url", HOSTILE],
    ],
    "restore": [
        ["later.tar.gz", "--state-dir", "home"],
        [f"binary/{NAME}.txt", "--state-dir", "home"],
        [HOSTILE, "--state-dir", NAME],
    ],
    "sign-in": [[]],
    "demo": [["file", "--set", f"{HOSTILE}=1"]],
    "node-agent": [["--interval", HOSTILE]],
    "join": [[HOSTILE], ["-"]],
    "join-token": [["--minutes", HOSTILE]],
    "join-gateway": [["--public-host", HOSTILE, "--ray-address", HOSTILE, "--ray-token-file", NAME]],
}
"""Arguments of each command, of files and answers that hold hostile text."""


DRAWING = {"run", "plan", "show", "watch", "submit", "status", "list", "estimate"}
"""Commands that write escape sequences of their own to a terminal; `list` and `show` stand for those of groups too."""


def invoke(command: tuple[str, ...], arguments: list[str], *, live: bool = False) -> Result:
    return CliRunner().invoke(
        app,
        [*command, *arguments],
        prog_name="moedisco",
        env={"FORCE_COLOR": "1"} if live else {"NO_COLOR": "1"},
        input=HOSTILE,
    )


def check(command: tuple[str, ...], arguments: list[str], *, live: bool = False) -> Result:
    result = invoke(command, arguments, live=live)
    assert isinstance(result.exception, SystemExit | None), result.exception
    for stream in (result.stdout, result.stderr):
        found = control_characters(stream, live=live)
        assert not found, f"{' '.join(command)} {arguments!r} wrote {found}: {stream!r}"
    return result


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_no_command_writes_what_a_terminal_obeys(
    fake: HostileService, place: Path, request: pytest.FixtureRequest, command: tuple[str, ...]
) -> None:
    """A new command fails here until it has scenarios.

    Before (af276e38): all 46 commands fail: run, show, watch, logs, submit, cancel wrote ESC, OSC 52, C1; others U+202E
    of a name.
    """
    replaced = {"run": "pipeline", "doctor": "_examination"}.get(command[-1])
    if replaced is not None:
        request.getfixturevalue(replaced)
    for arguments in SCENARIOS[" ".join(command)]:
        check(command, arguments)
        if command[-1] in DRAWING and "--json" not in arguments:
            check(command, arguments, live=True)
    check(command, [f"--{HOSTILE}"])
    check(command, [HOSTILE] * 9)


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in commands()
        if command[0]
        in {
            "submit",
            "estimate",
            "retry",
            "watch",
            "logs",
            "list",
            "status",
            "change",
            "cancel",
            "resume",
            "delete",
            "download",
            "quota",
            "policies",
            "pools",
            "projects",
            "datasets",
            "tokens",
            "sign-in",
        }
    ],
    ids=" ".join,
)
def test_no_command_writes_what_a_service_refuses_with(
    fake: HostileService, place: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Before (af276e38): all 25 commands wrote the escape sequences of the problem document, `\\x1b[8m` first."""
    answers = [
        problem(422, HOSTILE, [(HOSTILE, HOSTILE)]),
        problem(404, HOSTILE),
        httpx.Response(403, text=HOSTILE),
        httpx.Response(200, json={HOSTILE: HOSTILE}),
        httpx.Response(302, headers={"Location": "http://x/%1b"}, text=HOSTILE),
    ]
    for answer in answers:
        monkeypatch.setattr(fake, "refusal", answer)
        for arguments in SCENARIOS[" ".join(command)][:3]:
            check(command, arguments)


@pytest.mark.parametrize("live", [False, True])
def test_the_errors_of_a_run_are_shown_without_their_escape_sequences(
    pipeline: types.ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    """Before (af276e38): `moedisco: the worker said \\x1b[2J\\x1b]52;c;...` cleared the screen, wrote the clipboard."""
    monkeypatch.setattr(pipeline, "outcome", RunError(f"the worker said {HOSTILE}"))
    result = check(("run",), ["demo.yaml"], live=live)
    assert result.exit_code == 1
    assert r"the worker said \u001b[2J\u001b]52;c;c2VjcmV0\u0007" in result.stderr


def test_a_sample_keeps_its_lines_and_honest_letters(place: Path) -> None:
    text = "grüße, 語, שלום, 👩\u200d🚀, naïve\n\tand a second line"
    stored = report() | {"samples": [{"prompt": "grüße", "text": text}]}
    shutil.copytree(place / "runs" / NAME, place / "runs" / "honest")  # its name is shown too
    (place / "runs" / "honest" / "report.json").write_text(json.dumps(stored))
    shown = invoke(("show",), ["runs/honest"]).stdout
    for line in ("grüße, 語, שלום, 👩\u200d🚀, naïve", "and a second line"):
        assert line in shown
    assert "\\u" not in shown


def test_json_output_stays_json_with_the_same_text(fake: HostileService, place: Path) -> None:
    """Before (af276e38): `list --json` and `show --json` wrote U+007F, U+009B and U+202E as they are."""
    result = check(("list",), ["--json"])
    assert json.loads(result.stdout)[0]["name"] == hostile("/v1/runs")["items"][0]["name"]
    assert json.loads(check(("show",), [f"runs/{NAME}", "--json"]).stdout)["samples"][0]["text"].endswith(HOSTILE)
