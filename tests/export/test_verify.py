"""Verdicts: a back end that computes what PyTorch computes passes, one that does not fails and is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.fake_tensorrt import install
from latentrt.errors import BackendUnavailableError, RequestError
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


def test_a_faulty_back_end_ends_the_command_with_1(verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(x: Tensor) -> Tensor:
        rows.add(len(x))
        return x * 1.05

    rows: set[int] = set()
    wrong(monkeypatch, fault, "unet")
    code, out, err = verify("--backend", "wrong", "--json", "--batch", "2")
    assert code == 1
    told = json.loads(out)
    assert [row["part"] for row in told] == PARTS
    assert [row["part"] for row in told if not row["passed"]] == ["unet", "pipeline"]
    assert rows == {4}  # two images with guidance, in the picture as well
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


@pytest.mark.full
def test_the_demo_on_onnxruntime_in_half_precision(cache_dir: Path) -> None:
    rows = list(
        verify_model("demo", "demo", "onnxruntime", device=CPU, dtype=torch.float16, cache_dir=cache_dir)
    )
    assert [row.part for row in rows] == [*PARTS[:-1], "refiner unet", "pipeline"]
    assert [row for row in rows if row.failures] == []
