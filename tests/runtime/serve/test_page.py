"""`runtime/serve/page.html`: the page at `/` in a real browser: Chromium, over a runner without a model, and once over
the demo."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import latentrt
import numpy as np
import PIL.Image
import pytest
from helpers.fake_runner import seed_of
from helpers.page_tab import DONE, SECONDS, PageRunner, Tab
from helpers.served import Served, served
from helpers.waiting import until
from latentrt.runtime.serve.runner import PipelineRunner
from latentrt.runtime.serve.schema import Limits
from playwright.sync_api import Browser, Route, expect, sync_playwright

pytestmark = pytest.mark.browser
RUNNER = PageRunner()


# Playwright keeps an event loop in its thread; with these fixtures it is gone before another module's tests.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            timeout=1000 * SECONDS,
        )
        yield one
        one.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(lambda: RUNNER, limits=Limits(prompt=100, steps=50), max_waiting=2) as one:
        yield one


@pytest.fixture
def runner() -> Iterator[PageRunner]:
    RUNNER.calls.clear()
    yield RUNNER
    RUNNER.release()


@pytest.fixture
def tab(browser: Browser, server: Served, runner: PageRunner) -> Iterator[Tab]:
    one = Tab(browser, server.url)
    try:
        yield one
    finally:
        runner.release()
        one.close()


def test_generate_watch_cancel_and_generate_again(tab: Tab, server: Served, runner: PageRunner) -> None:
    page = tab.page
    expect(page.locator("#model")).to_have_text("cat-model")
    expect(page.locator("#state")).to_have_text("ready")
    runner.hold()
    page.fill("#steps", "9")
    page.fill("#seed", "3")
    page.click("#go")
    tab.message("Waiting for its turn …")
    for step in (1, 2, 3):
        runner.let_one()
        tab.message(f"Step {step} of 9")
        assert seed_of(tab.picture()) == 1000 + step
        assert page.locator("#progress").evaluate("p => p.value") == pytest.approx(step / 9)
    page.click("#go", force=True)  # nothing: one is on its way
    page.click("#stop")
    tab.message("Cancelled.")
    expect(page.locator("#picture")).to_be_hidden()
    assert page.locator("#last li").count() == 0
    until(lambda: server.service.running == 0)
    runner.release()
    page.fill("#seed", "4")
    page.click("#go")
    tab.message(DONE)
    assert seed_of(tab.picture()) == 4
    assert runner.calls == [[3], [4]]
    assert runner.steps[-2] <= 4
    expect(page.locator("#told")).to_contain_text("Seed4")


def test_a_screen_reader_hears_the_beginning_each_tenth_step_and_the_end(
    tab: Tab, runner: PageRunner
) -> None:
    page = tab.page
    page.evaluate(
        """() => {
          window.heard = [];
          new MutationObserver(() => heard.push(spoken.textContent)).observe(spoken, { childList: true });
        }"""
    )
    runner.hold()
    page.fill("#steps", "21")
    page.click("#go")
    for step in range(1, 22):
        runner.let_one()
        if step < 21:
            tab.message(f"Step {step} of 21")
            expect(page.locator("#picture")).to_have_attribute("alt", "the image so far")
    tab.message(DONE)
    heard = page.evaluate("heard")
    assert heard[:3] == ["Waiting for its turn …", "Step 10 of 21", "Step 20 of 21"]
    assert DONE.match(heard[3])
    assert len(heard) == 4
    expect(page.locator("#message")).to_have_attribute("aria-hidden", "true")


def test_what_was_made_can_be_copied_saved_and_looked_at_again(tab: Tab) -> None:
    page = tab.page
    page.fill("#steps", "2")
    for seed, prompt in ((5, "five"), (6, "<script>document.title='spoilt'</script>")):
        page.fill("#seed", str(seed))
        page.fill("#prompt", prompt)
        page.click("#go")
        expect(page.locator("#caption")).to_have_text(prompt)
        tab.message(DONE)
    assert page.title() == "latentrt"
    assert page.locator("script").count() == 1
    page.click("#copy")
    tab.message("Parameters copied.")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied == {
        "prompt": "<script>document.title='spoilt'</script>",
        "seed": 6,
        "steps": 2,
        "size": "64x64",
    }
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "latentrt-6.png"
    assert seed_of(PIL.Image.open(download.value.path())) == 6
    assert page.locator("#last li").count() == 2
    expect(page.locator("#last button").first).to_have_attribute("aria-current", "true")
    page.locator("#last button").nth(1).click()
    expect(page.locator("#caption")).to_have_text("five")
    assert seed_of(tab.picture()) == 5
    expect(page.locator("#last button").first).not_to_have_attribute("aria-current", "true")
    page.fill("#seed", "")
    page.click("#again")
    expect(page.locator("#seed")).to_have_value("5")


def test_the_page_shows_errors(tab: Tab, server: Served, runner: PageRunner) -> None:
    page = tab.page
    page.fill("#prompt", "x" * 101)
    page.click("#go")
    tab.message("It could not be made: prompt has 101 characters; at most 100 are allowed.")
    expect(page.locator("#message")).to_have_class("bad")
    expect(page.get_by_role("alert")).to_have_text(re.compile("at most 100 are allowed"))
    expect(page.locator("#spoken")).to_have_text("")
    assert page.locator("#stage.running").count() == 0
    page.fill("#prompt", "x")

    page.fill("#steps", "0")  # the browser's own check, before anything is asked
    before = len(tab.asked)
    page.click("#go")
    assert page.locator("#steps:invalid").count() == 1
    assert len(tab.asked) == before
    page.fill("#steps", "2")

    def answers(status: int, body: str, **headers: str) -> None:
        def answer(route: Route) -> None:
            route.fulfill(status=status, body=body, headers=headers)

        page.unroute("**/generations")
        page.route("**/generations", answer)
        page.click("#go")

    answers(429, json.dumps({"error": {"message": "2 images wait; try again in 7 s"}}))
    tab.message("Too many are waiting: 2 images wait; try again in 7 s.")
    answers(503, json.dumps({"error": {"message": "it is shutting down"}}), **{"Retry-After": "5"})
    tab.message("Not now: it is shutting down. Try again in 5 s.")
    answers(502, "<h1>Bad gateway</h1>")
    tab.message("It could not be made: the server answered 502.")
    answers(200, 'event: error\ndata: {"error": {"message": "the deadline passed"}}\n\n')
    tab.message("It could not be made: the deadline passed.")
    answers(200, "data: [DONE]\n\n")
    tab.message("The server ended before the image was made. Try again in a moment.")
    assert runner.calls == []
    page.unroute("**/generations")
    page.click("#go")
    tab.message(DONE)
    expect(page.locator("#message")).not_to_have_class("bad")


def test_the_page_shows_a_full_queue(tab: Tab, server: Served, runner: PageRunner) -> None:
    runner.hold()
    threads = [
        threading.Thread(target=server.ask, kwargs={"seed": k, "size": "8x8"}, daemon=True) for k in range(3)
    ]
    for k, thread in enumerate(threads):
        thread.start()
        until(lambda k=k: server.service.running == 1 and server.service.waiting == k)
    tab.page.click("#go")
    tab.message(re.compile("Too many are waiting: .*2 of 2 places are taken, .*; try again in"))
    runner.release()
    for thread in threads:
        thread.join(SECONDS)


def test_a_key_is_asked_for(browser: Browser) -> None:
    with served(PageRunner, api_keys=("secret",), ready=False) as server:
        tab = Tab(browser, server.url)
        expect(tab.page.locator("#state")).to_have_text("ready")
        tab.page.click("#go")
        tab.message(re.compile("the API key is missing or wrong"))
        assert tab.focused() == "key"
        tab.page.keyboard.type("secret")
        tab.page.keyboard.press("Enter")
        tab.message(DONE)
        expect(tab.page.locator("#model")).to_have_text("cat-model")
        tab.close()


def test_a_server_that_goes_away_midway(browser: Browser) -> None:
    runner = PageRunner()
    with ExitStack() as stack:
        server = stack.enter_context(served(lambda: runner, drain_seconds=0.1))
        stack.callback(runner.release)
        tab = Tab(browser, server.url)
        runner.hold()
        tab.page.click("#go")
        runner.let_one()
        tab.message("Step 1 of 30")
        server.server.should_exit = server.server.force_exit = True
        for connection in list(server.server.server_state.connections):
            connection.transport.abort()
        tab.message("The server cannot be reached. Is it still running? Try again in a moment.")
        expect(tab.page.locator("#state")).to_have_text("not reached")
        assert tab.page.locator("#stage.running").count() == 0
        tab.page.click("#go")
        tab.message(re.compile("cannot be reached"))
        tab.close()


def test_the_page_shows_when_the_model_is_ready(browser: Browser) -> None:
    warm = threading.Event()

    class Slow(PageRunner):
        def warm_up(self, batches: Sequence[int] = (1,)) -> None:
            assert warm.wait(SECONDS)

    with served(Slow, ready=False) as server:
        tab = Tab(browser, server.url)
        expect(tab.page.locator("#state")).to_have_text("the model is being loaded")
        tab.page.click("#go")
        tab.message("Not now: not ready: the model is being loaded. Try again in 5 s.")
        warm.set()
        expect(tab.page.locator("#state")).to_have_text("ready")
        tab.close()


def test_by_keyboard_alone(tab: Tab, runner: PageRunner) -> None:
    page, press = tab.page, tab.page.keyboard.press
    assert tab.focused() == "prompt"
    order = []
    for _ in range(7):
        press("Tab")
        order.append(tab.focused())
    assert order == ["size", "steps", "seed", "share", "SUMMARY", "go", "stop"]
    for name in ("prompt", "go"):
        page.locator(f"#{name}").focus()
        press("Shift+Tab")
        press("Tab")  # as by keyboard, so that the ring is shown
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    page.locator("#prompt").focus()
    press("ControlOrMeta+a")
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    runner.hold()
    press("Enter")
    runner.let_one()
    tab.message("Step 1 of 30")
    assert tab.focused() == "prompt"
    press("Escape")
    tab.message("Cancelled.")
    runner.release()
    press("Enter")
    tab.message(DONE)
    expect(page.locator("#caption")).to_have_text("one\ntwo")

    page.locator("#go").focus()
    press("Space")
    expect(page.locator("#last li")).to_have_count(2)
    assert tab.focused() == "go"  # who generates again stays there
    order = []
    for _ in range(6):
        press("Tab")
        order.append(tab.focused())
    assert order == ["stop", "copy", "save", "again", "BUTTON", "BUTTON"]
    press("Enter")
    expect(page.locator("#last button").nth(1)).to_have_attribute("aria-current", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colour_scheme(scheme: str, browser: Browser, server: Served) -> None:
    """And its words can be read: WCAG's contrast of 4.5 (2.1, 1.4.3) for text, dim text, errors and the button."""
    tab = Tab(browser, server.url, color_scheme=scheme)
    tab.page.evaluate("say('No.', true)")
    pairs = tab.page.evaluate(
        """() => {
          const backed = (e) => {
            const c = getComputedStyle(e).backgroundColor;
            return /, 0\\)$/.test(c) ? backed(e.parentElement) : c;
          };
          return ["h1", "label", "#prompt", "#go", "#stop", "#empty", "#message", "#state", ".hint"].map((name) => {
            const e = document.querySelector(name);
            return [name, getComputedStyle(e).color, backed(e)];
          });
        }"""
    )
    tab.close()
    for name, text, back in pairs:
        assert contrast(text, back) >= 4.5, (name, text, back)
    brightness = luminance({name: back for name, _, back in pairs}["h1"])
    assert (brightness < 0.1) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, WCAG 2.1."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_it_fits_a_phone(browser: Browser, server: Served) -> None:
    tab = Tab(browser, server.url, viewport={"width": 320, "height": 640})
    page = tab.page
    page.fill("#steps", "1")
    page.fill("#prompt", "a word " + "w" * 80)
    page.click("#go")
    tab.message(DONE)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    form, stage = page.locator("#form").bounding_box(), page.locator("#stage").bounding_box()
    assert form is not None
    assert stage is not None
    assert stage["y"] > form["y"] + form["height"]  # one below the other
    tab.close()


def test_the_demo_in_the_browser(browser: Browser) -> None:
    """Its own image: pixel for pixel the pipeline's."""
    pipe = latentrt.Pipeline.from_pretrained("demo", backend="eager")
    pipe.set_progress_bar_config(disable=True)
    with served(lambda: PipelineRunner(pipe), ready=False) as server:
        tab = Tab(browser, server.url)
        page = tab.page
        expect(page.locator("#state")).to_have_text("ready")
        for name, value in (("steps", "3"), ("size", "64x64"), ("seed", "11")):
            page.fill(f"#{name}", value)
        page.click("#go")
        tab.message(DONE)
        shown = np.asarray(tab.picture(), np.int16)
        expect(page.locator("#told")).to_contain_text("Size64x64")
        tab.close()
    wanted = pipe("a red circle above a blue square", width=64, height=64, num_inference_steps=3, seed=11)
    assert np.abs(shown - np.asarray(wanted.images[0], np.int16)).max() <= 1
