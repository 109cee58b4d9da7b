"""A tab of Chromium's with the page at `/` in it, and the runner behind that."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import PIL.Image
from latentrt.runtime.serve.requests import CheckedRequest, ImageResult
from latentrt.runtime.serve.runner import OnStep
from playwright.sync_api import Browser, Page, expect

from helpers.fake_runner import FakeRunner, picture

DONE = re.compile(r"^Done in \d+\.\d\d s\.$")
SECONDS = 120  # for anything to happen in the browser: machines that test may be slow
expect.set_options(timeout=1000 * SECONDS)


class PageRunner(FakeRunner):
    """A runner whose previews show their step, and whose parameters hold the prompt."""

    def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
        results = super().run(requests, lambda step, _: on_step(step, lambda k: picture(1000 + step)))
        return [
            replace(
                made,
                parameters={"prompt": r.prompt, "seed": r.seed, "steps": r.steps, "size": "64x64"},
                timings={"queue": 0.0, "total": 0.25},
            )
            for made, r in zip(results, requests, strict=True)
        ]


class Tab:
    """A page of its own. Whatever it asks for goes to its server, and its script has no fault."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(**options)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("pageerror", lambda fault: self.faults.append(str(fault)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = url
        self.page.goto(url)

    def close(self) -> None:
        self.context.close()
        assert self.faults == []
        assert {one for one in self.asked if not one.startswith((f"{self.url}/", "data:"))} == set()

    def message(self, text: str | re.Pattern[str]) -> None:
        expect(self.page.locator("#message")).to_have_text(text)

    def picture(self) -> PIL.Image.Image:
        source = self.page.locator("#picture").get_attribute("src") or ""
        return PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
