"""The documents agree with the code: references, settings, commands, links and paths."""

import ast
import operator
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from ray.scripts.scripts import cli as ray

from benchmarks.study.__main__ import app as study
from docs import generate
from moedisco_ray.core.config import RunConfig
from service.cli import app

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "cluster_yaml/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


@pytest.fixture(params=GUIDES)
def text(request):
    return (ROOT / request.param).read_text(encoding="utf-8")


def setting_paths(section, definitions, prefix=""):
    """Dotted paths of all settings and sections; an entry of a list has the path of the list."""
    for name, field in section["properties"].items():
        yield prefix + name
        for option in (field, field.get("items", {}), *field.get("anyOf", ())):
            if "$ref" in option:
                yield from setting_paths(
                    definitions[option["$ref"].rpartition("/")[2]], definitions, f"{prefix}{name}."
                )


def repeated(page):
    """Settings that the configuration reference describes by another one alone, each with the path of that one."""
    for section, paths in re.findall(r"^As in `(\S+)`, with the same default: (.+)\.$", page, re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", paths):
            yield path, f"{section}.{path.rpartition('.')[2]}"


def command_names(application):
    """Names of all commands and groups of a typer application, nested ones included."""
    for command in application.registered_commands:
        yield command.name or command.callback.__name__.replace("_", "-")
    for group in application.registered_groups:
        if isinstance(group.name, str):  # otherwise its commands have no prefix
            yield group.name
        yield from command_names(group.typer_instance)


def test_what_is_generated_is_up_to_date():
    stale = [
        str(path.relative_to(ROOT))
        for path, page in generate.pages().items()
        if path.read_text(encoding="utf-8") != page
    ]
    assert stale == [], "run `make docs` and commit the result"


def test_the_references_are_complete():
    schema = RunConfig.model_json_schema()
    page = (ROOT / "docs/configuration.md").read_text().replace("[]", "")
    settings = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)).union(dict(repeated(page)))
    sections = {path.rpartition(".")[0] for path in setting_paths(schema, schema["$defs"])}
    assert set(setting_paths(schema, schema["$defs"])) - sections <= settings
    headings = (ROOT / "docs/cli.md").read_text()
    assert [name for name in command_names(app) if f" {name}\n" not in headings] == []


def test_a_setting_without_a_row_is_as_the_one_it_refers_to():
    page = (ROOT / "docs/configuration.md").read_text()
    described = set(re.findall(r"^\| `(\S+)` \|", page, re.MULTILINE))
    defaults = RunConfig.model_validate({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}})
    pairs = list(repeated(page))
    assert not described & dict(pairs).keys()
    assert described >= {first for _, first in pairs}
    values = [operator.attrgetter(*pair)(defaults) for pair in pairs if "[]" not in pair[0]]
    assert len(values) > 10
    assert [pair for pair in values if pair[0] != pair[1]] == []


def test_every_setting_that_a_document_names_exists(text):
    schema = RunConfig.model_json_schema()
    named = {name.replace("[]", "") for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+(?:\[\])?)+)[`=:]", text)}
    named = {name for name in named if name.split(".")[0] in schema["properties"] and not name.endswith(".json")}
    assert named <= set(setting_paths(schema, schema["$defs"]))


def test_every_command_that_a_document_names_exists(text):
    named = set(re.findall(r"(?:`|\$ |&& |')moedisco ([a-z][a-z-]*)", text))
    assert named <= set(command_names(app))


def test_every_option_of_a_command_in_a_document_exists(text):
    programs = {"moedisco": typer.main.get_command(app), "python -m benchmarks.study": typer.main.get_command(study)}
    lines = re.findall(r"^\$ (.+?)(?:#.*)?$", text, flags=re.MULTILINE)
    for line in (part for whole in lines for part in re.split(r"&&|\|", whole)):
        for name, program in programs.items():
            command, words = program, line.partition(f"{name} ")[2].split()
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            named = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert command is program or named <= known | {"--help"}, line


def commands_of(text):
    """Command lines of a document, without comments, the lines of one command joined."""
    for line in re.findall(r"^\$ (.+)$", text.replace("\\\n", " "), flags=re.MULTILINE):
        yield from (" ".join(part.split()) for part in re.split(r"&& (?=moedisco|ray )", re.sub(r" +#.*", "", line)))


def parse(application, words):
    """Fail unless a program takes these words: options exist, and arguments are neither too few nor too many."""
    words = [word.replace("$FILE", "cluster_yaml/aws/spot.yaml") for word in words]
    while words and words[0] in getattr(application, "commands", {}):
        application = application.commands[words.pop(0)]
    assert not getattr(application, "commands", None), f"no such command: {words}"
    application.make_context(application.name, words)


def test_every_command_of_the_first_hour_parses():
    """Commands of other programs are those of the documents that the cluster files' tests start."""
    programs = {"moedisco": typer.main.get_command(app), "ray": ray}
    others = " ".join(
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("CONTRIBUTING.md", "docs/cluster.md", "docs/joining.md", "docs/tutorial.md")
    )
    lines = list(commands_of((ROOT / "docs/first-hour.md").read_text(encoding="utf-8")))
    assert len(lines) > 30
    for line in lines:
        program, *words = shlex.split(line)
        if program in programs:
            parse(programs[program], words)
        else:
            assert line.replace(" \\ ", " ") in others.replace(" \\ ", " "), line


@pytest.mark.parametrize("line", ["show", "plan my.yaml more", "submit my.yaml --url http://x", "ini my.yaml"])
def test_a_command_that_does_not_parse_is_found(line):
    with pytest.raises(Exception, match=r"(?i)missing|unexpected|no such"):
        parse(typer.main.get_command(app), line.split())


def test_every_yaml_block_is_a_part_of_a_configuration(text):
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        RunConfig.model_validate({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, **yaml.safe_load(block)})


def test_every_python_block_compiles_and_its_imports_exist(text):
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "<document>", "exec"), {})


@pytest.mark.parametrize("name", GUIDES)
def test_every_link_leads_to_a_file(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not ((ROOT / name).parent / link).exists()] == []


def test_every_path_that_a_document_names_exists(text):
    named = re.findall(r"`((?:moedisco_ray|service|tests|docs|benchmarks|cluster_yaml)/[\w./-]*)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
