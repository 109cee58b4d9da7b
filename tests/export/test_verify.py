"""Verdicts: a back end that computes what PyTorch computes passes, one that does not fails and is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.fake_tensorrt import install
from helpers.tf32 import allowing_tf32
from latentrt.errors import BackendUnavailableError, RequestError
from latentrt.export import verify as verify_module
from latentrt.export.verify import LIMITS, Verdict, verify_component, verify_model
from latentrt.runtime.cache import Store
from latentrt.runtime.cache_contents import contents
from latentrt.runtime.engine_store import StoredEngine
from latentrt.runtime.engines import registry
from latentrt.runtime.engines.base import Availability, Backend, Component
from latentrt.runtime.engines.eager import EagerBackend, EagerEngine
from latentrt.runtime.engines.onnxruntime import OnnxRuntimeBackend
from latentrt.runtime.engines.sizes import SizePolicy, profiles_for
from latentrt.runtime.engines.tensorrt import TensorRTRTXBackend
from latentrt.runtime.manifests import damage_of
from latentrt.runtime.pipeline import Pipeline
from torch import Tensor

Run = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")
SIZES = {"batch": 2, "height": 8, "width": 6}


class WrongEngine(EagerEngine):
    def __init__(self, component: Component, fault: Callable[[Tensor], Tensor]) -> None:
        super().__init__(component, CPU)
        self._fault = fault

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._fault(x) for name, x in super().__call__(inputs).items()}


class WrongBackend:
    """Eager PyTorch with a fault in the outputs of one component."""

    name = "wrong"
    upcast = torch.float32

    def __init__(self, fault: Callable[[Tensor], Tensor], component: str = "vae_decoder") -> None:
        self._fault, self._component = fault, component

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        return Availability(True, "made for a test")

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> EagerEngine:
        right = component.name != self._component
        return EagerEngine(component, CPU) if right else WrongEngine(component, self._fault)


def verdict_of(
    backend: Backend, dtype: torch.dtype = torch.float32, cache_dir: Path | None = None
) -> Verdict:
    component = tiny.vae_decoder(dtype)
    return verify_component(
        component, tiny.vae_decoder(), backend, device=CPU, sizes=SIZES, cache_dir=cache_dir
    )


def test_onnxruntime_passes_and_that_is_kept(tmp_path: Path) -> None:
    verdict = verdict_of(OnnxRuntimeBackend(), cache_dir=tmp_path)
    assert verdict.failures == []
    assert 0 < verdict.relative_error < 1e-4
    assert verdict.psnr > 100
    assert verdict.ssim == pytest.approx(1, abs=1e-6)
    store = Store(tmp_path)
    (entry,) = [entry for entry in contents(store) if entry.verdict is not None]
    assert entry.description["fingerprint"] == tiny.vae_decoder().fingerprint
    assert entry.verdict["passed"] is True
    assert entry.verdict["psnr"] == verdict.psnr
    assert entry.summary.endswith(f"[passed on {verdict.backend}, cpu]")
    assert damage_of(store.entries / entry.key, trust=False) is None


def test_what_is_judged_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine just built, of which a cache may have several; TensorRT is a stand-in that runs PyTorch."""
    component, backend = tiny.text_encoder(), TensorRTRTXBackend()
    install(monkeypatch, {b"an engine": component})
    (tmp_path / "model.plan").write_bytes(b"an engine")
    (profile,) = profiles_for(component, SizePolicy.parse(["64"]))
    stored = StoredEngine("0", tmp_path / "model.plan", (profile,), {}, {}, built=True)
    verdict = verify_component(
        component,
        component,
        backend,
        device=CPU,
        sizes={"batch": 2},
        cache_dir=tmp_path / "cache",
        load=partial(backend.load_stored, component, [stored], CPU),
    )
    assert verdict.failures == []
    assert json.loads((tmp_path / "verdict.json").read_text())["passed"] is True
    assert not (tmp_path / "cache").exists()


def test_the_reference_against_itself() -> None:
    verdict = verdict_of(EagerBackend())
    assert (verdict.relative_error, verdict.psnr, verdict.failures) == (0, 200, [])


