"""`fastllm serve`: a language model behind OpenAI's API and a small web page, on this machine alone unless told else.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="NAME", messages=[{"role": "user", "content": "Hello"}], stream=True)

Concurrent requests share one `Engine`. A client that goes away frees its slot. The next turn of a conversation finds
what its slot has read and written, and only what is new is read.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import socket
import sys
import threading
from pathlib import Path

from fastllm.llm import require
from fastllm.llm.engine import Busy, Engine
from fastllm.llm.protocol import BadRequest, Limits, busy, read

PAGE = Path(__file__).with_name("serve.html")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_app(engine, template, name, *, limits=None, api_key=None, hosts=None, origins=(), log=None):
    """The ASGI application over a running Engine: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics
    (Prometheus's text) and /. log(line) is told of each answer that is over.

    `hosts` are the names in the Host header that it answers to (None: any): a web page elsewhere whose name resolves to
    this machine is not one of them. `origins` are those of web pages elsewhere that may call it (CORS).
    """
    require("starlette", extra="serve")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    limits, one_at_a_time = limits or Limits(), threading.Lock()
    page = PAGE.read_text("utf-8")
    headers = {"Content-Security-Policy": page_policy(page), "Referrer-Policy": "no-referrer"}

    def refused(problem):
        more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(problem.status)
        return JSONResponse(dict(error=problem.error), problem.status, more)

    def check_key(request):
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise BadRequest(
                "wrong or missing API key", status=401, code="invalid_api_key", kind="authentication_error"
            )

    async def body_of(request):
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise BadRequest("the Content-Type must be application/json", status=415)
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > limits.body_bytes:
                raise BadRequest(f"the body is larger than {limits.body_bytes} bytes", status=413)
        try:
            return json.loads(found)
        except (ValueError, RecursionError) as problem:
            raise BadRequest(f"the body is not JSON: {problem}") from None

    def understood(body, chat):
        with one_at_a_time:  # a tokenizer is no more than one thread's
            return read(body, chat, engine, template, name, limits)

    def completions(chat):
        async def endpoint(request):
            try:
                check_key(request)
                completion = await run_in_threadpool(understood, await body_of(request), chat)
                running = Running(engine, completion.requests)
            except BadRequest as problem:
                return refused(problem)
            except Busy as why:
                return refused(busy(why))
            leaving = asyncio.create_task(running.cancel_when_gone(request))
            if completion.stream:
                events = stream(completion, running, leaving, log)
                return StreamingResponse(
                    events,
                    headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
                    media_type="text/event-stream",
                )
            texts = [""] * len(running.answers)
            try:
                async for index, piece in running:
                    texts[index] += piece or ""
            except Exception as error:
                return refused(broken(error))
            finally:
                leaving.cancel()
                log(completion.line(running.answers))
            return JSONResponse(completion.whole(texts, running.answers))

        return endpoint

    async def models(request):
        try:
            check_key(request)
            card = dict(id=name, object="model", created=started, owned_by="fastllm")
            card |= dict(max_model_len=engine.positions, chat_template=not template.plain)
            if "name" not in request.path_params:
                return JSONResponse(dict(object="list", data=[card]))
            if request.path_params["name"] != name:
                raise BadRequest(f"this server has the model {name!r} only", status=404, code="model_not_found")
            return JSONResponse(card)
        except BadRequest as problem:
            return refused(problem)

    async def health(request):
        running, waiting = engine.load
        return JSONResponse(dict(status="ok", running=running, waiting=waiting, slots=engine.slots))

    async def metrics(request):
        try:
            check_key(request)
        except BadRequest as problem:
            return refused(problem)
        return PlainTextResponse(metrics_of(engine), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def index(request):
        return HTMLResponse(page, headers=headers)

    async def not_there(request, problem):
        return refused(BadRequest(f"{problem.detail}: {request.method} {request.url.path}", status=problem.status_code))

    log = log or (lambda line: None)
    started = int(PAGE.stat().st_mtime)
    middleware = [Middleware(_Guard, hosts=hosts, refused=refused)]
    if origins:
        allowed = dict(allow_methods=["GET", "POST"], allow_headers=["authorization", "content-type"])
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(origins), **allowed))
    routes = [
        Route("/v1/chat/completions", completions(True), methods=["POST"]),
        Route("/v1/completions", completions(False), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/", index),
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={404: not_there, 405: not_there})


class _Guard:
    """ASGI middleware: other hosts' names are refused, and nobody guesses what a body is."""

    def __init__(self, app, hosts, refused):
        self.app, self.hosts, self.refused = app, hosts, refused

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts is not None and re.sub(r":\d+$", "", host).strip("[]").lower() not in self.hosts:
            problem = BadRequest("this server does not answer to that host name (--allowed-host adds one)", status=421)
            return await self.refused(problem)(scope, receive, send)

        async def send_safely(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self.app(scope, receive, send_safely)


class Running:
    """The answers to one request of HTTP; iterating gives (index, piece), and (index, None) where one is over."""

    def __init__(self, engine, requests):
        loop, self._pieces, self.answers = asyncio.get_running_loop(), asyncio.Queue(), []

        def deliver(index):
            def put(piece):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                    loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

            return put

        try:
            for index, request in enumerate(requests):
                self.answers.append(engine.submit(request, deliver(index)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self):
        for answer in self.answers:
            answer.cancel()

    async def cancel_when_gone(self, request):
        """Until the client has gone: then nobody reads on."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    async def __aiter__(self):
        left = len(self.answers)
        while left:
            index, piece = await self._pieces.get()
            if piece is None:
                left -= 1
                if self.answers[index].error is not None:
                    self.cancel()
                    raise self.answers[index].error
            yield index, piece


async def stream(completion, running, leaving, log):
    """Server-sent events."""

    def event(data):
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        for index in range(len(running.answers)):
            if first := completion.first(index):
                yield event(first)
        async for index, piece in running:
            if piece is None:
                yield event(completion.last(index, running.answers[index]))
            else:
                yield event(completion.piece(index, piece))
        if completion.include_usage:
            yield event(completion.with_usage(running.answers))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(dict(error=broken(error).error))
    finally:
        leaving.cancel()
        running.cancel()
        log(completion.line(running.answers))


def metrics_of(engine) -> str:
    """What an engine counts, as Prometheus reads it."""
    totals, (running, waiting) = engine.totals, engine.load
    found = [
        ("prompt_tokens_read_total", "counter", "tokens of prompts that were read", totals.read),
        ("prompt_tokens_reused_total", "counter", "tokens of prompts that a slot had already", totals.reused),
        ("generated_tokens_total", "counter", "tokens of answers", totals.generated),
        ("tokens_per_second", "gauge", "of all answers together, in the last 256 steps", round(engine.tokens_per_s, 3)),
        ("answers_running", "gauge", "answers under way", running),
        ("answers_waiting", "gauge", "requests without a slot", waiting),
    ]
    lines = []
    for name, kind, what, value in found:
        lines += [f"# HELP fastllm_{name} {what}", f"# TYPE fastllm_{name} {kind}", f"fastllm_{name} {value}"]
    lines += ["# HELP fastllm_answers_total answers that are over", "# TYPE fastllm_answers_total counter"]
    lines += [f'fastllm_answers_total{{finish="{why}"}} {n}' for why, n in sorted(dict(totals.finished).items())]
    return "\n".join(lines) + "\n"


def broken(error) -> BadRequest:
    print(f"fastllm serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return BadRequest("the model failed; the server's log says why", status=500, kind="server_error")


def page_policy(page: str) -> str:
    """The page runs its own script and style, known by their digests, and talks to this server; nothing else."""

    def digests(tag):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'" for x in found)

    own = f"script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def listen(host, port) -> socket.socket:
    """A socket that listens, so that a port that is taken is known before a model is loaded."""
    if not 0 <= port <= 65535:
        raise ValueError(f"serve: the port must be in [0, 65535], got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as problem:
        raise OSError(f"serve: cannot listen on {host}: {problem.strerror}") from None
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()  # or another process may bind it too until this one serves, and who calls by then is refused
    except OSError as problem:
        bound.close()
        raise OSError(f"serve: cannot listen on {host} port {port}: {problem.strerror}") from None
    return bound


def run(
    model,
    *,
    host="127.0.0.1",
    port=8000,
    name=None,
    api_key=None,
    weights="model",
    slots=8,
    positions=None,
    queue_size=64,
    max_body=1 << 20,
    max_prompt_tokens=None,
    max_tokens=None,
    allowed_hosts=(),
    origins=(),
    reuse=True,
    quiet=False,
):
    """Serve the model of a folder until SIGINT or SIGTERM; reuse is the Engine's, and unless quiet each answer that is
    over gives a line on standard error. Raises ValueError for options and a folder that do not fit,
    OSError for a port that is taken."""
    uvicorn = require("uvicorn", extra="serve")
    from fastllm.llm.checkpoint import load_model
    from fastllm.llm.prompts import ChatTemplate

    limits = Limits(max_body, max_prompt_tokens, max_tokens)
    if any(limit is not None and limit < 1 for limit in (max_body, max_prompt_tokens, max_tokens)):
        raise ValueError(f"serve: limits must be at least 1, got {limits}")
    if api_key == "":
        raise ValueError("serve: the API key is empty")
    bound = listen(host, port)
    hosts = {*LOOPBACK, host, *allowed_hosts} if host in LOOPBACK else None
    loaded = load_model(model)
    template = ChatTemplate.load(loaded.source, loaded.tokenizer)
    name = name or Path(model).resolve().name
    options = dict(weights=weights, slots=slots, positions=positions, queue_size=queue_size, reuse=reuse)
    log = None if quiet else lambda line: print(line, file=sys.stderr, flush=True)
    with Engine(loaded.model, loaded.tokenizer, **options) as engine:
        access = dict(limits=limits, api_key=api_key, hosts=hosts, origins=origins)
        app = build_app(engine, template, name, log=log, **access)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, server_header=False)
        server = uvicorn.Server(config)
        shown = f"[{host}]" if ":" in host else host
        how = engine.reason or f"{weights} weights"
        place = f"http://{shown}:{bound.getsockname()[1]}"
        print(f"{name} on {place}/ and {place}/v1 ({how}, {slots} slots of {engine.positions} tokens)", flush=True)
        server.run(sockets=[bound])


def add_arguments(subparsers):
    from fastllm.llm.generate import add_model_arguments

    parser = subparsers.add_parser("serve", help="a language model behind OpenAI's API and a web page")
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--name", help="of the model, for clients (default: the folder's)")
    parser.add_argument("--api-key", help="what clients must send as their key")
    parser.add_argument("--api-key-file", metavar="FILE", help="the same, from a file: others do not see it in `ps`")
    parser.add_argument("--slots", type=int, default=8, help="requests answered at a time (default 8)")
    parser.add_argument("--queue-size", type=int, default=64, help="more that may wait; then 429 (default 64)")
    parser.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="default 1 MiB")
    parser.add_argument("--max-prompt-tokens", type=int, help="default: what there are positions for")
    parser.add_argument("--max-tokens", type=int, help="of one answer; default: what there are positions for")
    parser.add_argument("--allowed-host", action="append", default=[], help="answer to this host name too")
    parser.add_argument("--cors-origin", action="append", default=[], help="web pages of this origin may call it")
    parser.add_argument("--no-reuse", dest="reuse", action="store_false", help="read every prompt from its beginning")
    parser.add_argument("--quiet", action="store_true", help="no line for each answer on standard error")
    parser.set_defaults(run=main)


def main(args) -> int:
    key = args.api_key
    if args.api_key_file:
        key = Path(args.api_key_file).read_text("utf-8").strip()
    names = "host port name weights slots positions queue_size max_body max_prompt_tokens max_tokens".split()
    names += ["reuse", "quiet"]
    options = {name: getattr(args, name) for name in names}
    run(args.model, api_key=key, allowed_hosts=args.allowed_host, origins=args.cors_origin, **options)
    return 0
