"""The server: OpenAI's protocol, what is refused and why, slots that come back, and the page in a real browser."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import httpx

from fastllm import cli
from fastllm.llm.checkpoint import save_model
from fastllm.llm.engine import Engine
from fastllm.llm.prompts import ChatTemplate
from fastllm.llm.protocol import Limits
from fastllm.llm.serve import PAGE, build_app, page_policy
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

ROOT = Path(__file__).resolve().parents[1]
TOKENS = Tokenizer.bytes(special=("<|im_start|>", "<|im_end|>"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(vocab=TOKENS.size, d_model=48, heads=4, layers=2, d_ff=80, max_len=600, dropout=0.0)
SIZES |= dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False)


def model_of(**changes):
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES | changes)).eval()
    with torch.no_grad():
        model.head.weight.mul_(3)  # so that tokens vary
        model.head.weight[TOKENS.eos] = 0  # and none is the end
    return model


class Client(httpx.AsyncClient):
    """Talks to the application in this process."""

    def __init__(self, app, host="127.0.0.1"):
        super().__init__(transport=httpx.ASGITransport(app=app), base_url=f"http://{host}")

    async def ask(self, path="/v1/completions", **body):
        return await self.post(path, json=body)


@contextlib.contextmanager
def serving(**options):
    engine = {name: options.pop(name) for name in ("slots", "queue_size", "positions") if name in options}
    with Engine(model_of(), TOKENS, **dict(slots=4) | engine) as running:
        yield running, build_app(running, ChatTemplate(TOKENS, CHATML), "tiny", **options)


def run(app, talk):
    async def go():
        async with Client(app) as client:
            return await talk(client)

    return asyncio.run(go())


def events(text):
    parts = [part.removeprefix("data: ") for part in text.split("\n\n")[:-1]]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


HI = [dict(role="user", content="Hi")]


def test_answers_whole_and_in_pieces():
    async def talk(client):
        options = dict(messages=HI, max_tokens=12, seed=1, model="tiny")
        whole = (await client.ask("/v1/chat/completions", **options)).json()
        streamed = await client.ask("/v1/chat/completions", stream=True, **options)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        found = events(streamed.text)
        assert [found[0]["object"], whole["object"]] == ["chat.completion.chunk", "chat.completion"]
        assert found[0]["choices"][0]["delta"] == dict(role="assistant", content="")
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in found)
        assert text == whole["choices"][0]["message"]["content"] and text
        assert found[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
        prompt = len(ChatTemplate(TOKENS, CHATML).encode(HI))
        assert whole["usage"] == dict(prompt_tokens=prompt, completion_tokens=12, total_tokens=prompt + 12)
        options = dict(prompt=["ab", TOKENS.encode("cd")], n=2, max_tokens=5, seed=3, temperature=0.5)
        whole = (await client.ask(**options)).json()
        assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3] and whole["object"] == "text_completion"
        streamed = await client.ask(stream=True, stream_options=dict(include_usage=True), **options)
        found = events(streamed.text)
        for n in range(4):
            mine = [c for e in found for c in e["choices"] if c["index"] == n]
            assert "".join(c["text"] for c in mine) == whole["choices"][n]["text"]
        assert found[-1]["usage"] == whole["usage"] == dict(prompt_tokens=4, completion_tokens=20, total_tokens=24)
        assert (await client.ask(prompt="ab")).json()["usage"]["completion_tokens"] == 16  # OpenAI's default

    with serving() as (_, app):
        run(app, talk)


def test_what_openai_clients_send_besides():
    async def talk(client):
        parts = [dict(type="text", text="H"), dict(type="text", text="i")]
        messages = [dict(role="developer", content="Be brief."), dict(role="user", content=parts, name="me")]
        options = dict(user="me", metadata={}, tools=[], response_format=dict(type="text"), top_k=5, min_p=0.01)
        found = await client.ask("/v1/chat/completions", messages=messages, max_completion_tokens=3, seed=1, **options)
        assert found.status_code == 200, found.text
        same = [dict(role="system", content="Be brief."), *HI]
        again = await client.ask("/v1/chat/completions", messages=same, max_tokens=3, seed=1, top_k=5, min_p=0.01)
        assert again.json()["choices"] == found.json()["choices"]

    with serving() as (_, app):
        run(app, talk)


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (dict(), 400, "prompt must be a string"),
        (dict(prompt=""), 400, "the prompt has no tokens"),
        (dict(prompt=[]), 400, "the prompt has no tokens"),
        (dict(prompt=[1.5]), 400, "prompt must be a string"),
        (dict(prompt=[99999]), 400, "tokens of the prompt must be in"),
        (dict(prompt="x" * 601), 400, "the prompt has 601 tokens"),
        (dict(prompt="x" * 590, max_tokens=11), 400, "590 tokens and 11 more are wanted, but there are 600 positions"),
        (dict(prompt="x", max_tokens=0), 400, "max_tokens must be at least 1"),
        (dict(prompt="x", max_tokens="7"), 400, "max_tokens must be an integer, got '7'"),
        (dict(prompt="x", max_tokens=True), 400, "max_tokens must be an integer, got True"),
        (dict(prompt="x", max_tokens=7.5), 400, "max_tokens must be an integer, got 7.5"),
        (dict(prompt="x", stream="yes"), 400, "stream must be true or false"),
        (dict(prompt="x", temperature=-1), 400, "temperature must be at least 0"),
        (dict(prompt="x", top_p=0), 400, "top_p must be in (0, 1]"),
        (dict(prompt="x", n=5), 400, "n times the number of prompts must be in [1, 4]"),
        (dict(prompt="x", stop=[""]), 400, "stop must be a string or up to 16 of them"),
        (dict(prompt="x", stop=["y"] * 17), 400, "stop must be a string or up to 16 of them"),
        (dict(prompt="x", logit_bias=dict(a=1)), 400, "logit_bias must map token numbers"),
        (dict(prompt="x", logit_bias={"99999": 1}), 400, "tokens of the bias must be in"),
        (dict(prompt="x", logprobs=2), 400, "logprobs is not supported"),
        (dict(prompt="x", temprature=1), 400, "unrecognized request argument: temprature"),
        (dict(prompt="x", messages=HI), 400, "unrecognized request argument: messages"),
        (dict(prompt="x", model="gpt-9"), 404, "the model 'gpt-9' does not exist; this server has 'tiny'"),
        ([], 400, "the body must be a JSON object"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_with_the_reason(body, status, why):
    with serving() as (engine, app):
        found = run(app, lambda client: client.post("/v1/completions", json=body))
        assert engine.load == (0, 0)
    error = found.json()["error"]
    assert found.status_code == status and why in error["message"], found.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    over_long = "positions" in why or "601" in why
    assert (error["code"] == "context_length_exceeded") == over_long


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        ([dict(role="pirate", content="x")], "messages[0] must have a role"),
        ([dict(role="user", content=None)], "messages[0] must have a content"),
        ([dict(role="user", content=[dict(type="image_url")])], "reads text only, not 'image_url'"),
    ],
    ids=str,
)
def test_bad_conversations(messages, why):
    with serving() as (_, app):
        found = run(app, lambda client: client.ask("/v1/chat/completions", messages=messages))
    assert found.status_code == 400 and why in found.json()["error"]["message"]


def test_bodies_keys_hosts_and_paths():
    async def talk(client):
        key = {"Authorization": "Bearer secret"}
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Bearer sécret".encode()}):
            for call in (
                client.get("/v1/models", headers=wrong),
                client.post("/v1/completions", headers=wrong, json={}),
            ):
                found = await call
                assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/health")).json() == dict(status="ok", running=0, waiting=0, slots=4)
        card = (await client.get("/v1/models", headers=key)).json()["data"][0]
        assert card["id"] == "tiny" and card["chat_template"] is True and card["max_model_len"] == 600
        assert (await client.get("/v1/models/tiny", headers=key)).json() == card
        assert (await client.get("/v1/models/other", headers=key)).status_code == 404
        json_ = key | {"Content-Type": "application/json"}
        for content in (b"{", b"\xff", b"[" * 100_000):
            found = await client.post("/v1/completions", headers=json_, content=content)
            assert found.status_code == 400 and "the body is not JSON" in found.json()["error"]["message"]
        large = json.dumps(dict(prompt="x" * 200_000)).encode()
        found = await client.post("/v1/completions", headers=json_, content=large)
        assert found.status_code == 413 and "larger than 150000 bytes" in found.json()["error"]["message"]
        form = key | {"Content-Type": "text/plain"}  # what any web page may send anywhere
        assert (await client.post("/v1/completions", headers=form, content=b"{}")).status_code == 415
        for path, method, status in (("/nope", "GET", 404), ("/v1/completions", "GET", 405), ("/", "POST", 405)):
            found = await client.request(method, path)
            assert found.status_code == status and "<" not in found.text and "error" in found.json()
        stranger = await client.get("/health", headers={"Host": "evil.example"})
        assert stranger.status_code == 421 and (await client.get("/health", headers={"Host": "[::1]:80"})).is_success
        foreign = await client.get("/v1/models", headers=key | {"Origin": "http://evil.example"})
        assert not any(name.startswith("access-control") for name in foreign.headers)

    hosts = {"127.0.0.1", "::1"}
    with serving(api_key="secret", hosts=hosts, limits=Limits(body_bytes=150_000)) as (_, app):
        run(app, talk)


def test_origins_that_are_allowed():
    async def talk(client):
        asked = {"Origin": "https://here.example", "Access-Control-Request-Method": "POST"}
        found = await client.options("/v1/completions", headers=asked)
        assert found.headers["access-control-allow-origin"] == "https://here.example"
        found = await client.options("/v1/completions", headers=asked | {"Origin": "https://there.example"})
        assert "access-control-allow-origin" not in found.headers

    with serving(origins=["https://here.example"]) as (_, app):
        run(app, talk)


def test_limits_of_a_request_and_of_the_queue():
    async def talk(client):
        found = await client.ask(prompt="x" * 51, max_tokens=1)
        assert found.status_code == 400 and "51 tokens, and this server takes 50" in found.json()["error"]["message"]
        found = await client.ask(prompt="x", max_tokens=301)
        assert found.status_code == 400 and "at most 300" in found.json()["error"]["message"]
        asked = [asyncio.create_task(client.ask(prompt="x", max_tokens=300)) for _ in range(6)]
        found = await asyncio.gather(*asked)
        statuses = sorted(one.status_code for one in found)
        assert statuses == [200] * 3 + [429] * 3
        refused = next(one for one in found if one.status_code == 429)
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"
        assert (await client.ask(prompt="x", max_tokens=3)).status_code == 200

    limits = Limits(prompt_tokens=50, max_tokens=300)
    with serving(slots=1, queue_size=2, limits=limits) as (_, app):
        run(app, talk)


def test_a_failing_model_is_said_without_its_secrets(monkeypatch, capsys):
    async def talk(client):
        found = await client.ask(prompt="x")
        assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
        streamed = await client.ask(prompt="x", stream=True)
        assert "secret" not in found.text + streamed.text
        assert json.loads(streamed.text.strip().removeprefix("data: "))["error"]["type"] == "server_error"

    with serving() as (engine, app):
        monkeypatch.setattr(engine.session, "prefill", lambda *_: (_ for _ in ()).throw(RuntimeError("secret")))
        run(app, talk)
    assert capsys.readouterr().err.count("RuntimeError: secret") == 2


def test_the_page_runs_nothing_but_its_own():
    page = PAGE.read_text()
    policy = page_policy(page)
    assert "unsafe" not in policy and policy.count("'sha256-") == 2
    for outside in ("http:", "https:", "src=", "innerHTML", "document.write", "onclick", "style="):
        assert outside not in page
    with serving() as (_, app):
        found = run(app, lambda client: client.get("/"))
    assert found.text == page and found.headers["content-security-policy"] == policy
    assert found.headers["x-content-type-options"] == "nosniff"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    slow_enough = dict(d_model=384, d_ff=1024, layers=6, max_len=4000)  # that requests are under way at the same time
    save_model(path, model_of(**slow_enough), TOKENS)
    ChatTemplate(TOKENS, CHATML).save(path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    """The address of `fastllm serve` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "fastllm",
        "serve",
        str(folder),
        "--port",
        "0",
        "--slots",
        "8",
        "--queue-size",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    line = process.stdout.readline()
    assert line.startswith("tiny on http://127.0.0.1:"), line + process.stdout.read()
    yield line.split()[2].rstrip("/")
    process.terminate()
    assert process.wait(20) in (0, -15)
    assert "Traceback" not in process.stdout.read()


