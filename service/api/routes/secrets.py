"""Routes of the secrets of projects, whose values no answer shows."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from moedisco_ray.core.config.run import SecretName
from service.api.bodies import StrictRoute
from service.api.context import InContext
from service.api.openapi import problems
from service.api.parameters import ProjectName
from service.api.security import SIGNED_IN, Reader, Submitter, own_project_for, project_for
from service.api.submission import note
from service.database import project_secrets
from service.errors import NotFound
from service.schemas import SecretInfo, SecretPage, SecretRequest

router = APIRouter(
    prefix="/v1/projects/{project}/secrets", tags=["projects"], route_class=StrictRoute, dependencies=SIGNED_IN
)

_Name = Annotated[SecretName, Path(description="Name of the secret and of its environment variable.")]


@router.get("", responses=problems(404, 409))
def list_secrets(project: ProjectName, caller: Reader, context: InContext) -> SecretPage:
    """List the names and dates of a project's secrets."""
    with context.database.read() as session:
        found = project_secrets.page(session, project_for(session, caller, project).id)
        return SecretPage(items=[SecretInfo.of(row) for row in found])


@router.put("/{secret}", responses=problems(404, 409, body=True))
def set_secret(
    project: ProjectName, secret: _Name, body: SecretRequest, caller: Submitter, context: InContext
) -> SecretInfo:
    """Set a secret, which runs of the project may then name.

    If the project is the one with the owner's name, so may the owner's runs in other projects.
    """
    now, value = context.now(), body.value.get_secret_value()
    with context.database.write() as session:
        row = own_project_for(session, caller, project, now)
        found = project_secrets.put(session, context.secrets_key, row.id, secret, value, by=caller.owner, now=now)
        note(session, caller, "secret.set", row.id, now=now, detail={"name": secret})
        return SecretInfo.of(found)


@router.delete("/{secret}", status_code=204, responses=problems(404, 409))
def delete_secret(project: ProjectName, secret: _Name, caller: Submitter, context: InContext) -> None:
    """Delete a secret; drivers that have it keep it until they end."""
    now = context.now()
    with context.database.write() as session:
        row = project_for(session, caller, project, "edit")
        if not project_secrets.remove(session, row.id, secret):
            raise NotFound(f"this project has no secret {secret}")
        note(session, caller, "secret.delete", row.id, now=now, detail={"name": secret})