def test_half_precision_has_errors_of_its_own() -> None:
    verdict = verdict_of(EagerBackend(), torch.bfloat16)
    assert verdict.failures == []
    assert 1e-4 < verdict.relative_error < LIMITS["vae_decoder"][torch.bfloat16].relative_error
    assert verdict.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fault", "failures"),
    [
        (lambda x: x * 1.01, ["relative error 0.01, limit 0.0001", "PSNR ", "SSIM "]),
        (lambda x: x.flip(-1), ["relative error ", "PSNR ", "SSIM "]),
        (lambda x: x * math.nan, ["relative error nan, limit 0.0001", "PSNR nan dB", "SSIM nan"]),
        (lambda x: x[..., :-1], ["relative error inf", "PSNR -inf dB", "SSIM -1.0"]),
    ],
    ids=["scaled", "flipped", "nan", "cut"],
)
def test_a_fault_fails(fault: Callable[[Tensor], Tensor], failures: list[str]) -> None:
    verdict = verdict_of(WrongBackend(fault))
    found = [f for f in verdict.failures for wanted in failures if f.startswith(wanted)]
    assert found == verdict.failures
    assert len(verdict.failures) >= 2
    told = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    assert told["passed"] is False
    assert str(verdict).startswith("FAILED  vae_decoder")


def tf32_allowed() -> tuple[bool, bool]:
    """In convolutions, in matmuls."""
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@allowing_tf32()
@pytest.mark.parametrize(
    ("component", "judged_as", "allowed"),
    [
        (tiny.vae_decoder(), torch.float32, False),
        (tiny.vae_decoder(torch.bfloat16), torch.bfloat16, True),
        (replace(tiny.vae_decoder(), tf32=True), torch.float32, False),
    ],
    ids=["float32", "bfloat16", "float32 of a float16 model, on a CPU"],
)
def test_only_what_is_judged_as_float32_runs_without_tf32(
    component: Component, judged_as: torch.dtype, allowed: bool
) -> None:
    """Float32's limits can only be met without it."""
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append(tf32_allowed())
        return x

    verdict = verify_component(
        component, tiny.vae_decoder(), WrongBackend(look), device=CPU, sizes=SIZES, cache_dir=None
    )
    assert seen == [(allowed, allowed)]
    assert verdict.limits == LIMITS["vae_decoder"][judged_as]
    assert verdict.failures == []
    assert tf32_allowed() == (True, True)


def test_a_network_that_may_use_tf32_is_judged_as_float16_where_there_is_tf32() -> None:
    exact, rounded = tiny.vae_decoder(), replace(tiny.vae_decoder(), tf32=True)
    cuda = torch.device("cuda")
    assert [verify_module._precision(x, device) for device in (CPU, cuda) for x in (exact, rounded)] == [
        *(torch.float32, torch.float32),
        *(torch.float32, torch.float16),
    ]


@allowing_tf32()
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, False), (torch.float16, True)])
def test_only_pictures_in_float32_are_made_without_tf32(dtype: torch.dtype, allowed: bool) -> None:
    seen: list[tuple[Any, ...]] = []

    def load(backend: str, dtype: torch.dtype) -> Any:
        def picture(prompt: str, **_: Any) -> SimpleNamespace:
            seen.append((backend, dtype, *tf32_allowed()))
            return SimpleNamespace(
                images=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            )

        pipe: Any = picture
        pipe.set_progress_bar_config = lambda disable: None
        return pipe

    judged = WrongBackend(lambda x: x)
    verdict = verify_module._verify_pipeline(load, judged, CPU, dtype, size=None, batch=1)
    assert seen == [("eager", torch.float32, False, False), ("wrong", dtype, allowed, allowed)]
    assert verdict.failures == []


@pytest.fixture
def verify(run_cli: Run, tiny: Callable[..., Path]) -> Run:
    """`latentrt verify` of the tiny SDXL checkpoint."""
    return lambda *more: run_cli("verify", str(tiny("sdxl")), "--size", "64x48", *more)


def wrong(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor], component: str) -> None:
    get = registry.get_backend
    made = WrongBackend(fault, component)
    monkeypatch.setattr(registry, "get_backend", lambda name: made if name == "wrong" else get(name))


PARTS = ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "pipeline"]


@pytest.mark.full
def test_the_command_prints_each_part(verify: Run) -> None:
    code, out, err = verify("--backend", "eager")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines] == [["passed", part] for part in PARTS]
    assert (
        " ".join(lines[-1].split()[2:]) == "float32 48x64 relative error 0.0e+00 PSNR 200.0 dB SSIM 1.00000"
    )


