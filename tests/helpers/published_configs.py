"""config.json of published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentrt.runtime import weights

_DATA = Path(weights.__file__).parent / "data"


def _read(checkpoint: str, component: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((_DATA / checkpoint / component / "config.json").read_text("utf-8"))
    return config


def sdxl(checkpoint: str, component: str) -> dict[str, Any]:
    """`checkpoint` is "base" or "refiner"."""
    return _read(f"sdxl_{checkpoint}", component)


SD15_UNET = _read("sd15", "unet")
SD21_UNET = _read("sd21", "unet")
SD15_VAE = _read("sd15", "vae")
SD21_TEXT_ENCODER = _read("sd21", "text_encoder")
