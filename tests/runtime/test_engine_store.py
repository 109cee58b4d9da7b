"""`runtime/engine_store.py` and `prepare.py`: which engine a component gets: found, built, or refused with the reason.
No builder runs here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.fake_builder import FakeBuilder
from helpers.faults import disk_full
from latentrt.errors import BackendError, CacheError
from latentrt.export import build_process
from latentrt.export.tensorrt import EngineRequest
from latentrt.runtime import prepare
from latentrt.runtime.engine_store import EngineTarget, StoredEngine, mismatches, stored_engine
from latentrt.runtime.engines import products
from latentrt.runtime.engines.base import Component
from latentrt.runtime.engines.sizes import SizePolicy
from latentrt.runtime.manifests import write_beside
from latentrt.runtime.prepare import Rebuild, find_or_build_engine

RTX = EngineTarget("tensorrt-rtx", (89,))
ONE = SizePolicy.parse(["64x64"], "1")
MORE = SizePolicy.parse(["64..128 step 64"], "1..2")


@pytest.fixture(scope="module")
def component() -> Component:
    return tiny.vae_decoder(torch.float16)


def manifest(folder: Path, **changes: Any) -> None:
    """Write an entry of the store as if it had been made otherwise."""
    found = json.loads((folder / "manifest.json").read_text())
    del found["sha256"]
    found["description"].update(changes)
    write_beside(folder, "manifest.json", found)


def test_built_once_then_found(builder: FakeBuilder, component: Component, tmp_path: Path) -> None:
    first = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    again = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    assert first.built
    assert not again.built
    assert replace(again, built=True) == first
    assert first.plan.read_bytes() == b"an engine"
    assert len(builder.requests) == 1


def test_what_the_builder_is_asked_for(builder: FakeBuilder, component: Component, tmp_path: Path) -> None:
    target = EngineTarget("tensorrt-rtx", (86, 89), weight_streaming=True)
    find_or_build_engine(component, target, MORE, cache_dir=tmp_path)
    find_or_build_engine(replace(component, tf32=True), target, MORE, cache_dir=tmp_path)
    request, rounded = builder.requests
    assert asdict(rounded) == {**asdict(request), "plan": rounded.plan, "tf32": True}
    assert not request.tf32
    assert (request.component, request.product, request.archs) == ("vae_decoder", "tensorrt-rtx", (86, 89))
    assert (request.weight_streaming, request.hardware_compatibility) == (True, "none")
    assert request.profiles == ({"latents": [[1, 4, 8, 8], [1, 4, 16, 16], [2, 4, 16, 16]]},)
    assert request.timing_cache is None  # it times nothing
    json.dumps(request.__dict__)  # it travels as JSON


def test_kernels_of_plugins_are_compiled_into_the_same_cache(
    builder: FakeBuilder, component: Component, tmp_path: Path
) -> None:
    find_or_build_engine(component, replace(RTX, plugins={"GroupNorm": "1"}), ONE, cache_dir=tmp_path)
    assert builder.requests[0].kernels == {"of": {"89": str(tmp_path / "aot")}}


def test_everything_that_decides_an_engine_makes_another(
    builder: FakeBuilder, component: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    others = [
        (component, RTX, MORE),
        (component, replace(RTX, archs=(89, 120)), ONE),
        (component, replace(RTX, weight_streaming=True), ONE),
        (component, replace(RTX, plugins={"GroupNormSilu": "1"}), ONE),
        (component, replace(RTX, plugins={"GroupNormSilu": "1-other kernels"}), ONE),
        (component, replace(RTX, plugins={"GroupNorm": "1"}), ONE),
        (replace(component, fingerprint="0"), RTX, ONE),
        (replace(component, dtype=torch.bfloat16), RTX, ONE),
        (replace(component, dtype=torch.float32), RTX, ONE),
        (replace(component, dtype=torch.float32, tf32=True), RTX, ONE),
    ]
    for other in others:
        find_or_build_engine(*other, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(products.load(products.product("tensorrt-rtx")), "__version__", "1.99.0")
        find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_BUILDER", ("export/build_process.py",))
        find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    assert len(builder.requests) == len(others) + 3
    for other in [(component, RTX, ONE), *others]:
        find_or_build_engine(*other, cache_dir=tmp_path)
    assert len(builder.requests) == len(others) + 3


def test_without_sizes_the_one_last_asked_for_is_taken(
    builder: FakeBuilder, component: Component, tmp_path: Path
) -> None:
    default = find_or_build_engine(component, RTX, cache_dir=tmp_path)
    assert str(default.profiles[0]) == "batch 1..4, height 32..80 step 4, width 32..80 step 4"
    newest = find_or_build_engine(component, replace(RTX, archs=(86, 89)), ONE, cache_dir=tmp_path)
    # It serves sm_89 among others.
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).key == newest.key
    # What a build finds counts as well: it is how a user asks for its sizes.
    sizes = SizePolicy.around(component)
    assert find_or_build_engine(component, RTX, sizes, cache_dir=tmp_path).key == default.key
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).key == default.key


def test_one_with_weight_streaming_is_taken_where_there_is_no_other(
    builder: FakeBuilder, component: Component, tmp_path: Path
) -> None:
    streaming = replace(RTX, weight_streaming=True)
    streamed = find_or_build_engine(component, streaming, ONE, cache_dir=tmp_path)
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).key == streamed.key
    plain = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    newest = find_or_build_engine(component, streaming, MORE, cache_dir=tmp_path)
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).key == plain.key
    assert find_or_build_engine(component, streaming, cache_dir=tmp_path).key == newest.key


def test_one_that_failed_its_verification_is_not_taken_silently(
    builder: FakeBuilder, component: Component, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passed, failed = (
        find_or_build_engine(component, RTX, sizes, cache_dir=tmp_path) for sizes in (ONE, MORE)
    )
    for stored, verdict in ((passed, True), (failed, False)):
        write_beside(stored.plan.parent, "verdict.json", {"passed": verdict})
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).key == passed.key
    assert caplog.messages == []
    shutil.rmtree(passed.plan.parent)
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).key == failed.key
    (message,) = caplog.messages
    what = f"the engine {failed.key[:12]} of vae_decoder in float16 computed something else than PyTorch when"
    assert message.startswith(what)
    with pytest.raises(BackendError, match=rf"{what} .*run `latentrt verify` again, or use another back end"):
        find_or_build_engine(component, RTX, cache_dir=tmp_path, rebuild="never")


def test_the_bar_knows_what_it_took_last_time(
    builder: FakeBuilder, component: Component, tmp_path: Path
) -> None:
    find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    find_or_build_engine(component, RTX, MORE, cache_dir=tmp_path)
    find_or_build_engine(replace(component, fingerprint="0"), RTX, ONE, cache_dir=tmp_path)
    assert builder.expected == [None, 7.0, None]


def test_rebuild_never_builds_nothing(builder: FakeBuilder, component: Component, tmp_path: Path) -> None:
    with pytest.raises(
        BackendError,
        match=r"has no tensorrt-rtx engine of vae_decoder in float16 that runs here; `latentrt build`",
    ):
        find_or_build_engine(component, RTX, cache_dir=tmp_path, rebuild="never")
    assert builder.requests == []
    find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    assert not find_or_build_engine(component, RTX, cache_dir=tmp_path, rebuild="never").built


class Replaced:
    """Reading an entry that another process puts anew as it is read, the first `times`."""

    reads = 0

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __call__(self, folder: Path, *, built: bool) -> StoredEngine:
        self.reads += 1
        path = folder / "manifest.json"
        whole = path.read_bytes()
        if self.reads <= self.times:
            path.unlink()
        try:
            return stored_engine(folder, built=built)
        finally:
            path.write_bytes(whole)


@pytest.mark.parametrize("rebuild", ["auto", "never", "always"])
def test_an_engine_that_is_replaced_while_it_is_read(
    rebuild: Rebuild,
    builder: FakeBuilder,
    component: Component,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    monkeypatch.setattr(prepare, "stored_engine", replaced := Replaced())
    again = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path, rebuild=rebuild)
    assert again.built == (rebuild == "always")
    assert len(builder.requests) == (2 if rebuild == "always" else 1)
    assert replaced.reads == 2


def test_an_engine_that_is_replaced_again_and_again_is_named(
    builder: FakeBuilder, component: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    monkeypatch.setattr(prepare, "stored_engine", Replaced(2))
    with pytest.raises(CacheError, match=rf"{tmp_path}\S+ .*manifest\.json is missing; run it again"):
        find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)


def test_rebuild_always_builds_again(builder: FakeBuilder, component: Component, tmp_path: Path) -> None:
    find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    assert find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path, rebuild="always").built
    assert builder.expected == [None, 7.0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "1.6.0"}, "it was built by version 1.6.0, this is 1."),
        ({"archs": [86]}, "it was built for sm_86, wanted is sm_89"),
        ({"driver": "cuda-12"}, "it was built under the driver cuda-12, this is any"),
        (
            {"plugins": {"GroupNorm": "0-x"}},
            "it was built with the plugins {'GroupNorm': '0-x'}, wanted are {}",
        ),
        ({"tf32": True}, "it was built with TF32, wanted is without TF32"),
        ({"plugins": {"A": "1"}}, "it was built with the plugins {'A': '1'}, wanted are {}"),
        ({"onnx": "0"}, "it is stale: exported by other versions of latentrt, PyTorch or onnxscript"),
        ({"builder": "0"}, "it is stale: built by other code of latentrt"),
    ],
)
def test_stale_and_foreign_engines_are_named(
    builder: FakeBuilder,
    component: Component,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    why: str,
) -> None:
    old = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    manifest(old.plan.parent, **change)
    with pytest.raises(BackendError, match="has no tensorrt-rtx engine"):
        find_or_build_engine(component, RTX, cache_dir=tmp_path, rebuild="never")
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"ignoring engine {old.key[:12]} of vae_decoder in float16, built on 20")
    assert why in message
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).built  # auto


def test_hardware_compatible_engines_run_elsewhere() -> None:
    wanted = {
        "version": "11.4.0",
        "driver": "cuda-13",
        "gpu": "",
        "plugins": {"GroupNorm": "1-these kernels"},
        "onnx": "0",
        "builder": "0",
        "archs": [90],
    }
    have = {**wanted, "archs": [80], "plugins": {"GroupNorm": "1-other kernels"}}  # made by another Triton
    assert mismatches(have, wanted) == ["it was built for sm_80, wanted is sm_90"]
    assert mismatches({**have, "hardware_compatibility": "ampere-plus"}, wanted) == []
    assert mismatches({**have, "hardware_compatibility": "ampere-plus"}, {**wanted, "archs": [75]}) != []
    assert mismatches({**have, "hardware_compatibility": "same-capability"}, wanted) != []


def test_a_damaged_engine_is_named_and_not_loaded(
    builder: FakeBuilder, component: Component, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    stored.plan.write_bytes(b"An engine")
    for sizes in (ONE, None):
        with pytest.raises(CacheError, match=r"is damaged \(model.plan has another SHA-256"):
            find_or_build_engine(component, RTX, sizes, cache_dir=tmp_path, rebuild="never")
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).built
    assert "cached vae_decoder is damaged (model.plan has another SHA-256" in caplog.text
    assert stored.plan.read_bytes() == b"an engine"


def test_a_flipped_byte_in_a_manifest_is_named_and_nothing_of_it_loaded(
    builder: FakeBuilder, component: Component, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    path = old.plan.parent / "manifest.json"
    whole = path.read_bytes()
    tokens = [found.start() for found in re.finditer(rb"\w+|\W+", whole)]
    assert len(tokens) > 100
    profile = whole.index(b"8,", whole.index(b'"profiles"'))
    for at in (*tokens, profile):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        caplog.clear()
        with pytest.raises(BackendError, match="has no tensorrt-rtx engine"):
            find_or_build_engine(component, RTX, cache_dir=tmp_path, rebuild="never")
        assert f"ignoring the damaged cache entry {old.key[:12]}: manifest.json" in caplog.text
        with pytest.raises(CacheError, match=r"is damaged \(manifest.json .*; build it again"):
            find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path, rebuild="never")
    caplog.clear()
    built = find_or_build_engine(component, RTX, cache_dir=tmp_path)
    assert str(built.profiles[0]) == "batch 1..4, height 32..80 step 4, width 32..80 step 4"  # the default
    assert f"ignoring the damaged cache entry {old.key[:12]}: manifest.json" in caplog.text
    assert find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path) == old
    assert "cached vae_decoder is damaged (manifest.json" in caplog.text


def test_a_damaged_verdict_is_not_taken_for_none(
    builder: FakeBuilder, component: Component, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored = find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    path = stored.plan.parent / "verdict.json"
    write_beside(path.parent, path.name, {"passed": False})
    path.write_text(path.read_text().replace("passed", "pasted"))
    with pytest.raises(CacheError, match=r"is damaged \(verdict.json has another SHA-256"):
        find_or_build_engine(component, RTX, cache_dir=tmp_path, rebuild="never")
    assert find_or_build_engine(component, RTX, cache_dir=tmp_path).built
    assert "cached vae_decoder is damaged (verdict.json has another SHA-256" in caplog.text
    assert not path.exists()


def test_a_build_that_fails_leaves_nothing(
    component: Component, tmp_path: Path, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(request: EngineRequest, *, expected_seconds: float | None) -> Mapping[str, Any]:
        Path(request.plan).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(build_process, "build_in_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    assert list((tmp_path / "partial").iterdir()) == []
    assert list((tmp_path / "entries").iterdir()) == []


def test_a_full_disk(
    component: Component, tmp_path: Path, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(request: EngineRequest, *, expected_seconds: float | None) -> Mapping[str, Any]:
        raise disk_full(request.plan)

    monkeypatch.setattr(build_process, "build_in_child", full)
    with pytest.raises(CacheError, match=r"no space left .*model\.plan.* free some, or set LATENTRT_CACHE"):
        find_or_build_engine(component, RTX, ONE, cache_dir=tmp_path)
    assert list((tmp_path / "partial").iterdir()) == []
