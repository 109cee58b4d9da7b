"""`export/commands.py`: `latentrt build` and what it says of its engines; the builder itself is in
tests/export/test_tensorrt.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import disk_full
from latentrt.errors import BackendUnavailableError, BuildError
from latentrt.export import build_process, engines, plugin_kernels
from latentrt.export.tensorrt import EngineRequest
from latentrt.export.verify import LIMITS, Verdict
from latentrt.runtime import prepare
from latentrt.runtime.engine_store import StoredEngine
from latentrt.runtime.engines import products
from latentrt.runtime.engines.base import Availability, Component
from latentrt.runtime.manifests import VERDICT, write_beside

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[EngineRequest]:
    """What is asked of the builder, which writes a few bytes instead; in a cache of its own."""
    asked: list[EngineRequest] = []

    def build(request: EngineRequest, *, expected_seconds: float | None) -> Mapping[str, Any]:
        asked.append(request)
        Path(request.plan).write_bytes(b"an engine")
        return {"seconds": 7.0, "engine_bytes": 9_400_000}

    monkeypatch.setattr(build_process, "build_in_child", build)
    monkeypatch.setattr(prepare, "find_or_export_onnx", lambda component, cache_dir: Path("model.onnx"))
    monkeypatch.setattr(plugin_kernels, "plugin_kernels", lambda *asked, cache: {"of": {"asked": str(asked)}})
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.fixture
def build(run_cli: Run, requests: list[EngineRequest]) -> Run:
    """`latentrt build demo --engine tensorrt-rtx --arch sm_89`, and more."""
    return lambda *more: run_cli("build", "demo", "--engine", "tensorrt-rtx", "--arch", "sm_89", *more)


def test_every_component_is_built_and_listed(build: Run, requests: list[EngineRequest]) -> None:
    code, out, err = build()
    assert (code, err) == (0, "")
    names = ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
    assert [request.component for request in requests] == names
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == names
    assert lines[4].startswith("unet            float16   built in ")
    assert ", 9 MB  " in lines[4]
    assert lines[5].strip() == "batch 1..8, height 8..20, width 8..20"
    assert requests[2].archs == (89,)


def test_what_is_there_is_found(build: Run, requests: list[EngineRequest]) -> None:
    first = build("--component", "unet")[1].split()
    code, out, _ = build("--component", "unet")
    assert code == 0
    assert "unet            float16   found in 0." in out
    assert out.split()[-9] == first[-9]  # its key
    assert len(requests) == 1
    build("--component", "unet", "--rebuild")
    assert len(requests) == 2


@pytest.mark.parametrize("upcast", ["float32", "bfloat16"])
def test_a_vae_that_overflows_is_built_as_its_back_end_runs_it(
    build: Run, requests: list[EngineRequest], upcast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines.TensorRTRTXBackend, "upcast", getattr(torch, upcast))
    code, out, _ = build("--component", "vae_decoder")
    assert code == 0
    assert out.split()[:2] == ["vae_decoder", upcast]
    assert [request.tf32 for request in requests] == [upcast == "float32"]


def test_options_reach_the_builder(run_cli: Run, requests: list[EngineRequest]) -> None:
    code, out, err = run_cli(
        *("build", "demo", "--engine", "tensorrt-rtx", "--arch", "sm_120, sm_89", "--dtype", "float32"),
        *("--component", "unet", "--sizes", "64..128 step 64", "--sizes", "128x64", "--batch", "1..2"),
        "--weight-streaming",
        "--json",
    )
    assert (code, err) == (0, "")
    (request,) = requests
    assert (request.product, request.archs, request.weight_streaming) == ("tensorrt-rtx", (89, 120), True)
    assert [p["sample"] for p in request.profiles] == [
        [[1, 4, 8, 8], [2, 4, 16, 16], [4, 4, 16, 16]],
        [[1, 4, 8, 16], [2, 4, 8, 16], [4, 4, 8, 16]],
    ]
    (row,) = json.loads(out)
    assert (row["component"], row["dtype"], row["built"]) == ("unet", "float32", True)
    assert row["profiles"][1] == "batch 1..4, height 8, width 16"
    assert row["figures"]["engine_bytes"] == 9_400_000
    assert Path(row["file"]).read_bytes() == b"an engine"
    assert Path(row["file"]).parent.name == row["key"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--component", "refiner"),
            "demo has no component refiner; it has text_encoder, text_encoder_2, unet",
        ),
        (("--sizes", "huge"), "the size 'huge' cannot be read; write such as 1024x1024"),
        (("--sizes", "100x100"), "100 pixels are no whole number of latents; unet takes multiples of 8"),
        (("--batch", "4..1"), "'4..1' goes from 4 to 1; write the smaller first"),
        (
            ("--plugins", "Geglu"),
            "there is no plugin 'Geglu'; there are GroupNorm, GroupNormSilu, ShiftGroupNormSilu, DotProductAttention, "
            "and all or none",
        ),
        (("--plugins", ""), "there is no plugin ''; there are GroupNorm"),
        (
            ("--arch", "sm_75,sm_89", "--plugins", "all"),
            "plugins have no kernels for sm_75; build for it without",
        ),
        (("--arch", "sm_90"), "TensorRT for RTX has no engines for sm_90; it has them for sm_75"),
        (("--hardware-compatibility", "ampere-plus"), "does nothing in TensorRT for RTX"),
    ],
)
def test_refusals_are_one_line_before_any_work(
    arguments: tuple[str, ...], message: str, build: Run, requests: list[EngineRequest]
) -> None:
    code, out, err = build(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("latentrt: ")
    assert message in err
    assert err.count("\n") == 1
    assert requests == []


def test_plugins_reach_the_builder(build: Run, requests: list[EngineRequest]) -> None:
    keys = []
    for text, names in (
        ("none", ()),
        ("GroupNormSilu, DotProductAttention", ("DotProductAttention", "GroupNormSilu")),
        ("all", ("DotProductAttention", "GroupNorm", "GroupNormSilu", "ShiftGroupNormSilu")),
    ):
        code, out, err = build("--component", "unet", "--plugins", text, "--json")
        assert (code, err) == (0, "")
        assert requests[-1].plugins == names
        asked = str((Path("model.onnx"), names, (89,)))
        assert requests[-1].kernels == ({"of": {"asked": asked}} if names else {})
        keys.append(json.loads(out)[0]["key"])
    assert len(set(keys)) == 3
    build("--component", "unet", "--plugins", "DotProductAttention,GroupNormSilu,GroupNormSilu")
    assert len(requests) == 3  # the same, found


def test_a_unet_in_parts_is_three_engines(build: Run, requests: list[EngineRequest]) -> None:
    for rebuilt in (3, 0):
        code, out, err = build("--component", "unet", "--component", "text_encoder", "--split", "--json")
        assert (code, err) == (0, "")
        rows = json.loads(out)
        names = ["unet.prompt", "unet.time", "unet.step", "text_encoder"]
        assert [row["component"] for row in rows] == names
        assert len({row["key"] for row in rows}) == 4
        assert sum(row["built"] for row in rows[:3]) == rebuilt
    assert [request.component for request in requests] == names
    prompt, time, step = (request.profiles[0] for request in requests[:3])
    handed_on = [name for name in step if name != "sample"]
    assert all(step[name][2][0] == 8 for name in handed_on)  # four images with guidance
    assert (prompt["encoder_hidden_states"][2][0], time["timestep"]) == (8, [[1], [128], [512]])
    build("--component", "unet")  # the whole is another engine
    assert [request.component for request in requests[4:]] == ["unet"]


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_the_architecture_must_be_named(
    engine: str, run_cli: Run, requests: list[EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # TensorRT takes none but its GPU's, so that naming one does not help.
    named = ("--arch", "sm_80") if engine == "tensorrt" else ()
    code, _, err = run_cli("build", "demo", "--engine", engine, *named)
    assert code == 1
    assert (
        f"there is no GPU here to build {engine} engines for; tensorrt-rtx builds for others: --engine" in err
    )
    assert "--arch with one or several of sm_75, sm_80, sm_86, sm_89, sm_120, sm_121" in err


def test_without_a_gpu_nor_what_builds_without_one(
    run_cli: Run, requests: list[EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(product: products.Product) -> None:
        raise BackendUnavailableError(f"{product.title} is not installed; {product.install}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "load", absent)
    code, _, err = run_cli("build", "demo", "--engine", "tensorrt")
    assert code == 1
    assert err.startswith(
        "latentrt: there is no GPU here to build tensorrt engines for; tensorrt-rtx builds for "
    )
    assert 'pip install "latentrt[rtx]"' in err


def test_tensorrt_builds_for_no_gpu_but_its_own(
    run_cli: Run, requests: list[EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "local_archs", lambda name: (90,))
    code, _, err = run_cli("build", "demo", "--engine", "tensorrt", "--arch", "sm_80")
    assert code == 1
    assert (
        "TensorRT builds for the GPU it runs on, which is sm_90 here, not for sm_80; leave --arch out" in err
    )
    assert engines.target_archs("tensorrt", (90,)) == (90,)
    assert engines.target_archs("tensorrt", None) == (90,)
    assert engines.target_archs("tensorrt-rtx", (80, 89)) == (80, 89)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BuildError("unet: rejects node 'x'; do that"), "latentrt: unet: rejects node 'x'; do that\n"),
        (disk_full("f"), "latentrt: no space left on the device while writing"),
    ],
)
def test_a_build_that_fails_leaves_nothing(
    error: Exception,
    message: str,
    build: Run,
    requests: list[EngineRequest],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(request: EngineRequest, **_: Any) -> None:
        Path(request.plan).write_bytes(b"half an eng")
        raise error

    monkeypatch.setattr(build_process, "build_in_child", fail)
    code, out, err = build("--component", "unet")
    assert (code, out) == (1, "")
    assert message in err
    assert list((tmp_path / "cache" / "entries").iterdir()) == []
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


@pytest.mark.parametrize("error", [0.001, 0.5])
def test_where_engines_run_they_are_verified(
    error: float, build: Run, requests: list[EngineRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU of sm_89; what verifying does is in tests/export/test_verify.py."""
    here, asked, loaded = [89], [], []

    class Backend:
        upcast = torch.float32

        def __init__(self, with_plugins: Sequence[str], split: bool) -> None:
            assert (with_plugins, split) == (
                ("GroupNorm",),
                False,
            )  # or another engine is verified than was built

        def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
            return Availability(device.type == "cuda")

        def load_stored(
            self, component: Component, stored: Sequence[StoredEngine], device: torch.device
        ) -> list[str]:
            return [str(profile) for one in stored for profile in one.profiles]

    def verify(component: Component, exact: Component, backend: Backend, **options: Any) -> Verdict:
        asked.append((component.dtype, exact.dtype, component.name == exact.name, options["sizes"]))
        loaded.append(options["load"]())
        limits = LIMITS["unet"][torch.float16]
        return Verdict("unet", "b", "GPU", "float16", options["sizes"], error, 60.0, None, limits)

    monkeypatch.setattr(engines, "TensorRTRTXBackend", Backend)
    monkeypatch.setattr(engines, "local_archs", lambda name: tuple(here))
    monkeypatch.setattr(engines, "verify_component", verify)
    options = ("--component", "unet", "--plugins", "GroupNorm")
    code, out, err = build(*options)
    assert asked == [(torch.float16, torch.float32, True, {"batch": 2, "height": 16, "width": 16})]
    if error < 0.01:
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].split()[:2] == ["passed", "unet"]
    else:
        assert code == 1
        assert (
            "tensorrt-rtx computes something else than PyTorch; unet: relative error 0.5, limit 0.01; use another"
            in err
        )
    # That very engine, whatever else the cache has.
    assert loaded == [["batch 1..8, height 8..20, width 8..20"]]
    build(*options, "--sizes", "64x64", "--weight-streaming")
    assert loaded[1:] == [["batch 1..8, height 8, width 8"]]
    assert build(*options)[0] == 0  # found, and not verified again
    here[:] = [86]
    assert build(*options, "--rebuild")[0] == 0  # does not run here
    assert len(asked) == 2


@pytest.mark.parametrize("passed", [True, False])
def test_earlier_verdicts_are_shown_again(passed: bool, build: Run, requests: list[EngineRequest]) -> None:
    (row,) = json.loads(build("--component", "unet", "--json")[1])
    assert row["verdict"] is None
    kept = {"passed": passed, "backend": "b", "device": "GPU"}
    write_beside(Path(row["file"]).parent, VERDICT, kept)
    for more in ((), ("--json",)):
        code, out, err = build("--component", "unet", *more)
        assert code == (0 if passed else 1)
        assert ("tensorrt-rtx computes something else than PyTorch; unet: it failed when" in err) != passed
        if more:
            assert json.loads(out)[0]["verdict"] == kept
        else:
            state = "passed" if passed else "FAILED"
            assert out.splitlines()[-1].strip() == f"{state}  when it was verified, on b, GPU"
    assert len(requests) == 1
    assert build("--component", "unet", "--rebuild")[0] == 0  # a new one, of which nothing is known