def load_of(server):
    found = httpx.get(f"{server}/health").json()
    return found["running"], found["waiting"]


def wait_until_idle(server):
    for _ in range(100):
        if load_of(server) == (0, 0):
            return
        time.sleep(0.05)
    raise AssertionError(f"slots are still taken: {load_of(server)}")


def test_eight_streams_of_the_openai_client(server):
    """At once, and each is what it is alone."""
    openai = pytest.importorskip("openai", reason="openai is not installed")

    async def one(client, n):
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[dict(role="user", content=f"{n} " * (1 + 7 * n))],
            max_tokens=60,
            seed=n,
            stream=True,
        )
        text, times = "", []
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            times.append(time.perf_counter())
        return text, times[1], times[-1]

    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            alone = [(await one(client, n))[0] for n in range(8)]
            together = await asyncio.gather(*(one(client, n) for n in range(8)))
            assert [text for text, _, _ in together] == alone and len(set(alone)) == 8
            assert max(first for _, first, _ in together) < min(last for _, _, last in together)  # side by side
            assert [model.id async for model in await client.models.list()] == ["tiny"]
            whole = await client.completions.create(model="tiny", prompt="ab", max_tokens=5, seed=1)
            assert whole.usage.completion_tokens == 5 and whole.choices[0].finish_reason == "length"
            with pytest.raises(openai.BadRequestError, match="5000 tokens"):
                await client.completions.create(model="tiny", prompt="x" * 5000)
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.completions.create(model="other", prompt="x")

    asyncio.run(talk())
    wait_until_idle(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server, stream):
    body = dict(prompt="x", max_tokens=3000, stream=stream)

    async def talk():
        async with httpx.AsyncClient() as client:
            asked = [asyncio.create_task(leave(client)) for _ in range(9)]
            await asyncio.gather(*asked)

    async def leave(client):
        request = client.build_request("POST", f"{server}/v1/completions", json=body)
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(0.15):
                response = await client.send(request, stream=True)
                await response.aread()
                raise AssertionError("it ended by itself")

    asyncio.run(talk())
    wait_until_idle(server)


