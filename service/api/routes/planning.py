"""Estimates of runs, pools of the cluster, presets and the configuration's schema."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import PresetName, preset_text
from service.api.bodies import RawBody, StrictRoute
from service.api.context import InContext
from service.api.openapi import body_of, content, problems
from service.api.security import SIGNED_IN, Reader
from service.api.submission import estimated, policy_of
from service.database import runs
from service.domain.states import ACTIVE, RunState
from service.schemas import Estimate, PoolList

router = APIRouter(prefix="/v1", tags=["planning"], route_class=StrictRoute, dependencies=SIGNED_IN)


class YamlResponse(PlainTextResponse):
    """A YAML response."""

    media_type = "text/yaml"


@router.post(
    "/estimates", response_model=Estimate, responses=problems(body=True), openapi_extra=body_of("EstimateRequest")
)
async def estimate(body: RawBody, caller: Reader, context: InContext) -> Response:
    """Estimate parameters, memory, time and cost of a run at the operator's prices; gives remedies if it does not fit.

    One estimate of an owner is computed at a time; while another one waits, a newer one takes its place (status 429).
    """
    return Response(await estimated(context, caller, body), media_type="application/json")


@router.get("/pools", responses=problems())
def list_pools(caller: Reader, context: InContext) -> PoolList:
    """List the pools of the cluster with their prices."""
    prices = policy_of(context, caller).prices
    with context.database.read() as session:
        waiting = runs.in_states(session, [RunState.QUEUED, *ACTIVE])
        found = context.pools.read(runs.resources(waiting))
    priced = [pool.model_copy(update={"price_per_hour": prices.get(pool.resource)}) for pool in found.items]
    return found.model_copy(update={"items": priced})


@router.get(
    "/presets/{name}",
    response_class=YamlResponse,
    responses=problems()
    | {200: content("text/yaml", "A configuration with a comment on every setting.", {"type": "object"})},
)
def get_preset(name: PresetName, caller: Reader) -> YamlResponse:
    """A preset: a commented configuration to start from."""
    del caller
    return YamlResponse(preset_text(name))


@router.get("/schema", responses=problems())
def get_schema(caller: Reader) -> dict[str, Any]:
    """JSON Schema of the configuration."""
    del caller
    return RunConfig.model_json_schema()
