"""Files of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.archives import Archive
from service.api.files import open_file, send_content
from service.api.openapi import content, problems
from service.api.routes.watching import VisibleRun
from service.api.security import SIGNED_IN, STREAM_SLOT
from service.database import tables
from service.run_storage import storage_of
from service.schemas import ArtifactPage

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["files"], dependencies=SIGNED_IN)
_FILE: dict[int | str, dict[str, Any]] = {
    200: content("application/octet-stream", "The file."),
    206: content("application/octet-stream", "The range that `Range` asked for."),
    304: {"description": "`If-None-Match` matches the current version."},
}
_ARCHIVE: dict[int | str, dict[str, Any]] = _FILE | {
    200: content("application/x-tar", "The archive."),
    206: content("application/x-tar", "The range that `Range` asked for."),
}


@router.get("/artifacts", responses=problems(404))
def list_artifacts(run: VisibleRun) -> ArtifactPage:
    """List the finished files of the run directory, sorted by path."""
    return ArtifactPage(items=storage_of(run.location).files())


@router.get(
    "/artifacts/{path:path}", response_class=Response, dependencies=[STREAM_SLOT], responses=_FILE | problems(404, 416)
)
def get_artifact(run: VisibleRun, path: str, request: Request) -> Response:
    """Download a file or a range of it (`Range`)."""
    return send_content(request, open_file(storage_of(run.location), path))


@router.head("/artifacts/{path:path}", response_class=Response, responses=_FILE | problems(404, 416))
def head_artifact(run: VisibleRun, path: str, request: Request) -> Response:
    """Size and version of a file."""
    return send_content(request, open_file(storage_of(run.location), path))


@router.get("/model.tar", response_class=Response, dependencies=[STREAM_SLOT], responses=_ARCHIVE | problems(404, 416))
def get_model_archive(run: VisibleRun, request: Request) -> Response:
    """Download the finished model (a Hugging Face directory) as one archive, or a range of it (`Range`).

    It never changes.
    """
    return send_content(request, _archive(run))


@router.head("/model.tar", response_class=Response, responses=_ARCHIVE | problems(404, 416))
def head_model_archive(run: VisibleRun, request: Request) -> Response:
    """Size and version of the finished model's archive."""
    return send_content(request, _archive(run))


def _archive(run: tables.RunRow) -> Archive:
    # The display name can be changed to anything, such as "../x", and a download that is resumed must not change.
    return Archive(storage_of(run.location), "model", Path(run.directory).name)
