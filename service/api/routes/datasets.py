"""Data sets: text that people upload for their runs, file by file, in parts that can be sent again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from service.api.bodies import RawBody
from service.api.context import InContext, ServiceContext
from service.api.files import open_file, send_content
from service.api.openapi import body_of, content, problems
from service.api.parameters import Cursor, Limit
from service.api.security import SIGNED_IN, STREAM_SLOT, Caller, Reader, Submitter, project_for
from service.api.submission import note, policy_of
from service.database import dataset_tables, datasets, projects, quotas
from service.dataset_store import remove_unused
from service.domain.access import Action, check_access
from service.domain.datasets import HASH_PATTERN, MOST_BYTES, DatasetFile, found_in, hash_of
from service.domain.quotas import check_upload
from service.errors import BadRequest, Conflict, InvalidRequest, NotFound
from service.run_storage import DirectoryRun
from service.schemas import (
    BlobState,
    DatasetDetail,
    DatasetFileInfo,
    DatasetInfo,
    DatasetPage,
    DatasetRequest,
    DatasetUpload,
)
from service.schemas.mistakes import parsed

router = APIRouter(prefix="/v1", tags=["datasets"], dependencies=SIGNED_IN)

_BLOCK = 2**20
"""Size of the blocks in which a body is written (bytes)."""
_RANGE = re.compile(r"bytes (?:(\d{1,16})-(\d{1,16})|\*)/(\d{1,16})")
_ABSENT = "the data set has no file {}; GET /v1/datasets/ID lists them"
_FILE: dict[int | str, dict[str, Any]] = {
    200: content("application/octet-stream", "The file."),
    206: content("application/octet-stream", "The range that `Range` asked for."),
    304: {"description": "`If-None-Match` matches the current version."},
}
_PART: dict[str, Any] = {
    "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}

DatasetId = Annotated[
    str, Path(max_length=64, description="Id of a data set.", examples=["01JDB5W3XQ3N8QZ7V0G6M4T9KE"])
]
_Hash = Annotated[str, Path(pattern=f"^{HASH_PATTERN}$", description="SHA-256 of the file.", examples=["0" * 64])]
_Name = Annotated[str | None, Query(max_length=64, description="Name of the data sets.")]
_ContentRange = Annotated[
    str,
    Header(
        alias="Content-Range",
        max_length=64,
        description="Bytes of the file that the body has, such as `bytes 0-99/250`; `bytes */250` with an empty body "
        "ends an upload whose bytes have all arrived.",
        examples=["bytes 0-99/250"],
    ),
]


@router.get("/datasets", responses=problems())
def list_datasets(
    caller: Reader, context: InContext, name: _Name = None, cursor: Cursor = None, limit: Limit = 50
) -> DatasetPage:
    """List the data sets that the caller may see, newest first."""
    with context.database.read() as session:
        rows, following = datasets.page(session, caller.person, name=name, cursor=cursor, limit=limit)
        return DatasetPage(items=_answers(session, caller, rows), next_cursor=following)


@router.post("/datasets", responses=problems(404, 409, 507, body=True), openapi_extra=body_of("DatasetRequest"))
def create_dataset(body: RawBody, caller: Submitter, context: InContext) -> DatasetUpload:
    """Create a data set from files that have been uploaded, or answer which of them are missing.

    A file that the caller has uploaded before is not missing. The request may be repeated: the same files with the same
    name in the same project are one data set.
    """
    asked = parsed(DatasetRequest, body)
    files = [DatasetFile(file.path, file.bytes, file.sha256) for file in asked.files]
    sizes = {file.sha256: file.bytes for file in files}
    for number, file in enumerate(files):
        if sizes[file.sha256] != file.bytes:
            raise InvalidRequest([(f"files.{number}.bytes", "is not the size of another file with this sha256")])
    missing = _missing(context, caller, asked.project, sizes)
    if missing:
        return DatasetUpload(dataset=None, missing=missing)
    digest, now = hash_of(files), context.now()
    context.datasets.assemble(digest, files)
    with context.database.write() as session:
        if asked.project is None:
            project = projects.default_of(session, caller.owner, now).id
        else:
            project = project_for(session, caller, asked.project, "edit").id
            projects.hold(session, project)
        datasets.lock(session, digest)
        is_whole = context.datasets.folder(digest).is_dir()
        if not is_whole or len(datasets.known_blobs(session, caller.owner, sizes)) < len(sizes):
            raise Conflict("files of this data set were deleted just now; send the request again")
        row = datasets.same(session, project, asked.name, digest)
        if row is None:
            row = datasets.insert(session, name=asked.name, owner=caller.owner, project=project, files=files, now=now)
            note(session, caller, "dataset.create", row.id, now=now, detail={"name": row.name, "hash": digest})
        return DatasetUpload(dataset=_answers(session, caller, [row])[0], missing=[])


@router.put("/blobs/{sha256}", dependencies=[STREAM_SLOT], responses=problems(409, 507, body=True), openapi_extra=_PART)
async def put_blob(
    sha256: _Hash, request: Request, caller: Submitter, context: InContext, content_range: _ContentRange
) -> BlobState:
    """Upload a part of a file of a data set.

    What has arrived when a connection is lost is kept for a day; POST /v1/datasets says where to continue. The last
    part completes the file, whose hash is then checked.
    """
    start, end, size = _range(content_range)
    await run_in_threadpool(_check_quota, context, caller, sha256, size)
    offset = await _received(context, caller.owner, sha256, request, (start, end))
    if offset == size:
        await run_in_threadpool(_complete, context, caller, sha256, size)
    return BlobState(sha256=sha256, bytes=size, offset=offset)


@router.get("/datasets/{dataset_id}", responses=problems(404))
def get_dataset(dataset_id: DatasetId, caller: Reader, context: InContext) -> DatasetDetail:
    """A data set with its files."""
    with context.database.read() as session:
        row = _dataset_for(session, caller, dataset_id)
        shown = _answers(session, caller, [row])[0]
        files = [DatasetFileInfo.of(file) for file in datasets.files(session, row.id)]
    return DatasetDetail(**dict(shown), files=files)


@router.delete("/datasets/{dataset_id}", status_code=204, responses=problems(404, 409))
def delete_dataset(dataset_id: DatasetId, caller: Submitter, context: InContext) -> None:
    """Delete a data set. One that a run may still read cannot be deleted: the run has not succeeded."""
    now = context.now()
    with context.database.write() as session:
        row = _dataset_for(session, caller, dataset_id, "edit")
        datasets.lock(session, row.hash)
        unused = datasets.remove(session, row)
        is_last = not datasets.exists_with(session, row.hash)
        if is_last and (run := datasets.reader(session, row.hash)) is not None:
            raise Conflict(f"run {run} reads this data set and has not succeeded; delete the run first")
        note(session, caller, "dataset.delete", row.id, now=now, detail={"name": row.name, "hash": row.hash})
    remove_unused(context.database, context.datasets, [row.hash] if is_last else [], unused)


@router.get(
    "/datasets/{dataset_id}/files/{path:path}",
    response_class=Response,
    dependencies=[STREAM_SLOT],
    responses=_FILE | problems(404, 416),
)
def get_dataset_file(
    dataset_id: DatasetId, path: str, request: Request, caller: Reader, context: InContext
) -> Response:
    """Download a file of a data set or a range of it (`Range`)."""
    return _file(context, caller, dataset_id, path, request)


@router.head("/datasets/{dataset_id}/files/{path:path}", response_class=Response, responses=_FILE | problems(404, 416))
def head_dataset_file(
    dataset_id: DatasetId, path: str, request: Request, caller: Reader, context: InContext
) -> Response:
    """Size of a file of a data set."""
    return _file(context, caller, dataset_id, path, request)


def _file(context: ServiceContext, caller: Caller, dataset_id: str, path: str, request: Request) -> Response:
    with context.database.read() as session:
        row = _dataset_for(session, caller, dataset_id)
    folder = found_in(context.roots.homes, row.hash)
    if folder is None:
        raise NotFound("the files of this data set are gone; delete it, and upload it again")
    return send_content(request, open_file(DirectoryRun(folder), path, _ABSENT))


def _dataset_for(
    session: Session, caller: Caller, dataset_id: str, action: Action = "see"
) -> dataset_tables.DatasetRow:
    row = datasets.get(session, dataset_id)
    check_access(None if row is None else projects.role(session, caller.person, row.project), action, "data set")
    assert row is not None  # noqa: S101 - a stranger has no role in an absent data set
    return row


def _answers(session: Session, caller: Caller, rows: Sequence[dataset_tables.DatasetRow]) -> list[DatasetInfo]:
    roles = projects.roles(session, caller.person, [row.project for row in rows])
    plain = DatasetInfo.model_fields.keys() - {"role"}
    answers = []
    for row in rows:
        shown = {name: getattr(row, name) for name in plain}
        answers.append(DatasetInfo(**shown, role=roles[row.project]))
    return answers


def _missing(context: ServiceContext, caller: Caller, project: str | None, sizes: dict[str, int]) -> list[BlobState]:
    """The files that the caller has to upload.

    A content that another owner has counts as missing: its hash alone does not give anyone the text.
    """
    with context.database.read() as session:
        if project is not None:
            project_for(session, caller, project, "edit")
        known = datasets.known_blobs(session, caller.owner, sizes)
        use = quotas.use_of(session, caller.owner, context.now())
    store = context.datasets
    missing = [
        BlobState(sha256=sha256, bytes=size, offset=store.arrived(caller.owner, sha256))
        for sha256, size in sizes.items()
        if sha256 not in known or not store.has(sha256)
    ]
    if missing:
        check_upload(policy_of(context, caller), use, sum(blob.bytes for blob in missing))
    return missing


def _range(text: str) -> tuple[int, int, int]:
    """Start, end and size of the file, in bytes; start and end are equal if there is no part.

    Raises:
        InvalidRequest: The text is no such range.
    """
    found = _RANGE.fullmatch(text)
    if found is not None:
        size = int(found[3])
        start, end = (size, size) if found[1] is None else (int(found[1]), int(found[2]) + 1)
        if start <= end <= size <= MOST_BYTES and (start < end or found[1] is None):
            return start, end, size
    raise InvalidRequest([("Content-Range", f"{text!r}: must read bytes FIRST-LAST/SIZE, such as bytes 0-99/250")])


def _check_quota(context: ServiceContext, caller: Caller, sha256: str, size: int) -> None:
    policy = policy_of(context, caller)
    if policy.disk_bytes is None:
        return
    with context.database.read() as session:
        use = quotas.use_of(session, caller.owner, context.now())
    others = context.datasets.unfinished_bytes(caller.owner) - context.datasets.arrived(caller.owner, sha256)
    check_upload(policy, use, max(0, others) + size)


async def _received(context: ServiceContext, owner: str, sha256: str, request: Request, part: tuple[int, int]) -> int:
    """Write the body, a part of a file from its start to its end, as it arrives; returns the end of what has arrived.

    Raises:
        BadRequest: The body has another length than its range; what fits is kept.
    """
    (offset, end), waiting = part, bytearray()

    async def write() -> None:
        nonlocal offset
        if waiting:
            await run_in_threadpool(context.datasets.append, owner, sha256, offset, bytes(waiting))
            offset += len(waiting)
            waiting.clear()

    try:
        async for chunk in request.stream():
            if offset + len(waiting) + len(chunk) > end:
                raise BadRequest("the body is longer than its Content-Range; send as many bytes as it names")
            waiting += chunk
            if len(waiting) >= _BLOCK:
                await write()
    except ClientDisconnect as error:
        await write()
        raise BadRequest("the connection was lost; what has arrived is kept") from error
    await write()
    if offset < end:
        raise BadRequest("the body is shorter than its Content-Range; what has arrived is kept")
    return offset


def _complete(context: ServiceContext, caller: Caller, sha256: str, size: int) -> None:
    context.datasets.check(caller.owner, sha256, size)
    now = context.now()
    with context.database.write() as session:
        datasets.lock_blob(session, sha256)
        context.datasets.publish(caller.owner, sha256)
        datasets.add_blob(session, caller.owner, sha256, size, now)