@allowing_tf32()
def test_a_faulty_back_end_ends_the_command_with_1(verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(x: Tensor) -> Tensor:
        rows.add(len(x))
        tf32.update(tf32_allowed())
        return x * 1.05

    rows: set[int] = set()
    tf32: set[bool] = set()
    wrong(monkeypatch, fault, "unet")
    code, out, err = verify("--backend", "wrong", "--json", "--batch", "2")
    assert code == 1
    told = json.loads(out)
    assert [row["part"] for row in told] == PARTS
    assert [row["part"] for row in told if not row["passed"]] == ["unet", "pipeline"]
    assert rows == {4}  # two images with guidance, in the picture as well
    assert tf32 == {False}  # as little as in the reference
    assert [row["sizes"].get("batch") for row in told] == [4, 4, 4, 1, 1, None]
    assert told[2]["limits"] == {"relative_error": 1e-4, "psnr": 80, "ssim": None}
    assert err.startswith(
        "latentrt: wrong (made for a test) computes something else than PyTorch; unet: relative error 0.05, limit "
    )
    assert err.count("\n") == 1


def test_one_component_and_no_pictures(verify: Run) -> None:
    code, out, _ = verify(
        "--backend", "eager", "--component", "text_encoder", "--dtype", "bfloat16", "--json"
    )
    assert code == 0
    assert [row["part"] for row in json.loads(out)] == ["text_encoder"]


def test_the_arguments_are_read_as_generate_reads_them(run_cli: Run) -> None:
    """A device there is not is one line; the demo brings its refiner, which "none" sends away."""
    code, _, err = run_cli(
        "verify", "demo", "--backend", "eager", "--component", "vae_decoder", "--device", "foo"
    )
    assert code == 1
    assert err == "latentrt: device is 'foo'; it can be 'cpu', 'cuda' or 'cuda:1' and so on\n"
    parts = ("verify", "demo", "--backend", "eager", "--component", "none such")
    every = ", ".join(PARTS[:-1])
    code, _, err = run_cli(*parts)
    assert err == f"latentrt: demo has no component none such; it has {every}, refiner unet\n"
    code, _, err = run_cli(*parts, "--refiner", "none")
    assert err == f"latentrt: demo has no component none such; it has {every}\n"


def test_refusals(tiny: Callable[..., Path]) -> None:
    def verify(backend: str = "eager", **options: Any) -> None:
        list(verify_model(str(tiny("sdxl")), None, backend, device=CPU, dtype=torch.float32, **options))

    with pytest.raises(RequestError, match=r"has no component vae; it has text_encoder, .*vae_encoder"):
        verify(components=["vae"])
    with pytest.raises(RequestError, match="60 pixels are no whole number of latents; unet takes multiples"):
        verify(size=(64, 60))
    with pytest.raises(RequestError, match=r"'0' goes from 0 to 0; .* at least 1"):
        verify(batch=0)
    with pytest.raises(BackendUnavailableError, match="'tensorrt' cannot run here"):
        verify("tensorrt")


HALF = torch.float16
RUNS_HALF_HERE = [
    name for name in registry.backend_names() if registry.get_backend(name).availability(CPU, HALF).ok
]


@pytest.mark.parametrize("backend", RUNS_HALF_HERE)
def test_what_is_judged_has_the_dtypes_of_what_a_pipeline_runs(
    backend: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a float16 model whose VAE overflows, too: it runs in another dtype, which depends on the back end."""

    def judged(component: Component, exact: Component, backend: Backend, **_: Any) -> tuple[str, torch.dtype]:
        return component.name, component.dtype

    monkeypatch.setattr(verify_module, "verify_component", judged)
    model = str(tiny("sdxl"))
    found = dict(verify_model(model, None, backend, device=CPU, dtype=HALF, components=PARTS[:-1]))
    parts = Pipeline.from_pretrained(model, backend=backend, device="cpu", dtype=HALF)._parts
    engines = [*parts.base.engines(), parts.vae.decoder, parts.vae.encoder]
    assert found == {engine.component.name: engine.component.dtype for engine in engines}
    assert (found["unet"], found["vae_decoder"]) == (HALF, registry.get_backend(backend).upcast)


@pytest.mark.full
def test_the_demo_on_onnxruntime_in_half_precision(cache_dir: Path) -> None:
    rows = list(
        verify_model("demo", "demo", "onnxruntime", device=CPU, dtype=torch.float16, cache_dir=cache_dir)
    )
    assert [row.part for row in rows] == [*PARTS[:-1], "refiner unet", "pipeline"]
    assert [row for row in rows if row.failures] == []
