import json
import os
import subprocess
import sys
import types
from typing import get_args

import pytest
import yaml
from run_example import events, report
from typer.testing import CliRunner

from moedisco_ray import __version__
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import PresetName, from_model, local_gpus, on_text, preset_text, tokens_for
from moedisco_ray.core.errors import RunDirError, TrainingError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.execution.local_cards import local_cards

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
    # The texts of the installed packages are few for all but the demo.
    often = [line for line in rest if line.startswith("warning: the text, about ")]
    assert len(often) == (preset != "demo")
    # Where this machine has no GPU, or a small disk.
    assert all(
        line.startswith(("warning: pools.", "warning: output: ")) and ("GPU" in line or "disk" in line)
        for line in rest
        if line not in often
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


def test_commands_read_the_file_that_init_writes(tmp_path, monkeypatch):
    """Before: `init` needed no name, and then every command lacked an argument."""
    monkeypatch.chdir(tmp_path)
    missing = invoke("validate")
    assert missing.exit_code == 2
    assert "`moedisco init moedisco.yaml` writes one" in one_line(missing)
    assert invoke("init", "--preset", "demo").exit_code == 0
    assert invoke("validate").stdout.startswith("ok: demo")


def test_plan_as_table_and_as_json(demo):
    assert "GiB per worker" in invoke("plan", demo).stdout
    plan = json.loads(invoke("plan", demo, "--json", "--set", "tokens.seed_share=0.1").stdout)
    assert plan["fits"]
    assert plan["stages"][0]["cost"]["tokens"] == 160_000 // 1024 * 1024


@pytest.mark.parametrize(("gpus", "preset"), [(0, "demo"), (1, "default"), (2, "default")])
def test_init_without_a_preset_writes_what_this_machine_can_run(tmp_path, monkeypatch, gpus, preset):
    monkeypatch.setattr("moedisco_ray.cli.init.local_gpus", lambda: gpus)
    monkeypatch.setattr("moedisco_ray.cli.init.local_cards", lambda: ())
    path = tmp_path / "my.yaml"
    said = invoke("init", path).stdout
    assert path.read_text() == preset_text(preset)
    assert ("no GPU found here" in said) == (preset == "demo")
    assert ("set card or memory_gb, and max_workers, in pools.low_memory" in said) == (gpus > 0)
    assert f"(preset {preset})" in said


SMI = {
    "four": ["NVIDIA GeForce RTX 4090, 24564"] * 4,
    "laptop": ["NVIDIA GeForce RTX 4090 Laptop GPU, 16376"],
    "unknown": ["Quadro RTX 5000, 16384", "NVIDIA GeForce RTX 3090, 24576"],
}


@pytest.mark.parametrize(
    ("machine", "card", "memory_gb", "count"),
    [("four", "RTX 4090", 23.5, 4), ("laptop", None, 15.5, 1), ("unknown", None, 15.5, 2)],
)
def test_init_writes_the_cards_of_this_machine_with_their_real_memory(
    tmp_path, monkeypatch, machine, card, memory_gb, count
):
    """Before: the pools of the preset, 8 x L4 and an A100 of 80 GB."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in SMI[machine]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    # Windows' Linux (WSL) has no /proc/driver/nvidia: before, it got the preset for CPU cores.
    monkeypatch.setattr("moedisco_ray.cli.init.local_gpus", lambda: 0)
    path = tmp_path / "my.yaml"
    assert f"{count} x {SMI[machine][0].partition(',')[0]}" in invoke("init", path).stdout
    config = load_config(path)
    low = config.pools.low_memory
    assert (low.card, low.memory_gb, low.max_workers, low.gpus_per_node) == (card, memory_gb, count, count)
    assert low.host_memory_gb == int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    assert config.needed_pools == ((low, count),)
    assert (low.price_per_hour, config.pools.high_memory.gpu) == (0, 0)
    assert invoke("plan", path).exit_code == 0
    # for a cluster that this machine is not part of
    assert invoke("init", tmp_path / "other.yaml", "--preset", "default").exit_code == 0
    assert (tmp_path / "other.yaml").read_text() == preset_text("default")


@pytest.mark.parametrize(
    "words", ["2 x RTX 4090, 8 x H100", "2 x RTX 4090 with 64 GB", "RTX 4080 SUPER", "9 lives", "0 x H100"]
)
def test_init_refuses_words_that_are_not_cards_of_one_kind(tmp_path, words):
    """Before: of two kinds, the larger card was taken, as often as there are of the first."""
    result = invoke("init", tmp_path / "my.yaml", "--cards", words)
    assert result.exit_code == 2
    assert f"--cards: '{words}': must be " in " ".join(result.output.split())


def test_init_refuses_a_card_of_another_size_than_it_knows(tmp_path):
    result = invoke("init", tmp_path / "my.yaml", "--cards", "1 x RTX 4060 Ti 8GB")
    assert (result.exit_code, "RTX 4060 Ti is known with 15.5 GiB" in " ".join(result.output.split())) == (2, True)


@pytest.mark.parametrize("words", ["8x rtx4090", "8 x 4090", "8 x NVIDIA GeForce RTX 4090", "8 x RTX 4090 24GB"])
def test_init_knows_cards_as_people_write_them(tmp_path, words):
    invoke("init", tmp_path / "my.yaml", "--cards", words)
    low = yaml.safe_load((tmp_path / "my.yaml").read_text())["pools"]["low_memory"]
    assert (low["card"], low["max_workers"]) == ("RTX 4090", 8)
    # Before: in small letters, cards were found only if their names have none.
    for small, card in {"a100-80gb": "A100-80GB", "rtx 4060 ti": "RTX 4060 Ti"}.items():
        invoke("init", tmp_path / "my.yaml", "--force", "--cards", small)
        assert yaml.safe_load((tmp_path / "my.yaml").read_text())["pools"]["low_memory"]["card"] == card


def test_init_takes_cards_text_and_start_as_options(tmp_path):
    """Before: the texts of the installed packages, random weights, and this machine's cards, whatever the user has."""
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("One upon a time. " * 99)
    (tmp_path / "b.md").write_text("# Title")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    for name, sized in {
        "moe": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64},
        "dense": {"model_type": "qwen3", "intermediate_size": 64, "head_dim": 16},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes | sized))
    path, text, more = tmp_path / "my.yaml", tmp_path / "books", f"{tmp_path}/*.md"
    arguments = ("init", path, "--force", "--cards", "8 x RTX 4090", "--text", text, "--text", more)
    for name in ("moe", "dense"):
        assert "set its main memory" in invoke(*arguments, "--start", tmp_path / name).stdout
        raw = yaml.safe_load(path.read_text())
        assert [source["path"] for source in raw["corpus"]["sources"]] == [str(text), more]
        low = raw["pools"]["low_memory"]
        assert (low["card"], low["max_workers"], low["gpus_per_node"], low["host_memory_gb"]) == (
            "RTX 4090",
            8,
            8,
            None,
        )
        start = {
            "moe": {"checkpoint": str(tmp_path / "moe")},
            "dense": {"upcycle": str(tmp_path / "dense"), "num_experts": 8},
        }
        assert raw["model"] == {"init": start[name]}
        assert (raw["tokens"]["seed_share"] == 0) == (name == "moe")
    for wrong in ("8 x Voodoo2", "0 x L4", ""):
        assert invoke("init", path, "--force", "--cards", wrong).exit_code == 2
    assert invoke("init", path, "--force", "--cards", "L4", "--preset", "demo").exit_code == 2
    bad_start = invoke("init", path, "--force", "--start", tmp_path / "none")
    assert bad_start.exit_code == 2
    # Before: `model.init.checkpoint`, which the user did not write.
    assert one_line(bad_start).startswith(f"moedisco: --start: '{tmp_path / 'none'}': ")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nope.txt", "cannot be read (no such file or folder)"),
        ("*.md", "holds no files"),
        ("", "is no file"),
        ("a**", "`**` stands alone"),
        ("x" * 300, "cannot be read ("),
        ("locked", "cannot be read ("),
    ],
)
def test_init_refuses_text_that_does_not_exist(tmp_path, monkeypatch, place, words):
    """Before: a file was written, and the exit code was 0; a name that is too long ended in a traceback."""
    (tmp_path / "here").mkdir()
    (tmp_path / "locked").symlink_to("locked")
    monkeypatch.chdir(tmp_path / "here")
    place = "../locked/a.txt" if place == "locked" else place
    result = invoke("init", "my.yaml", "--preset", "demo", "--text", place)
    assert result.exit_code == 2
    assert one_line(result).startswith(f"moedisco: --text: '{place}': {words}")
    assert list((tmp_path / "here").iterdir()) == []


