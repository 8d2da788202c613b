"""Commands about data sets, and the upload of the local text that a submitted configuration names."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.globs import Glob, matches_any
from moedisco_ray.core.printable import one_line
from service.commands.connection import RUNS_PANEL, connected
from service.commands.output import interruptible, moment, remark, say, transfer_bar, write_json, write_table
from service.commands.views import datasets_table
from service.domain.datasets import reference

if TYPE_CHECKING:
    from service.client import Client
    from service.schemas import DatasetInfo, RunDetail

commands = typer.Typer()
datasets = typer.Typer(no_args_is_help=True, help="Data sets: text that is uploaded once and read by runs.")
commands.add_typer(datasets, name="datasets", rich_help_panel=RUNS_PANEL)

DatasetName = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="The data set's id, NAME@sha256:HASH with the first letters of the hash, or its name."
    ),
]
_WILDCARD = re.compile(r"[*?\[]")
_SOURCES = ("corpus", "evaluation")
"""Sections of a configuration that name text."""
_LISTED = 5


@datasets.command("list")
def list_datasets(
    name: Annotated[str | None, typer.Option(help="Show only data sets with this name.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the data sets that you may see, newest first."""
    with connected() as client:
        found = list(client.datasets(name=name))
    write_json(found) if as_json else write_table(datasets_table(found))


@datasets.command()
def upload(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, or a folder; hidden files are left out.")],
    name: Annotated[str | None, typer.Option(help="Name; by default that of the file or folder.")] = None,
    project: Annotated[
        str | None,
        typer.Option(help="Id or name of the project whose members may see the data set; by default only you may."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a data set. After an interruption, the same command continues where it stopped."""
    with interruptible(_kept), connected(outlasts_restarts=True) as client, _progress(path.name) as shown:
        made = client.upload_dataset(path, name, project=project, progress=shown)
    write_json(made) if as_json else say(f"{made.id}  dataset://{reference(made.name, made.hash)}")


@datasets.command()
def download(
    dataset: DatasetName,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory to create; by default it has the data set's name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a data set. After an interruption, the same command continues where it stopped."""
    with interruptible(_kept), connected(outlasts_restarts=True) as client:
        found = find_dataset(client, dataset)
        with _progress(found.name) as shown:
            target = client.download_dataset(found.id, directory or Path(found.name), shown)
    write_json({"directory": target}) if as_json else say(f"The data set is in {target}")


@datasets.command()
def delete(
    dataset: DatasetName,
    sure: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a data set that no run may still read."""
    with connected() as client:
        found = find_dataset(client, dataset)
        if not sure and sys.stdin.isatty():
            typer.confirm(one_line(f"Delete {found.name} of {moment(found.created)}?"), abort=True, err=True)
        client.delete_dataset(found.id)
    write_json({"deleted": found.id}) if as_json else say(f"{found.id}  {found.name}: deleted")


def find_dataset(client: Client, text: str) -> DatasetInfo:
    """The data set that a text names: by its id, by its name and the beginning of its hash, or by its name.

    Raises:
        UserError: No data set matches, or more than one.
    """
    name, _, start = text.strip().removeprefix("dataset://").partition("@")
    start = start.removeprefix("sha256:")
    found = [
        each for each in client.datasets() if name == each.id or (name == each.name and each.hash.startswith(start))
    ]
    if not found:
        raise UserError("DATASET", text, "no such data set; `moedisco datasets list` shows those that you may see")
    if len(found) > 1:
        some = ", ".join(each.id for each in found[:_LISTED])
        raise UserError("DATASET", text, f"names {len(found)} data sets; give the id of one: {some}")
    return found[0]


def submitted(
    client: Client, asked: dict[str, Any], send: Callable[[], RunDetail], *, upload: bool | None, project: str | None
) -> RunDetail:
    """Submit a run; text on this machine that the service cannot read is uploaded, and the run submitted again.

    Args:
        client: Client of the service.
        asked: The configuration with absolute paths. The paths of uploaded text are replaced by data sets.
        send: Submits the configuration.
        upload: Whether to upload all local text (True), none (False), or what the service refuses to read (None).
        project: Id or name of the project of the run, in which the data sets are created.
    """
    from service.client import RequestRefused

    for source in _local(asked).values() if upload else ():
        _upload_source(client, source, project)
    while True:
        try:
            return send()
        except RequestRefused as refusal:
            fields = {mistake.field for mistake in refusal.problem.errors}
            refused = [source for field, source in _local(asked).items() if f"config.{field}.path" in fields]
            if upload is False or not refused:
                raise
            for source in refused:
                _upload_source(client, source, project)


def _local(asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sources of text on this machine, by their place in the configuration; text of data owners stays where it is."""
    found: dict[str, dict[str, Any]] = {}
    for section in _SOURCES:
        for number, source in enumerate(asked.get(section, {}).get("sources", ())):
            path = source["path"]
            if "://" not in path and path != "embedded" and source.get("owner") is None and _folder_of(path).exists():
                found[f"{section}.sources.{number}"] = source
    return found


def _upload_source(client: Client, source: dict[str, Any], project: str | None) -> None:
    from service.client.uploading import name_of

    path, folder = source["path"], _folder_of(source["path"])
    files = files_of(path, source.get("exclude", ()))
    if not files:
        raise UserError("path", path, "has no files to upload; name a file, or a folder with text")
    size = sum(file.stat().st_size for file in files.values())
    remark(f"uploads {len(files)} files of {path} ({decimal(size)}), which the service cannot read itself")
    with interruptible(_kept), _progress(folder.name) as shown:
        made = client.upload_dataset(files, name_of(folder), project=project, progress=shown)
    source["path"] = f"dataset://{reference(made.name, made.hash)}"


def files_of(path: str, exclude: Iterable[str]) -> dict[str, Path]:
    """The files of a source, by their path below its folder: a file, those in a folder, or those that a glob matches.

    Args:
        path: Absolute path of the source.
        exclude: Globs of files to leave out, as in the configuration.
    """
    from service.client.uploading import files_at

    found = files_at(_folder_of(path))
    if _WILDCARD.search(path):
        pattern = Glob.of(path)
        found = {name: file for name, file in found.items() if pattern.matches(str(file))}
    names = [Glob.of(each) for each in exclude if "/" not in each]
    paths = [Glob.of(each.lstrip("/")) for each in exclude if "/" in each]
    return {
        name: file for name, file in found.items() if not (matches_any(names, file.name) or matches_any(paths, name))
    }


def _folder_of(path: str) -> Path:
    """The folder above the first wildcard of a path; without wildcards, the path itself."""
    wildcard = _WILDCARD.search(path)
    return Path(path if wildcard is None else path[: wildcard.start()].rpartition("/")[0] or "/")


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    with transfer_bar() as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _kept() -> str:
    return "interrupted; what has arrived is kept for a day: the same command continues from there"
