"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML or JSON file; `moedisco init` writes one.")]
USUAL_FILE = Path("moedisco.yaml")
"""The file that `moedisco init` writes, and that commands read, unless another is named."""
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as tokens.total=1000000."),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Check the pools against the node types of this `ray up` file."),
]
MeasuredIn = Annotated[
    str | None,
    typer.Option(
        "--measured", metavar="RUN_DIR", help="Take the speed of GPU pools from this run, instead of assuming it."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
NewFile = Annotated[Path, typer.Argument(metavar="[PATH]", help="File to write; - writes to standard output.")]
Redo = Annotated[bool, typer.Option("--redo", help="Repeat the stages that depend on changed settings.")]
Reuse = Annotated[
    list[str] | None,
    typer.Option(
        "--reuse",
        metavar="RUN",
        help="Directory or URI of another run: take its finished stages that this run would make alike. Repeatable.",
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Trust the disk: do not verify the checksums of the files that stages read.")
]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair",
        help="Verify all files of the run first, and make damaged stages again; later ones only if the result differs.",
    ),
]
StopPath = Annotated[
    Path | None,
    typer.Option("--stop-file", metavar="PATH", help="Once this file exists, save a checkpoint and exit with code 3."),
]
AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE[:FUNCTION]",
        help="Code that the run may call, as a source's `map` names it; repeatable.",
        show_default="asked on a terminal",
    ),
]
ReportTo = Annotated[
    Path | None,
    typer.Option(
        "--report-to", metavar="FILE", help="Send events to the service that wrote this file; it has the URL and a key."
    ),
]
RunId = Annotated[
    str | None,
    typer.Option("--run-id", metavar="ID", help="Id of a new run in experiment trackers; random by default."),
]
RunDir = Annotated[
    str,
    typer.Argument(metavar="RUN_DIR", help="Directory or URI of a run, such as runs/NAME or s3://BUCKET/FOLDER/NAME."),
]
FinishedModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN_DIR", help="Directory or URI of a finished run, or the directory of an exported model."
    ),
]
Device = Annotated[str, typer.Option(help="Device that runs the model: cpu, cuda, or auto for a GPU if there is one.")]
Place = Literal["device", "cpu", "disk"]
ExpertsOn = Annotated[
    Place,
    typer.Option(
        help="Where experts are while no token selects them: on the device, in the memory of this machine, or in the "
        "model's files."
    ),
]
ResidentExperts = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Number of experts per layer that stay on the device, those used last; needs --experts-on.",
        show_default="twice the experts per token",
    ),
]