def test_init_says_when_the_size_of_the_text_is_unknown(tmp_path):
    """Before: `tokens.total` was that of the preset without a word. What needs the network is not looked for."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cover.jpg").write_bytes(b"x")
    for place, reason in {
        "s3://no-bucket/x": "s3://no-bucket/x is at a URI",
        tmp_path: f"{tmp_path}/cover.jpg has the unknown ending .jpg; leave it out",
    }.items():
        path = tmp_path / "my.yaml"
        result = invoke("init", path, "--force", "--preset", "demo", "--text", place)
        assert result.exit_code == 0
        said = " ".join(result.stdout.split())
        words = "tokens.total is 1,600,000, as in the preset, because the size of the text is unknown: "
        assert f"{words}{reason}" in said
        assert load_config(path).tokens.total == 1_600_000


def test_tiny_text_is_read_more_often_than_is_of_use():
    """A hundredth of a preset's tokens is trained on at least."""
    assert tokens_for(1_000_000, 400_000_000) == 4_000_000
    assert tokens_for(100, 400_000_000) == 4_000_000
    assert tokens_for(25_000_000, 400_000_000) == 100_000_000
    assert tokens_for(10**9, 400_000_000) == 400_000_000


@pytest.mark.parametrize(("size", "total"), [(4_000_000, 4_000_000), (400, 4_000_000), (4 * 10**9, 400_000_000)])
def test_init_trains_on_tokens_that_the_text_has_and_all_say_how_often_it_is_read(tmp_path, size, total):
    """Before: 400 million tokens, whatever the text, and no word of how often it is read."""
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(size)
    path = tmp_path / "my.yaml"
    said = " ".join(invoke("init", path, "--preset", "default", "--text", tmp_path / "a.txt").stdout.split())
    assert load_config(path).tokens.total == total
    assert (
        f"tokens.total is {total:,}: the text, about {size // 4:,} tokens, is read {total / size * 4:.1f}"[:60] in said
    )
    planned = " ".join(invoke("plan", path).stdout.split())
    assert ("is read" in planned, "add text, or lower tokens.total" in planned) == (True, size == 400)
    assert ("add text, or lower tokens.total" in said) == (size == 400)


@pytest.mark.parametrize("preset", get_args(PresetName))
def test_every_preset_takes_text_and_start(preset):
    """Before: there were no such options."""
    text = from_model(on_text(preset_text(preset), ["a.txt"]), "ORG/NAME", moe=True)
    raw = yaml.safe_load(text)
    assert raw["corpus"]["sources"] == [{"path": "a.txt"}]
    assert raw["model"] == {"init": {"checkpoint": "ORG/NAME"}}
    assert raw["tokens"]["seed_share"] == 0


@pytest.mark.parametrize("answer", ["exit 9", "echo 'No devices were found'"])
def test_a_driver_that_fails_has_no_cards(tmp_path, monkeypatch, answer):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert local_cards() == ()


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
    assert "joint training on 1 x A100 (estimate)" in result.stdout
    assert "/runs/demo/model\n" in result.stdout
    assert "moedisco chat " in result.stdout


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
    shown = invoke("show", tmp_path).stdout
    assert "What the model writes" in shown
    assert f"moedisco chat {tmp_path}  " in shown, "what to do next"
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
