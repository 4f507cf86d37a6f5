"""An OpenAI-compatible endpoint over the adapters of one base: the name of the model picks the adapter, and requests of different ones
are answered in one batch (models/engine.py).

Chat completions, streamed or whole, and the list of models. What would change the answer and is not done here (tools, stop, penalties,
logprobs, a response format) is refused, not ignored. Nothing that is asked or answered is logged or kept.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import InstructLiteError
from ..models.engine import Engine, Full
from ..models.sampling import Sampling
from ..models.streaming import Snapshot, Stream

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOK_EVERY = 0.02  # seconds
DEFAULT_NEW_TOKENS = 256
TAKEN = {
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "seed",
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "stop": None, "response_format": {"type": "text"},
    "tools": [], "logit_bias": {}, "parallel_tool_calls": True, "service_tier": "auto",
}  # fmt: skip
"""Options that may be there as long as they ask for nothing."""


class Refused(Exception):
    """An answer other than 200, as OpenAI's API words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status, {name.replace("_", "-"): value for name, value in self.headers.items()})


def endpoint(engine: Engine, key: str | None = None) -> Starlette:
    """The application. key: what clients must send as bearer token; without one, only clients of this machine are answered."""
    service = _Service(engine, key)
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    # A page of another site, whose name was made to lead here, still sends that name.
    local = [] if key else [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])]
    return Starlette(routes=routes, middleware=local, exception_handlers={Refused: lambda _, refused: refused.response()})


class _Service:
    def __init__(self, engine: Engine, key: str | None):
        self.engine, self.key, self.started = engine, key, int(time.time())

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key and not hmac.compare_digest(given, self.key.encode()):
            raise Refused(401, "the key is missing or wrong", "invalid_api_key")

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._admit(request)
        shown = [
            {"id": pane.name, "object": "model", "created": self.started, "owned_by": "instructlite", "facts": pane.facts}
            for pane in self.engine.panes
        ]
        return JSONResponse({"object": "list", "data": shown})

    async def chat(self, request: Request) -> Response:
        self._admit(request)
        body = await self._body(request)
        stream = self._submit(body)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body["model"]}
        if not body.get("stream"):
            return await self._whole(request, stream, head)
        return StreamingResponse(
            _events(stream, head, _wants_usage(body)), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _body(self, request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # Anything else may be sent by a page of another site without asking.
            raise Refused(415, "expected Content-Type: application/json")
        most, content = 8 * self.engine.limits.characters + 10_000, b""
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise Refused(413, f"the request has more than {most:,} bytes")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the request is no JSON ({type(error).__name__})") from error
        if not isinstance(body, dict):
            raise Refused(400, "the request is no JSON object")
        for option, value in body.items():
            if option not in TAKEN and value is not None and NEUTRAL.get(option, NEUTRAL) != value:
                raise Refused(400, f"{option[:40]!r} is not supported here", "unsupported_parameter")
        return body

    def _submit(self, body: dict[str, Any]) -> Stream:
        names = [pane.name for pane in self.engine.panes]
        if body.get("model") not in names:
            raise Refused(404, f"no model {str(body.get('model'))[:60]!r}; there are {', '.join(names)}", "model_not_found")
        limits, given = self.engine.limits, {name: value for name, value in body.items() if value is not None}
        n, seed = given.get("n", 1), given.get("seed", secrets.randbelow(2**31))
        most = given.get("max_completion_tokens", given.get("max_tokens", min(DEFAULT_NEW_TOKENS, limits.new_tokens)))
        options = {name: given[name] for name in ("temperature", "top_p", "top_k") if name in given}
        if not isinstance(n, int) or not 1 <= n <= limits.rows or not isinstance(seed, int) or not 0 <= seed < 2**62:
            raise Refused(400, f"expected n from 1 to {limits.rows}, and a seed that is a whole number from 0")
        try:
            sampling = Sampling(max_new_tokens=most, **options)
            return self.engine.submit(_text_only(body.get("messages")), [body["model"]] * n, sampling, seed=[seed + i for i in range(n)])
        except Full as error:
            raise Refused(429, str(error), "rate_limit_exceeded", Retry_After="1") from error
        except InstructLiteError as error:
            raise Refused(400, str(error)) from error

    async def _whole(self, request: Request, stream: Stream, head: dict[str, Any]) -> Response:
        try:
            while not stream.over:
                await asyncio.sleep(LOOK_EVERY)
                if await request.is_disconnected():
                    return Response(status_code=499)
            snapshot = stream.result()
        except InstructLiteError as error:
            raise Refused(503, str(error)) from error
        finally:
            stream.cancel()
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": finish}
            for i, (text, finish) in enumerate(zip(snapshot.texts, snapshot.finish, strict=True))
        ]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": _usage(stream, snapshot)})


async def _events(stream: Stream, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Server-sent events. The client's going away closes this generator, and so ends its answers."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    def choice(i: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": None, "finish_reason": finish}

    sent, ended = [""] * len(stream.rows), [False] * len(stream.rows)
    try:
        yield event([choice(i, {"role": "assistant", "content": ""}) for i in range(len(sent))])
        while not all(ended):
            over = stream.over
            snapshot = stream.result() if over else stream.snapshot()
            for i, (text, finish) in enumerate(zip(snapshot.texts, snapshot.finish, strict=True)):
                if text.startswith(sent[i]) and len(text) > len(sent[i]):  # what was sent cannot be taken back
                    yield event([choice(i, {"content": text[len(sent[i]) :]})])
                    sent[i] = text
                if finish and not ended[i]:
                    ended[i] = True
                    yield event([choice(i, {}, finish)])
            if not over:
                await asyncio.sleep(LOOK_EVERY)
        if usage:
            yield event([], usage=_usage(stream, snapshot))
        yield "data: [DONE]\n\n"
    except InstructLiteError as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error', 'param': None, 'code': None}})}\n\n"
    finally:
        stream.cancel()


def _wants_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _usage(stream: Stream, snapshot: Snapshot) -> dict[str, int]:
    prompt, answers = len(stream.rows[0].prompt), sum(snapshot.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def _text_only(messages: Any) -> Any:
    """Messages whose content came as a list of text parts, as text; whatever else is wrong the engine says."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return messages
    return [{"role": turn.get("role"), "content": _content(turn.get("content"))} for turn in messages]


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
        raise Refused(400, "only text is understood here", "unsupported_content")
    return "".join(part["text"] for part in content)


def serve(engine: Engine, host: str, port: int, key: str | None) -> None:
    """Answer until SIGINT or SIGTERM; answers that are under way then have a few seconds."""
    import uvicorn

    uvicorn.run(endpoint(engine, key), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
