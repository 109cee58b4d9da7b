"""OpenAI's Python client against `latentrt serve`: a picture, and one to watch being made.

latentrt serve &
python -m latentrt.runtime.serve.examples.openai_client http://127.0.0.1:8000 "a red circle above a blue square"
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI


def picture(client: OpenAI, prompt: str, **own: object) -> bytes:
    """A PNG. `own` are latentrt's fields: seed, steps, guidance, negative_prompt, sampler, high_noise_frac."""
    answer = client.images.generate(prompt=prompt, extra_body=own)
    if not answer.data or answer.data[0].b64_json is None:
        raise ValueError("the server answered without an image")
    return base64.b64decode(answer.data[0].b64_json)


def watched(client: OpenAI, prompt: str, previews: int, **own: object) -> Iterator[tuple[str, bytes]]:
    """("preview" or "done", PNG) as they come."""
    stream = client.images.generate(prompt=prompt, stream=True, partial_images=previews, extra_body=own)
    for event in stream:
        kind = "done" if event.type == "image_generation.completed" else "preview"
        yield kind, base64.b64decode(event.b64_json)


def main(url: str, prompt: str, folder: Path) -> None:
    """`picture.png`, and `watched-0.png` and so on."""
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:  # or one of --api-key-file
        (folder / "picture.png").write_bytes(picture(client, prompt, seed=7, steps=20))
        for k, (_, png) in enumerate(watched(client, prompt, 3, seed=7, steps=20)):
            (folder / f"watched-{k}.png").write_bytes(png)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path.cwd())
