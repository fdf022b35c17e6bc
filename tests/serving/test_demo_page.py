"""The demo page in a browser, its server asked by hand, and many who ask at once."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from flamingo.serving.demo.asking import Asking
from flamingo.serving.demo.limits import Limits
from flamingo.serving.demo.server import Place
from flamingo.serving.engine import Engine
from tests.eval.harness_model import write_model
from tests.serving.test_demo import huge_png

pytest.importorskip("gradio", reason="the demo page needs gradio")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LIMITS = Limits(max_pictures=3, max_megabytes=2, max_characters=300, max_new_tokens=64)
ASKED = "Question: what color is the shape? Answer:"


class Served:
    """A running page and what its server says of itself."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url.rstrip("/")
        self.config = requests.get(f"{self.url}/config", timeout=20).json()

    def component(self, element: str) -> int:
        return next(c["id"] for c in self.config["components"] if c["props"].get("elem_id") == element)

    def function(self, element: str, event: str) -> int:
        """The number of what runs when this happens to an element."""
        number = self.component(element)
        return next(d["id"] for d in self.config["dependencies"] if [number, event] in d["targets"])

    def asks(self) -> dict[str, Any]:
        """What runs after a click on Ask."""
        begin = self.function("ask", "click")
        return next(d for d in self.config["dependencies"] if d.get("trigger_after") == begin)

    def call(self, function: int, data: list[Any], session: str) -> dict[str, Any]:
        """The last message of the queue about one event."""
        body = {"data": data, "fn_index": function, "session_hash": session}
        joined = requests.post(f"{self.url}/gradio_api/queue/join", json=body, timeout=20)
        joined.raise_for_status()
        address = f"{self.url}/gradio_api/queue/data?session_hash={session}"
        with requests.get(address, stream=True, timeout=100) as lines:
            for line in lines.iter_lines():
                told = json.loads(line.removeprefix(b"data: ")) if line else {}
                if told.get("msg") == "process_completed":
                    return told
        raise AssertionError("the queue ended without an answer")

    def ask(self, text: Any, session: str) -> dict[str, Any]:
        asks = self.asks()
        values = [component_value(self.config, number) for number in asks["inputs"]]
        values[asks["inputs"].index(self.component("question-text"))] = text
        return self.call(asks["id"], values, session)


def component_value(config: dict[str, Any], number: int) -> Any:
    component = next(c for c in config["components"] if c["id"] == number)
    return component["props"].get("value") if component["type"] != "state" else None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from flamingo.serving.demo import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        asking = Asking(Engine(write_model(tmp_path_factory.mktemp("model"))), LIMITS)
        with socket.socket() as tried:
            tried.bind(("127.0.0.1", 0))
            port = tried.getsockname()[1]
        built = page.build(asking, "tiny", 64)
        yield Served(built, page.launch(built, Place(port=port), LIMITS, wait=False))
        built.close(verbose=False)


