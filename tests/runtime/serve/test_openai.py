"""`runtime/serve/app.py` and `answers.py`: OpenAI's images API, as its Python client uses it, and the picture
itself."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import openai
import PIL.Image
import pytest
from helpers.fake_runner import FakeRunner, seed_of
from helpers.served import Served, events_of
from helpers.waiting import until
from latentrt.errors import BackendError, DeadlineError, StoppedError
from latentrt.runtime.image import read_parameters
from latentrt.runtime.serve import app
from latentrt.runtime.serve.answers import sse
from latentrt.runtime.serve.app import preview_is_due


def image_of(b64: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(b64)))


def test_openais_client_makes_images(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="cat-model", prompt="a cat", n=2, size="64x48", quality="standard", response_format="b64_json",
        extra_body={"seed": 7, "steps": 3},
    )  # fmt: skip
    assert [seed_of(image_of(image.b64_json)) for image in answer.data] == [7, 8]
    assert [image.seed for image in answer.data] == [7, 8]
    assert answer.data[0].timings["base"] == 0.1
    assert answer.data[0].batch == 2
    assert answer.created > 1.7e9
    assert answer.output_format == "png"


def test_what_openais_client_may_say_of_its_user_is_passed_over(client: openai.OpenAI) -> None:
    told = {"moderation": "low", "safety_identifier": "u-1", "user": "u-1"}
    assert client.images.generate(prompt="x", extra_body={"steps": 1, **told}).data
    with pytest.raises(openai.UnprocessableEntityError, match="moderation"):
        client.images.generate(prompt="x", extra_body={"moderation": "strict"})


@pytest.mark.parametrize(
    ("error", "status"),
    [(DeadlineError("late"), 504), (StoppedError("over"), 503), (BackendError("broken"), 500)],
)
def test_openais_client_does_not_repeat_what_would_end_the_same(
    error: Exception, status: int, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def fail(*requests: object, **_: object) -> None:
        asked.append(requests)
        raise error

    monkeypatch.setattr(server.service.engine, "submit", fail)
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.images.generate(prompt="x")
    assert (caught.value.status_code, len(asked)) == (status, 1)


def test_openais_client_streams(client: openai.OpenAI, runner: FakeRunner) -> None:
    runner.hold()
    stream = client.images.generate(prompt="a cat", stream=True, extra_body={"seed": 9, "steps": 3})
    events = []
    runner.let_one()
    with stream:
        for event in stream:
            events.append(event)
            runner.let_one()
        *parts, last = events
    assert [event.step for event in parts] == [1, 2, 3]
    assert [event.partial_image_index for event in parts] == [0, 1, 2]
    assert {seed_of(image_of(event.b64_json)) for event in parts} == {109}
    assert last.type == "image_generation.completed"
    assert seed_of(image_of(last.b64_json)) == 9
    assert last.seed == 9


def test_pictures_of_a_request_are_written_at_once(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by a thread, and given in their order."""
    together, write, order = threading.Barrier(2), app.png_bytes, []

    def written(image: PIL.Image.Image, parameters: dict[str, Any]) -> bytes:
        together.wait(20)
        if parameters["seed"] == 7:
            until(lambda: order)
        order.append(parameters["seed"])
        return write(image, parameters)

    monkeypatch.setattr(app, "png_bytes", written)
    answer = client.images.generate(prompt="x", n=2, extra_body={"seed": 7, "steps": 1})
    assert order == [8, 7]
    assert [seed_of(image_of(image.b64_json)) for image in answer.data] == [7, 8]


def test_seeds_count_up_from_one_that_is_drawn(client: openai.OpenAI) -> None:
    drawn = [[image.seed for image in client.images.generate(prompt="x", n=3).data] for _ in range(2)]
    assert all(seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2] for seeds in drawn)
    assert drawn[0] != drawn[1]


def test_openais_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cat-model"]
    assert client.models.retrieve("cat-model").owned_by == "latentrt"
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3' here; this server has 'cat-model'"):
        client.models.retrieve("dall-e-3")


def test_a_png_by_accept(server: Served, tmp_path: Any) -> None:
    answer = server.client.post(
        "/v1/images/generations", json={"prompt": "x", "seed": 5, "steps": 2}, headers={"Accept": "image/png"}
    )
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "5"
    assert "base;dur=100.0" in answer.headers["server-timing"]
    file = tmp_path / "x.png"
    file.write_bytes(answer.content)
    assert seed_of(PIL.Image.open(file)) == 5
    assert read_parameters(file) == {"seed": 5}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/*", "image/png"),
        ("image/png, */*;q=0.8", "image/png"),
        ("application/json;q=0.5, image/png", "image/png"),
        ("image/avif, image/*;q=0.9, */*;q=0.8", "image/png"),
        ("image/png;q=0.5, application/json", "application/json"),
        ("image/png;q=0", "application/json"),
        ("image/png;q=nan", "application/json"),
        ("image/png, application/json", "application/json"),
        ("*/*", "application/json"),
        ("", "application/json"),
    ],
)
def test_accept_is_weighed(accept: str, kind: str, server: Served) -> None:
    answer = server.client.post(
        "/v1/images/generations", json={"prompt": "x", "steps": 1}, headers={"Accept": accept}
    )
    assert answer.headers["content-type"] == kind


def test_a_stream_without_news_shows_that_it_lives(
    server: Served, runner: FakeRunner, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_HEARTBEAT", 0.02)
    runner.hold()
    asked = {"prompt": "x", "seed": 9, "steps": 2, "stream": True, "partial_images": 0}
    with server.client.stream("POST", "/v1/images/generations", json=asked) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": it is still on its way", ""] * 2
        runner.release()
        *_, done = [line for line in lines if line.startswith("data: ")]
        assert done == "data: [DONE]"
    runner.hold()
    threading.Timer(0.1, runner.release).start()  # OpenAI's client passes over it
    stream = client.images.generate(prompt="x", stream=True, partial_images=0, extra_body={"steps": 2})
    assert [event.type for event in stream] == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("wanted", "steps"),
    [(0, []), (1, [5]), (3, [3, 5, 8]), (10, list(range(1, 11))), (None, list(range(1, 11)))],
)
def test_previews_are_spread_over_the_steps(wanted: int | None, steps: list[int]) -> None:
    sent: list[int] = []
    for step in range(1, 11):
        if preview_is_due(step, 10, wanted, len(sent)):
            sent.append(step)
    assert sent == steps


def test_an_event_has_no_ends_of_lines_but_its_own() -> None:
    """Whatever a client splits at: httpx takes all of these for the end of a line."""
    told = {"prompt": "a cat\u2028on\u2029a\x85mat\n"}
    event, data, end = sse("image_generation.completed", told).splitlines()
    assert (event, end) == ("event: image_generation.completed", "")
    assert json.loads(data.removeprefix("data: ")) == told


def test_a_stream_of_several_images(server: Served) -> None:
    events = events_of(server.ask(stream=True, n=3, seed=4, partial_images=0))
    assert sorted((e["image"], e["seed"]) for e in events) == [(0, 4), (1, 5), (2, 6)]