STOP_AT_THE_FIRST_PIECE = """() => {
    const seen = new MutationObserver(() => {
        const answers = document.querySelectorAll(".assistant");
        if (!answers[answers.length - 1].textContent) return;
        seen.disconnect();
        document.querySelector("#stop").click();
    });
    seen.observe(document.querySelector("#log"), { childList: true, subtree: true, characterData: true });
    document.querySelector("#send").click();
}"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_in_a_browser(server, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        faults = []
        for width, scheme in ((1200, "light"), (380, "dark")):
            page = browser.new_page(viewport=dict(width=width, height=700), color_scheme=scheme)
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda r: faults.append(r.url) if not r.url.startswith(server) else None)
            page.goto(server)
            playwright.expect(page.locator("#model")).to_have_text("tiny")
            page.fill("#text", "<b>Hello</b> <img src=x onerror=alert(1)>")
            page.keyboard.press("Enter")
            playwright.expect(page.locator("#stop")).to_be_visible()
            answer = page.locator(".assistant").first
            playwright.expect(answer).not_to_be_empty()
            playwright.expect(page.locator("#send")).to_be_visible(timeout=20_000)
            assert page.locator(".user").text_content() == "<b>Hello</b> <img src=x onerror=alert(1)>"
            assert page.locator(".user *").count() == 0 and len(answer.text_content()) > 100
            page.fill("#text", "Again")
            page.evaluate(STOP_AT_THE_FIRST_PIECE)
            playwright.expect(page.locator(".note").last).to_contain_text("stopped")
            wait_until_idle(server)
            page.click("summary")
            page.fill("#max_tokens", "0")
            page.fill("#text", "Too few")
            page.click("#send")
            playwright.expect(page.locator(".error")).to_have_text("max_tokens must be at least 1, got 0")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.screenshot(path=tmp_path / f"{scheme}.png")
            assert faults == [f for f in faults if "400 (Bad Request)" in f]
            page.close()
        browser.close()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--max-tokens", "0"], "limits must be at least 1"),
        (["--api-key", ""], "the API key is empty"),
        (["--slots", "0"], "slots must be at least 1"),
        (["--positions", "4001"], "positions must be in [2, 4000]"),
        (["--api-key-file", "nowhere"], "nowhere"),
    ],
)
def test_options_that_do_not_fit(folder, capsys, arguments, why):
    assert cli.main(["serve", str(folder), "--port", "0", *arguments]) == 2
    told = capsys.readouterr()
    assert why in told.err and told.err.count("\n") == 1 and told.out == ""


def test_a_port_that_is_taken_and_a_folder_that_is_no_model(server, folder, tmp_path, capsys):
    port = server.rpartition(":")[2]
    assert cli.main(["serve", str(folder), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "load_model: " in capsys.readouterr().err
