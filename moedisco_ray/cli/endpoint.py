"""An endpoint with OpenAI's API for one model, whose answers also name the experts of each token. Import it only to serve.

`transformers serve` has no place for the experts, needs the `openai` package, ignores parameters that it does not support, and
answers mistakes in another form than OpenAI's; its handlers are no public interface. So this module handles the requests, and
transformers generates, one answer at a time; further requests wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from moedisco_ray.cli.expert_use import ExpertUse
from moedisco_ray.cli.generation import document_ids, sampling, templated_ids
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError, MoeDiscoError, UserError
from moedisco_ray.core.families import DECLARATIONS

_GRACE_SECONDS = 1
"""Time for answers that are under way when the endpoint ends (s)."""
_CODES = {"model": "model_not_found", "messages": "context_length_exceeded", "prompt": "context_length_exceeded"}
"""OpenAI's code of a mistake, by the parameter."""
_NO_CLIENT = 499
"""Status of an answer whose client has left, as in nginx's log."""

Experts = dict[int, list[int]] | None
"""The experts that a token selects, by MoE layer; None for the last token of an answer, which the model does not read."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[_TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Question(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Literal[1] = 1
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()


class ChatQuestion(_Question):
    """The body of `POST /v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class TextQuestion(_Question):
    """The body of `POST /v1/completions`."""

    prompt: str


class _Piece(NamedTuple):
    """The next tokens of an answer, usually one; several may be one character."""

    text: str
    ids: list[int]
    experts: list[Experts]


class _Left(Exception):  # noqa: N818 - an end, not an error
    """The client has left."""


class _Streamer(BaseStreamer):
    """Gives each token once the model has read it, because only then are its experts known."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, use: ExpertUse | None, give: Callable[[_Piece], object]) -> None:
        self.left = threading.Event()
        self._tokenizer, self._use, self._give = tokenizer, use, give
        self._ids: list[int] | None = None      # None until the prompt has come
        self._experts: list[Experts] = []
        self._text, self._given = "", 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then each token before the model reads it."""
        if self.left.is_set():
            raise _Left
        if self._ids is None:
            self._ids = []
            return
        if self._ids:
            self._read(None if self._use is None else self._use.newest())
        self._ids += value.flatten().tolist()

    def end(self) -> None:
        """Give what is left."""
        self._read(None, last=True)

    def _read(self, experts: Experts, *, last: bool = False) -> None:
        ids = self._ids or []
        self._experts.append(experts)
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        if last or (len(text) > len(self._text) and not text.endswith("\ufffd")):   # it stands for a part of a character
            self._give(_Piece(text[len(self._text):], ids[self._given:], self._experts))
            self._text, self._given, self._experts = text, len(ids), []


class Endpoint:
    """Answers questions with one model.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        name: Name by which clients ask for it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.name = name
        self._model, self._tokenizer = model, tokenizer
        self._most = int(model.config.max_position_embeddings)
        self._use = ExpertUse(model) if model.config.model_type in DECLARATIONS else None
        self._one = ThreadPoolExecutor(1)

    async def chat(self, question: ChatQuestion, request: Request) -> Response:
        """Answer a conversation."""
        if self._tokenizer.chat_template is None:
            raise ConfigError("/v1/chat/completions", None, "the model has no chat template; use /v1/completions")
        try:
            ids = templated_ids(self._tokenizer, [{"role": each.role, "content": each.text} for each in question.messages])
        except TemplateError as error:
            raise ConfigError("chat template", None, f"refuses these messages ({error})") from error
        limit = question.max_completion_tokens or question.max_tokens
        return await self._answer(question, request, ids, limit=limit, field="messages")

    async def complete(self, question: TextQuestion, request: Request) -> Response:
        """Continue a text, which begins a document."""
        ids = document_ids(self._tokenizer, question.prompt)
        return await self._answer(question, request, ids, limit=question.max_tokens, field="prompt")

    async def _answer(self, question: _Question, request: Request, ids: list[int], *, limit: int | None, field: str) -> Response:
        if question.model != self.name:
            raise ConfigError("model", question.model, f"is not served here; ask for {self.name}")
        new = limit or max(1, self._most - len(ids))
        if len(ids) + new > self._most:
            raise ConfigError(
                field, None, f"{len(ids)} tokens and {new} new ones exceed the model's {self._most}; ask for less with max_tokens, "
                "or shorten the text")
        options = {"max_new_tokens": new, **sampling(question.temperature)}
        if question.top_p is not None and question.temperature != 0:
            options |= {"do_sample": True, "top_p": question.top_p}
        pieces = self._pieces(ids, options)
        if question.stream:
            return StreamingResponse(self._events(question, pieces, len(ids)), media_type="text/event-stream")
        whole = _Piece("", [], [])
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                whole = _Piece(whole.text + piece.text, whole.ids + piece.ids, whole.experts + piece.experts)
                if await request.is_disconnected():
                    return Response(status_code=_NO_CLIENT)
        choice = self._choice(question, whole, self._end(whole))
        return JSONResponse({**self._head(question), "choices": [choice], "usage": _usage(len(ids), len(whole.ids))})

    async def _events(self, question: _Question, pieces: AsyncIterator[_Piece], prompt: int) -> AsyncIterator[str]:
        head, count = self._head(question), 0
        if isinstance(question, ChatQuestion):
            yield _event({**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        try:
            async for piece in pieces:
                count += len(piece.ids)
                yield _event({**head, "choices": [self._choice(question, piece, None)]})
                end = self._end(piece)
        except (MoeDiscoError, RuntimeError, OSError) as error:     # too late for a status
            yield _event(_mistake(str(error), kind="server_error"))
            return
        yield _event({**head, "choices": [self._choice(question, _Piece("", [], []), end)]})
        if question.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(prompt, count)})
        yield "data: [DONE]\n\n"

    async def _pieces(self, ids: list[int], options: dict[str, Any]) -> AsyncGenerator[_Piece, None]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[_Piece | None] = asyncio.Queue()
        streamer = _Streamer(self._tokenizer, self._use, lambda piece: loop.call_soon_threadsafe(queue.put_nowait, piece))
        work = loop.run_in_executor(self._one, self._generate, ids, options, streamer)
        work.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await work      # raises what ended it
        finally:
            streamer.left.set()

    def _generate(self, ids: list[int], options: dict[str, Any], streamer: _Streamer) -> None:
        tokens_BL = torch.tensor([ids], device=self._model.device)
        with contextlib.suppress(_Left), self._use or contextlib.nullcontext():
            self._model.generate(
                tokens_BL, attention_mask=torch.ones_like(tokens_BL), streamer=streamer,
                pad_token_id=self._tokenizer.eos_token_id, **options)

    def _head(self, question: _Question) -> dict[str, Any]:
        kind = "text_completion" if isinstance(question, TextQuestion) else f"chat.completion{'.chunk' if question.stream else ''}"
        return {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}

    def _choice(self, question: _Question, piece: _Piece, end: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": piece.text}}
        if isinstance(question, TextQuestion):
            said = {"text": piece.text}
        elif question.stream:
            said = {"delta": {"content": piece.text}}
        return {"index": 0, **said, "finish_reason": end, **({} if self._use is None else {"experts": piece.experts})}

    def _end(self, piece: _Piece) -> str:
        ends = self._model.generation_config.eos_token_id
        return "stop" if piece.ids[-1] in (ends if isinstance(ends, list) else [ends]) else "length"


def create_app(endpoint: Endpoint) -> FastAPI:
    """The routes of an endpoint, and its answers to mistakes, in OpenAI's form."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.post("/v1/chat/completions")(endpoint.chat)
    app.post("/v1/completions")(endpoint.complete)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": endpoint.name, "object": "model", "created": 0, "owned_by": "moedisco"}]}

    @app.exception_handler(UserError)
    def refused(_: Request, error: UserError) -> JSONResponse:
        mistake = _mistake(str(error), param=error.field, code=_CODES.get(error.field))
        return JSONResponse(mistake, 404 if error.field == "model" else 400)

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))
        words = "is no parameter of this endpoint" if first["type"] == "extra_forbidden" else plain_words(first)
        return JSONResponse(_mistake(f"{param}: {words}", param=param), 400)

    @app.exception_handler(HTTPException)
    def not_here(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_mistake(str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_mistake(f"{type(error).__name__}: {error}", kind="server_error"), 500)

    return app


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; requests wait until the endpoint answers.

    Raises:
        ConfigError: The address does not exist here, or another program uses the port.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError("--port", port, "another program uses it; choose another") from error
            raise ConfigError("--host", host, f"cannot be listened on ({error})") from error
        yield listener


def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, listener: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM; see `Endpoint`."""
    app = create_app(Endpoint(model, tokenizer, name))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS))
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 has the model {name}; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(prompt: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _mistake(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None,
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
