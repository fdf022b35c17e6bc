"""Photographs of the demo page for docs/images: `python docs/screenshots.py MODEL [CHROMIUM]`.

Needs the extra `dev` and a Chromium. MODEL: the quickstart's, whose questions are asked.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main(model: Path, chromium: str) -> None:
    from playwright.sync_api import sync_playwright

    from flamingo.serving.demo.asking import Asking
    from flamingo.serving.demo.server import Place
    from flamingo.serving.engine import Engine

    with tempfile.TemporaryDirectory() as uploads, sync_playwright() as playwright:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        from flamingo.serving.demo import page as demo

        asking = Asking(Engine(model))
        served = demo.build(asking, "quickstart", 8)
        url = demo.launch(served, Place(port=_free_port()), asking.limits, wait=False)
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("console", lambda said: print("browser:", said.type, said.text, file=sys.stderr))
        page.goto(url)
        page.locator("#ask").wait_for()
        page.wait_for_timeout(1000)  # pictures of the gallery
        _keep(page, "demo-empty")
        page.locator("#gallery button").nth(3).click()
        page.locator("#example-1-text").wait_for()
        page.locator("#ask").click()
        page.locator("#words label").first.wait_for()
        page.wait_for_timeout(500)
        _keep(page, "demo-answered")
        page.locator("#words label").first.click()
        page.locator("#looks figure").first.wait_for()
        page.locator("#gates button").first.click()
        page.wait_for_timeout(500)
        _keep(page, "demo-looked")
        browser.close()
        served.close()


def _keep(page, name: str) -> None:
    """A small PNG of 256 colours; MAXCOVERAGE keeps colours of few pixels, as the shapes'."""
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    whole = Image.open(path).convert("RGB")
    whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/usr/bin/chromium")
