"""What the repository carries: the demo's weights within their bound, and nothing else that is large."""

from __future__ import annotations

from pathlib import Path

from latentrt.runtime.weight_set import read_header

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "runtime" / "demo"


def test_the_demo_is_small_and_in_half_precision() -> None:
    weights = list(DEMO.rglob("*.safetensors"))
    sizes = [path.stat().st_size for path in weights]
    assert sum(sizes) < 24e6
    assert max(sizes) < 12e6
    assert {path.parent.name for path in weights} >= {"unet", "vae", "text_encoder", "text_encoder_2"}
    wider = {
        (path.parent.name, key): ref.dtype
        for path in weights
        for key, ref in read_header(path).items()
        if ref.dtype != "F16"
    }
    assert not wider


def test_no_other_file_is_large() -> None:
    folders = ("runtime", "kernels", "export", "bench", "tests")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    assert not [path for path in files if path.stat().st_size > 5e6 and DEMO not in path.parents]
