"""What a run would need and cost, and what there is to run it on."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from moedisco_ray.config import RunConfig
from moedisco_ray.config.presets import PresetName, preset_text
from moedisco_ray.plan import Plan
from service.api.answers import price_answer
from service.api.bodies import StrictRoute
from service.api.context import InContext
from service.api.openapi import content, problems
from service.api.security import SIGNED_IN, Admin, Reader
from service.api.submission import checked, note
from service.database import prices, runs
from service.domain.states import ACTIVE, RunState
from service.schemas import EstimateRequest, Pools, PriceBook, PriceEntry

router = APIRouter(prefix="/v1", tags=["planning"], route_class=StrictRoute, dependencies=SIGNED_IN)


class YamlResponse(PlainTextResponse):
    """A commented configuration."""

    media_type = "text/yaml"


@router.post("/estimates", responses=problems(body=True))
def estimate(body: EstimateRequest, caller: Reader, context: InContext) -> Plan:
    """Parameters, memory, time and price of a run, and what would make it fit where it does not."""
    del caller
    return checked(body.config, context.roots)[1]


@router.get("/pools", responses=problems())
def list_pools(caller: Reader, context: InContext) -> Pools:
    """Machines of the cluster by their tag, with what they cost."""
    del caller
    now = context.now()
    with context.database.read() as session:
        waiting = runs.in_states(session, [RunState.QUEUED, *ACTIVE])
        found = context.pools.read({pool.resource for run in waiting for pool in run.pools.by_key.values()})
        priced = [pool.model_copy(update={"price_per_hour": prices.price_at(session, pool.resource, now)}) for pool in found.items]
    return found.model_copy(update={"items": priced})


@router.get("/prices", responses=problems())
def list_prices(caller: Reader, context: InContext) -> PriceBook:
    """What a worker-hour of each pool costs, and from when on; pools that are absent cost what a run's configuration says."""
    del caller
    with context.database.read() as session:
        return PriceBook.model_construct(items=[price_answer(row) for row in prices.book(session)])


@router.put("/prices", responses=problems(body=True))
def set_price(body: PriceEntry, caller: Admin, context: InContext) -> PriceEntry:
    """Set a price from a moment on. What was metered before stays as it was."""
    now = context.now()
    since = now if body.since is None else body.since
    with context.database.write() as session:
        row = prices.put(session, resource=body.resource, dollars_per_hour=body.dollars_per_hour, since=since)
        note(session, caller, "price.set", body.resource, now, {"dollars_per_hour": body.dollars_per_hour, "since": since})
        return price_answer(row)


@router.get("/presets/{name}", response_class=YamlResponse, responses=problems() | {
    200: content("text/yaml", "A configuration with a comment on every setting.", {"type": "object"})})
def get_preset(name: PresetName, caller: Reader) -> YamlResponse:
    """A commented configuration to start from."""
    del caller
    return YamlResponse(preset_text(name))


@router.get("/schema", responses=problems())
def get_schema(caller: Reader) -> dict[str, Any]:
    """JSON Schema of a configuration."""
    del caller
    return RunConfig.model_json_schema()
