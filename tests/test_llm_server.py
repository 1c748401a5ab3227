"""`fastllm serve` as a process: several clients at once, those that go away, and the page in a real browser."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_models import CHATML, TOKENS, httpx, model_of

from fastllm import cli
from fastllm.llm.checkpoint import save_model
from fastllm.llm.prompts import ChatTemplate

ROOT = Path(__file__).resolve().parents[1]


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
        (["--port", "65536"], "serve: the port must be in [0, 65535], got 65536"),
        (["--host", "300.1.1.1"], "serve: cannot listen on 300.1.1.1"),
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
