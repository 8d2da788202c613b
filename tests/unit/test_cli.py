import json
import subprocess
import sys
import types

import pytest
from run_example import events, report
from typer.testing import CliRunner

from moedisco_ray import __version__
from moedisco_ray.cli.app import app
from moedisco_ray.core.config.presets import local_gpus, preset_text
from moedisco_ray.core.errors import RunDirError, TrainingError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import write_json

HEAVY = ("torch", "transformers", "ray", "numpy", "matplotlib", "pyarrow", "sklearn", "datasets")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="moedisco")


@pytest.fixture
def demo(tmp_path):
    path = tmp_path / "demo.yaml"
    assert invoke("init", path, "--preset", "demo").exit_code == 0
    return path


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """A pipeline that returns or raises `outcome`."""
    module = types.ModuleType("moedisco_ray.execution.pipeline")
    module.calls = []

    def run(config, listeners, redo, **options):
        del options
        module.calls.append((config, redo))
        for event in events():
            for listener in listeners:
                listener(event)
        if isinstance(module.outcome, BaseException):
            raise module.outcome
        return module.outcome

    module.run = run
    module.outcome = tmp_path / "runs" / "demo"
    module.outcome.mkdir(parents=True)
    write_json(module.outcome / "report.json", report())
    monkeypatch.setitem(sys.modules, "moedisco_ray.execution.pipeline", module)
    return module


def one_line(result):
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr.rstrip("\n")


def test_version_and_help():
    assert invoke("--version").stdout == f"moedisco {__version__}\n"
    for command in (
        (),
        ("run",),
        ("plan",),
        ("init",),
        ("validate",),
        ("schema",),
        ("show",),
        ("plot",),
        ("evaluate",),
    ):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Usage: moedisco" in result.stdout


@pytest.mark.parametrize("preset", ["demo", "paper", "default"])
def test_init_writes_a_valid_configuration(tmp_path, preset):
    path = tmp_path / "run.yaml"
    assert invoke("init", path, "--preset", preset).exit_code == 0
    assert path.read_text() == invoke("init", "-", "--preset", preset).stdout
    result = invoke("validate", path)
    assert result.exit_code == 0
    first, *rest = result.stdout.splitlines()
    assert first.startswith("ok: ")
    # Where this machine has no GPU, or a small disk.
    assert all(
        line.startswith(("warning: pools.", "warning: output: ")) and ("GPU" in line or "disk" in line) for line in rest
    )


def test_init_does_not_overwrite(demo):
    demo.write_text("mine")
    result = invoke("init", demo)
    assert result.exit_code == 2
    assert one_line(result) == f"moedisco: PATH: '{demo}': exists already; choose another, or pass --force"
    assert demo.read_text() == "mine"
    assert invoke("init", demo, "--force").exit_code == 0
    assert demo.read_text() != "mine"


def test_init_in_a_missing_folder(tmp_path):
    result = invoke("init", tmp_path / "no" / "run.yaml")
    assert result.exit_code == 2
    assert "cannot be written (No such file or directory)" in one_line(result)


def test_validate_names_family_clusters_and_tokens(demo):
    assert invoke("validate", demo, "--set", "clusters.count=2").stdout == (
        "ok: demo, qwen3_moe with 4 experts and 2,048 tokens of vocabulary, 2 clusters, 1,600,000 tokens\n"
    )


@pytest.mark.parametrize("command", ["run", "plan", "validate"])
@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("tokns.total=1", "moedisco: tokns: no such setting; did you mean 'tokens'?"),
        ("clusters.count=3", "moedisco: clusters.count: 3 does not divide the model's 4 experts; use one of 1, 2, 4"),
        (
            "model.config.vocab_size=100",
            (
                "moedisco: model.config.vocab_size: 100: is less than the tokenizer's 2048 tokens; "
                "raise it, or leave it out"
            ),
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(demo, command, setting, line):
    result = invoke(command, demo, "--set", setting)
    assert result.exit_code == 2
    assert one_line(result) == line
    assert not result.stdout
    assert list(demo.parent.iterdir()) == [demo]


def test_usage_errors_exit_with_2():
    for arguments in (("run",), ("fly",), ("plan", "x", "--nope"), ("init", "x", "--preset", "nope")):
        assert invoke(*arguments).exit_code == 2


def test_plan_as_table_and_as_json(demo):
    assert "GB per worker" in invoke("plan", demo).stdout
    plan = json.loads(invoke("plan", demo, "--json", "--set", "tokens.seed_share=0.1").stdout)
    assert plan["fits"]
    assert plan["stages"][0]["cost"]["tokens"] == 160_000 // 1024 * 1024


@pytest.mark.parametrize(("gpus", "preset"), [(0, "demo"), (1, "default"), (2, "default")])
def test_init_without_a_preset_writes_what_this_machine_can_run(tmp_path, monkeypatch, gpus, preset):
    monkeypatch.setattr("moedisco_ray.cli.app.local_gpus", lambda: gpus)
    path = tmp_path / "my.yaml"
    said = invoke("init", path).stdout
    assert path.read_text() == preset_text(preset)
    assert ("no GPU found here" in said) == (preset == "demo")
    assert ("set pools.high_memory.workers to 1" in said) == (gpus == 1)
    assert f"(preset {preset})" in said


def test_gpus_are_counted_as_the_drivers_list_them(tmp_path):
    assert local_gpus(tmp_path / "none", tmp_path / "none") == 0
    for card in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "nvidia" / card).mkdir(parents=True)
    for node, number in (("0", "0"), ("1", "4098")):
        (tmp_path / "amd" / node).mkdir(parents=True)
        (tmp_path / "amd" / node / "gpu_id").write_text(f"{number}\n")
    assert local_gpus(tmp_path / "nvidia", tmp_path / "amd") == 3