def test_paths_of_the_server_and_addresses_are_refused(served: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    upload = served.function("question-upload", "upload")
    with socket.socket() as listening:  # whoever fetches the address knocks here
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.2)
        for path in (str(secret), "/etc/passwd", f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"):
            file = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
            told = served.call(upload, [file, None], uuid.uuid4().hex)
            assert not told["success"] and "only uploaded pictures" in str(told["output"])
            told = served.ask(file, uuid.uuid4().hex)  # a text box would fetch it as well
            assert not told["success"] and "only uploaded pictures" in str(told["output"])
        with pytest.raises(TimeoutError):
            listening.accept()
    for address in (f"file={secret}", "file=/etc/passwd", f"proxy={served.url}", "info"):
        assert requests.get(f"{served.url}/gradio_api/{address}", timeout=20).status_code in (403, 404)


def test_the_page_names_no_other_host_and_lets_nothing_else_be_loaded(served: Served) -> None:
    home = requests.get(served.url, timeout=20)
    assert "default-src 'self'" in home.headers["content-security-policy"]
    assert not served.config["analytics_enabled"] and not served.config.get("is_space")
    assert all(d["api_visibility"] == "private" for d in served.config["dependencies"])


def test_a_file_that_is_too_big_is_not_even_kept(served: Served) -> None:
    big = {"files": ("x.png", bytes(2_100_000))}
    said = requests.post(f"{served.url}/gradio_api/upload", files=big, timeout=20)
    assert said.status_code == 413


def test_twenty_who_ask_at_once_are_all_answered(served: Served) -> None:
    answers: dict[int, dict[str, Any]] = {}

    def ask(number: int) -> None:
        answers[number] = served.ask(ASKED, uuid.uuid4().hex)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 20 and all(told["success"] for told in answers.values())
    texts = {told["output"]["data"][0] for told in answers.values()}
    assert len(texts) == 1 and texts != {""}
    assert all("tokens" in told["output"]["data"][1] for told in answers.values())


def test_who_goes_away_while_answered_leaves_the_turn_to_the_next(served: Served) -> None:
    session, asks = uuid.uuid4().hex, served.asks()
    values = [component_value(served.config, number) for number in asks["inputs"]]
    values[asks["inputs"].index(served.component("question-text"))] = ASKED
    values[asks["inputs"].index(served.component("set-max_new_tokens"))] = 64
    body = {"data": values, "fn_index": asks["id"], "session_hash": session}
    requests.post(f"{served.url}/gradio_api/queue/join", json=body, timeout=20).raise_for_status()
    address = f"{served.url}/gradio_api/queue/data?session_hash={session}"
    with requests.get(address, stream=True, timeout=100) as lines:
        next(line for line in lines.iter_lines() if b"process_generating" in line)
    assert served.ask(ASKED, uuid.uuid4().hex)["success"]


# -- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


def test_upload_ask_click_a_word_and_see_where_it_looked(
    served: Served, browser: Any, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    page.set_input_files("#question input[type=file]", tmp_path / "red.png")
    page.locator("#question-picture img").wait_for()
    page.fill("#question-text textarea", ASKED)
    page.click("#ask")
    page.locator("#words label").first.wait_for()
    assert page.locator("#looks figure").count() == 0
    page.locator("#words label").last.click()
    page.locator("#looks figure img").wait_for()
    assert "100%" in page.inner_text("#looks") and "centred square" in page.inner_text("#looks")
    assert page.locator("#answer textarea").input_value()

    page.click("#gallery button >> nth=3")  # three pictures: examples come before the question
    page.locator("#example-1-text").wait_for()
    page.click("#example-1-up")
    page.wait_for_function("document.querySelector('#example-0-answer textarea').value == 'yellow'")
    page.click("#example-1-remove")
    page.locator("#example-1-text").wait_for(state="hidden")
    page.click("#ask")
    page.locator("#looks figure").first.wait_for(state="hidden")
    page.locator("#words label").first.click()
    page.locator("#looks figure").nth(1).wait_for()
    assert "sees only the last picture" in page.inner_text("#looks")
    elsewhere = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert not elsewhere
    page.close()


def test_bad_files_and_bad_prompts_are_told_on_the_page(served: Served, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "huge.png").write_bytes(huge_png())
    page = browser.new_page()
    page.goto(served.url)
    for name, said in (("text.png", "no picture that can be read"), ("huge.png", "too large")):
        page.set_input_files("#question input[type=file]", tmp_path / name)
        page.locator("#question-picture [role=alert]", has_text=said).wait_for()
    page.click("#ask")
    page.locator("#status [role=alert]", has_text="the question is empty").wait_for()
    page.evaluate("document.querySelector('#question-text textarea').removeAttribute('maxlength')")
    page.fill("#question-text textarea", "why " * 100)
    page.click("#ask")
    page.locator("#status [role=alert]", has_text="this page allows 300").wait_for()
    page.fill("#question-text textarea", ASKED)
    page.click("#ask")
    page.locator("#words label").first.wait_for()
    page.close()


@pytest.mark.slow
def test_twenty_browsers_that_ask_at_once_are_all_answered(served: Served, browser: Any) -> None:
    contexts = [browser.new_context() for _ in range(20)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(served.url)
        page.fill("#question-text textarea", ASKED)
    for page in pages:
        page.click("#ask")
    for page in pages:
        page.locator("#words label").first.wait_for(timeout=120_000)
        assert "tokens" in page.inner_text("#status")
    for context in contexts:
        context.close()
