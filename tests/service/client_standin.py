"""A client against a service that is a function, with connections that break where a test says."""

import dataclasses
import json

import httpx

from moedisco_ray.core.records.bill import Line, make_bill
from service.client import Client, RetryPolicy

URL = "http://service.test:8300"
PROMPT = RetryPolicy(seconds=30.0, first_wait=0.0, longest_wait=0.0)
"""Does not wait between attempts."""


def bill(dollars, idle=0.0, **changes):
    lines = [Line(stage="seed", pool="low_memory", worker_seconds=10.0, dollars=dollars)]
    spare = [Line(stage="idle", pool="low_memory", worker_seconds=5.0, dollars=idle)] if idle else []
    return make_bill(lines, idle=spare, seconds=90.0, **changes).model_dump(mode="json")


RUN = {
    "id": "01JABCDEFGHJKMNPQRSTVWXYZ0",
    "name": "demo",
    "owner": "ann",
    "project": {"id": "01JABCDEFGHJKMNPQRSTVWXYZ1", "name": "ann", "owner": "ann", "role": "owner"},
    "tags": {},
    "priority": 0,
    "state": "running",
    "reason": None,
    "position": None,
    "attempt": 1,
    "parent": None,
    "created": 1.0,
    "queued": 1.0,
    "started": 2.0,
    "ended": None,
    "updated": 3.0,
    "stages": [{"name": "corpus", "status": "done", "started": 2.0, "seconds": 1.0}],
    "money": {"dollars": 0.5, "worker_seconds": {"low_memory": 10.0}, "estimate_dollars": 1.0, "budget_dollars": None},
    "version": 1,
    "events": 3,
    "job_url": None,
    "config": {"name": "demo"},
    "bill": bill(0.5, 0.25, planned=False, complete=False),
    "estimate": bill(1.0, planned=True, complete=True),
}


class Body(httpx.AsyncByteStream):
    """Chunks, then the end or a broken connection."""

    def __init__(self, chunks, broken=False):
        self.chunks, self.broken = chunks, broken

    async def __aiter__(self):
        for chunk in self.chunks:
            yield chunk
        if self.broken:
            raise httpx.ReadError("connection reset")


def event_stream(chunks, broken=False):
    """An answer with server-sent events."""
    return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=Body(chunks, broken))


def make(service, retry=PROMPT):
    """A client of a service given as a function from a request to a response."""
    return Client(URL, "mdk_test", retry=retry, transport=httpx.MockTransport(service))


def problem(status, detail="", errors=(), headers=None):
    """An answer with a problem document."""
    return httpx.Response(
        status,
        headers=headers,
        json={
            "type": f"/problems/{status}",
            "title": "Problem",
            "status": status,
            "detail": detail,
            "errors": [{"field": field, "message": message} for field, message in errors],
        },
    )


@dataclasses.dataclass
class Script:
    """Answers with what it was given, in order; the last again and again. Remembers the requests."""

    answers: list
    requests: list = dataclasses.field(default_factory=list)

    def __call__(self, request):
        self.requests.append(request)
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return _again(answer) if isinstance(answer, httpx.Response) else httpx.Response(200, content=json.dumps(answer))


def _again(answer):
    # A response is used up by the client that reads it.
    kept = {"stream": answer.stream} if isinstance(answer.stream, Body) else {"content": answer.content}
    return httpx.Response(answer.status_code, headers=answer.headers, **kept)
