"""The script of full-size engines, on tiny configurations: one component for real, the rest with its steps replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench import full_size_engines as script
from latentrt.bench.random_checkpoint import PUBLISHED, component_bytes, write_checkpoint
from latentrt.errors import BuildError
from latentrt.runtime.loading import load_components
from latentrt.runtime.weights import open_checkpoint

GB = 10**9


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """The command line, over folders of its own."""
    places = ["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "results" / "rows.json")]
    return lambda *arguments: script.main([*map(str, arguments), *places])


@pytest.fixture
def configs(tiny: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Of tiny checkpoints, by the names of the full-size ones."""
    return [
        Path(shutil.copytree(tiny(kind), tmp_path / name))
        for kind, name in (("sdxl", "sdxl_base"), ("refiner", "sdxl_refiner"))
    ]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was asked of steps that do nothing: (step, checkpoint, component)."""
    asked: list[tuple[str, str, str]] = []

    def step(function: Callable[..., Any], checkpoint: Path, name: str, cache: Path, *_: Any) -> Any:
        asked.append((function.__name__, checkpoint.name, name))
        assert (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        if function.__name__ == "_export":
            assert not (cache / "entries").exists()  # of the component before
            (cache / "entries").mkdir(parents=True)
            errors = {"dtype": "float16", "weight_bytes": 5 * GB, "relative_error": 1e-3}
            return {**errors, "export_seconds": 100.0, "export_bytes": 6 * GB}
        found = (cache / "entries" / "engine").exists()
        (cache / "entries" / "engine").touch()
        figures = {
            "seconds": 90.0,
            "peak_memory_bytes": 19 * GB,
            "engine_bytes": 5 * GB,
            "layers": 20_000,
        }
        return {"built": not found, "seconds": 2.0, "figures": figures, "sizes": "batch 1..8"}

    monkeypatch.setattr(script, "_in_new_process", step)
    return asked


def read(tmp_path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((tmp_path / "results" / "rows.json").read_text())["rows"]
    return rows


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "name", "spawned"),
    [
        ("sdxl_base", "text_encoder", False),
        ("sdxl_base", "text_encoder", True),
        ("sdxl_refiner", "vae_decoder", False),
        ("sdxl_refiner", "vae_encoder", False),
    ],
)
def test_one_component_for_real(
    run: Callable[..., int],
    configs: list[Path],
    model: str,
    name: str,
    spawned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not spawned:  # processes of their own cost seconds of imports
        monkeypatch.setattr(script, "_in_new_process", lambda step, *arguments: step(*arguments))
    source = next(path for path in configs if path.name == model)
    assert run(source, "--component", name) == 0
    (row,) = read(tmp_path)
    assert (row["model"], row["component"], row["dtype"]) == (model, name, "float16")
    assert row["sizes"].startswith("batch 1..8" if "text" in name else "batch 1..4, ")
    if name in (weights := component_bytes(source)):
        assert row["weight_bytes"] > 0.9 * weights[name]
    assert 0 < row["relative_error"] < 5e-3
    assert row["engine_bytes"] > 10_000
    assert row["layers"] > 20
    for step in ("export", "build"):
        assert row[f"{step}_seconds"] > 0
        assert row[f"{step}_bytes"] > 50e6
    assert row["machine"]["commit"]
    assert f"{model} {name} float16" in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []  # all it made is gone


def test_a_unet_in_parts(
    run: Callable[..., int], configs: list[Path], steps: list[Any], tmp_path: Path
) -> None:
    assert run(configs[0], "--split", "--component", "unet") == 0
    names = ["unet.prompt", "unet.time", "unet.step"]
    assert [row["component"] for row in read(tmp_path)] == names
    found = [script._component(configs[0], name, tmp_path / "cache") for name in names]
    assert [component.name for component in found] == names


def test_all_components_one_after_the_other(
    run: Callable[..., int], configs: list[Path], steps: list[Any], tmp_path: Path
) -> None:
    assert run(*configs) == 0
    names = ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
    assert [(row["model"], row["component"]) for row in read(tmp_path)] == [
        *(("sdxl_base", name) for name in names),
        *(("sdxl_refiner", name) for name in names[1:]),
    ]
    assert steps[:3] == [(step, "sdxl_base", "text_encoder") for step in ("_export", "_build", "_build")]
    assert list((tmp_path / "work").iterdir()) == []


def test_an_interrupted_run_resumes(
    run: Callable[..., int],
    configs: list[Path],
    steps: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, calls = script._in_new_process, 0

    def ends(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second component's build
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(script, "_in_new_process", ends)
    with pytest.raises(KeyboardInterrupt):
        run(configs[0])
    assert [row["component"] for row in read(tmp_path)] == ["text_encoder"]
    del steps[:]
    assert run(configs[0]) == 0
    assert steps[0] == ("_export", "sdxl_base", "text_encoder_2")
    assert len(read(tmp_path)) == 5

    del steps[:]
    assert run(configs[0]) == 0
    assert steps == []
    assert run(configs[0], "--again", "--component", "unet") == 0
    assert steps[0] == ("_export", "sdxl_base", "unet")


def test_a_component_that_fails_stops_no_other(
    run: Callable[..., int],
    configs: list[Path],
    steps: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = script._in_new_process

    def fails(step: Any, checkpoint: Path, name: str, *more: Any) -> Any:
        if name == "unet":
            raise BuildError("unet: takes more memory than there is")
        return whole(step, checkpoint, name, *more)

    monkeypatch.setattr(script, "_in_new_process", fails)
    assert run(configs[1]) == 1
    assert "sdxl_refiner unet: unet: takes more memory than there is" in capsys.readouterr().out
    assert [row["component"] for row in read(tmp_path)] == ["text_encoder_2", "vae_decoder", "vae_encoder"]
    monkeypatch.setattr(script, "_in_new_process", whole)
    del steps[:]
    assert run(configs[1]) == 0
    assert {name for _, _, name in steps} == {"unet"}


def test_what_was_measured_elsewhere_is_measured_again(
    run: Callable[..., int], configs: list[Path], steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(configs[1], "--component", "unet")
    monkeypatch.setattr(script, "describe_machine", lambda: {"commit": "another"})
    del steps[:]
    run(configs[1], "--component", "unet")
    assert len(steps) == 3


ROW = script.Row(
    model="sdxl_base",
    component="unet",
    dtype="float16",
    sizes="batch 1..8",
    weight_bytes=5 * GB,
    export_seconds=239,
    export_bytes=8 * GB,
    relative_error=1e-3,
    build_seconds=149,
    build_bytes=20 * GB,
    engine_bytes=5 * GB,
    layers=20_000,
    found_seconds=4.9,
    machine={},
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"export_seconds": 241.0}, "sdxl_base unet: export took 241.0 s, the limit is 240 s"),
        ({"export_bytes": 8_100_000_000}, "sdxl_base unet: export took 8.1 GB, the limit is 8 GB"),
        ({"build_seconds": 151.0}, "sdxl_base unet: build took 151.0 s, the limit is 150 s"),
        ({"build_bytes": 21 * GB}, "sdxl_base unet: build took 21.0 GB, the limit is 20 GB"),
        ({"found_seconds": 5.1}, "sdxl_base unet: finding its engine again took 5.1 s, the limit is 5 s"),
    ],
)
def test_limits(change: dict[str, Any], problem: str) -> None:
    assert script.exceeded_limits(ROW) == []
    row = script.Row(**{**script.asdict(ROW), **change})
    assert script.exceeded_limits(row) == [problem]
    other = script.Row(**{**script.asdict(row), "component": "text_encoder"})
    assert len(script.exceeded_limits(other)) == ("found_seconds" in change)


def test_a_broken_limit_fails_and_is_printed(
    run: Callable[..., int],
    configs: list[Path],
    steps: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(script.LIMITS, ("sdxl_base", "unet"), script.Limits(99, 8e9, 150, 20e9))
    assert run(configs[0], "--component", "unet") == 1
    assert "sdxl_base unet: export took 100.0 s, the limit is 99 s" in capsys.readouterr().out


@pytest.mark.parametrize("short", ["disk", "memory"])
def test_a_machine_that_is_too_small_is_refused_first(
    run: Callable[..., int],
    configs: list[Path],
    steps: list[Any],
    short: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if short == "disk":
        usage = shutil.disk_usage(".")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr(script, "available_bytes", lambda: 1000)
    assert run(*configs) == 1
    said = capsys.readouterr().out
    assert "sdxl_base: takes about 0.0 GB of the disk" in said
    assert f"{short} is too small for sdxl_base" in said
    assert steps == []


# --- the checkpoint


@pytest.mark.parametrize("model", ["sd15", "sd21"])
def test_stable_diffusion_is_there_as_published(model: str) -> None:
    assert script._components(PUBLISHED / model) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    parameters = {
        "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
        "sd21": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
    }
    assert component_bytes(PUBLISHED / model) == {name: 2 * n for name, n in parameters[model].items()}


@pytest.fixture
def written(configs: list[Path], tmp_path: Path) -> list[Path]:
    return [
        write_checkpoint(tmp_path / "random" / path.name, path, script.CHANGES.get(path.name))
        for path in configs
    ]


def test_random_checkpoints_load(written: list[Path], tmp_path: Path) -> None:
    base, refiner = (
        load_components(open_checkpoint(path, cache_dir=tmp_path), torch.float16) for path in written
    )
    assert base["vae_decoder"].dtype == torch.float32  # as published
    assert refiner["vae_decoder"].dtype == torch.float16
    assert base["text_encoder_2"].fingerprint == refiner["text_encoder_2"].fingerprint
    assert base["unet"].fingerprint != refiner["unet"].fingerprint
    for component in (base["text_encoder"], refiner["unet"]):
        weights = list(component.build().parameters())
        assert all(w.isfinite().all() for w in weights)
        assert any(w.std() > 0 for w in weights)


def test_a_checkpoint_is_whole_or_absent(configs: list[Path], tmp_path: Path) -> None:
    aside = tmp_path / "random.partial"
    aside.mkdir()
    (aside / "half").touch()
    first = write_checkpoint(tmp_path / "random", configs[0])
    assert not aside.exists()
    assert not (first / "half").exists()
    weights = first / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size > component_bytes(configs[0])["unet"]
    before = weights.stat().st_mtime_ns
    write_checkpoint(tmp_path / "random", configs[0])
    assert weights.stat().st_mtime_ns == before