def test_schema_is_the_configurations():
    schema = json.loads(invoke("schema").stdout)
    assert set(schema["required"]) == {"name", "corpus"}


def test_run_shows_its_lines_then_the_table(demo, pipeline):
    result = invoke("run", demo, "--set", "seed=7", "--redo")
    assert result.exit_code == 0
    ((config, redo),) = pipeline.calls
    assert (config.seed, redo) == (7, True)
    assert "submodels: started" in result.stdout
    assert "joint training (estimate)" in result.stdout
    assert result.stdout.rstrip().endswith("/runs/demo/model")


def test_run_as_json_is_nothing_but_events(demo, pipeline):
    result = invoke("run", demo, "--json")
    assert [Event.from_line(line.encode()) for line in result.stdout.splitlines()] == events()


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (
            RunDirError("output", "runs/demo", "holds another run"),
            2,
            "moedisco: output: 'runs/demo': holds another run",
        ),
        (TrainingError("the loss of step 3\nis nan"), 1, "moedisco: the loss of step 3 is nan"),
        (KeyboardInterrupt(), 130, "moedisco: interrupted; the same command continues after the stage cluster"),
    ],
)
def test_how_a_run_ends(demo, pipeline, outcome, code, line):
    pipeline.outcome = outcome
    result = invoke("run", demo)
    assert result.exit_code == code
    assert one_line(result) == line


def test_a_bug_keeps_its_traceback(demo, pipeline):
    pipeline.outcome = ZeroDivisionError("a bug")
    result = invoke("run", demo)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_show(tmp_path):
    write_json(tmp_path / "report.json", report())
    assert "What the model writes" in invoke("show", tmp_path).stdout
    assert json.loads(invoke("show", tmp_path, "--json").stdout) == {
        **report(),
        "state": "finished",
        "state_reason": None,
    }


def test_plot(tmp_path):
    write_json(tmp_path / "report.json", report())
    assert invoke("plot", tmp_path).stdout.splitlines() == [
        str(tmp_path / "figures" / name) for name in ("loss.png", "clusters.png", "experts.png")
    ]


@pytest.mark.parametrize("command", ["show", "plot"])
def test_show_and_plot_refuse_a_directory_without_a_run(tmp_path, command):
    result = invoke(command, tmp_path)
    assert result.exit_code == 2
    assert one_line(result).startswith(f"moedisco: RUN_DIR: '{tmp_path}': holds no ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--sources", "README.md"),
            (
                "moedisco: MODEL: '{0}': holds no model and tokenizer; "
                "name a run's export, RUN_DIR/model, or a model with its tokenizer"
            ),
        ),
        ((), "moedisco: --sources: nothing to evaluate; name text, or task files with --lm-eval"),
    ],
)
def test_evaluate_says_what_is_missing(tmp_path, arguments, line):
    result = invoke("evaluate", tmp_path, *arguments)
    assert result.exit_code == 2
    assert one_line(result) == line.format(tmp_path)


def test_light_commands_import_nothing_heavy(tmp_path):
    write_json(tmp_path / "report.json", report())
    config = tmp_path / "run.yaml"
    commands = [
        ["--help"],
        ["init", str(config), "--preset", "paper"],
        ["plan", str(config)],
        ["plan", str(config), "--json"],
        ["schema"],
        ["show", str(tmp_path)],
        ["run", str(config), "--set", "seed=x"],
    ]
    # One process runs them all: what any of them imports is seen.
    program = (
        "import sys, contextlib, io\n"
        "from moedisco_ray.cli.app import main\n"
        f"for arguments in {commands!r}:\n"
        "    sys.argv = ['moedisco', *arguments]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert result.stderr == "moedisco: seed: 'x': must be a whole number\n"


def test_a_real_process_ends_a_mistake_in_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "moedisco_ray", "run", "missing.yaml"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert one_line(result) == (
        "moedisco: CONFIG: 'missing.yaml': cannot be read (No such file or directory); "
        "`moedisco init missing.yaml` writes one"
    )
