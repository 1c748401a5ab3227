"""The server: OpenAI's protocol, what is refused and why, what it counts, and slots that come back."""

import asyncio
import contextlib
import json
import re

import pytest
from chat_models import CHATML, TOKENS, httpx, model_of

from fastllm.llm.engine import Engine
from fastllm.llm.prompts import ChatTemplate
from fastllm.llm.protocol import Limits
from fastllm.llm.serve import PAGE, build_app, page_policy


class Client(httpx.AsyncClient):
    """Talks to the application in this process."""

    def __init__(self, app, host="127.0.0.1"):
        super().__init__(transport=httpx.ASGITransport(app=app), base_url=f"http://{host}")

    async def ask(self, path="/v1/completions", **body):
        return await self.post(path, json=body)


@contextlib.contextmanager
def serving(**options):
    engine = {name: options.pop(name) for name in ("slots", "queue_size", "positions", "reuse") if name in options}
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
        read = dict(prompt_tokens=prompt, completion_tokens=12, total_tokens=prompt + 12)
        assert whole["usage"].pop("tokens_per_s") > 0
        assert whole["usage"] == read | dict(prompt_tokens_details=dict(cached_tokens=0))
        options = dict(prompt=["ab", TOKENS.encode("cd")], n=2, max_tokens=5, seed=3, temperature=0.5)
        whole = (await client.ask(**options)).json()
        assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3] and whole["object"] == "text_completion"
        streamed = await client.ask(stream=True, stream_options=dict(include_usage=True), **options)
        found = events(streamed.text)
        for n in range(4):
            mine = [c for e in found for c in e["choices"] if c["index"] == n]
            assert "".join(c["text"] for c in mine) == whole["choices"][n]["text"]
        both = [found[-1]["usage"], whole["usage"]]
        assert all(usage.pop("tokens_per_s") > 0 for usage in both) and both[0] == both[1]
        read = dict(prompt_tokens=4, completion_tokens=20, total_tokens=24)
        assert both[0] == read | dict(prompt_tokens_details=dict(cached_tokens=0))
        assert (await client.ask(prompt="ab", seed=1)).json()["usage"]["completion_tokens"] == 16  # OpenAI's default

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
                client.get("/metrics", headers=wrong),
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


def numbers_of(text):
    """Name -> value, of Prometheus's text."""
    return {name: float(value) for name, value in re.findall(r"^(fastllm_\S+) (\S+)$", text, re.MULTILINE)}


def conversation(reuse):
    """(answers to three turns, lines of the log, /metrics) of one served conversation, whose last turn is streamed."""
    lines, said = [], [dict(role="user", content="Hi" * 20)]

    async def talk(client):
        found, path, options = [], "/v1/chat/completions", dict(max_tokens=9, temperature=0)
        for n in range(3):
            found.append((await client.ask(path, messages=said, **options)).json())
            said.append(found[-1]["choices"][0]["message"])
            said.append(dict(role="user", content=f"And {n}?"))
        await client.ask(path, messages=said, stream=True, **options)
        told = await client.get("/metrics")
        assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
        return found, lines, told.text

    with serving(reuse=reuse, log=lines.append) as (_, app):
        return run(app, talk)


def test_the_next_turn_reads_what_is_new_and_all_of_it_is_counted():
    (found, lines, told), (plain, _, _) = conversation(True), conversation(False)
    assert [one["choices"] for one in found] == [one["choices"] for one in plain]
    read, reused = (
        [one["usage"]["prompt_tokens"] for one in found],
        [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found],
    )
    assert reused[0] == 0 and all(b >= a for a, b in zip(read[:-1], reused[1:], strict=True))
    assert all(one["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 for one in plain)
    assert len(lines) == 4 and all(line.startswith("chat: ") and "9 written" in line for line in lines)
    assert f"({reused[2]} of them before)" in lines[2] and re.search(r"[\d.]+ tokens/s, length$", lines[2])
    counted = {name: float(value) for name, value in re.findall(r"^fastllm_(\S+) (\S+)$", told, re.MULTILINE)}
    assert counted["generated_tokens_total"] == 36 and counted['answers_total{finish="length"}'] == 4
    assert counted["prompt_tokens_reused_total"] > sum(reused) and counted["tokens_per_second"] > 0
    assert counted["prompt_tokens_read_total"] > sum(read) - sum(reused)
    assert counted["answers_running"] == counted["answers_waiting"] == 0
    for name in re.findall(r"^(fastllm_[a-z_]+)", told, re.MULTILINE):
        assert f"# TYPE {name} " in told and f"# HELP {name} " in told


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
