"""`latentrt export`: the files, the table, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from filelock import FileLock
from latentrt import cli
from latentrt.errors import ExportError
from latentrt.export import check, folder
from latentrt.export.passes import DEFAULT
from latentrt.runtime import cache

TEXT = "text_encoder"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main(["export", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_component(tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    code, text, _ = run(capsys, tiny("sd15"), "-o", out, "--component", TEXT, "--dtype", "float32")
    assert code == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == [".latentrt.lock", f"{TEXT}/model.onnx", f"{TEXT}/model.onnx.data"]
    onnx.checker.check_model(out / TEXT / "model.onnx")
    head, *table = text.splitlines()
    assert head.startswith(f"{TEXT}, float32, ")
    assert head.endswith(f"{out}/{TEXT}/model.onnx")
    assert table[0].split() == ["nodes", "initialisers", "bytes"]
    assert [line.split()[0] for line in table[1 : 1 + len(DEFAULT)]] == list(DEFAULT)
    transposes = next(line for line in table if "transpose-pairs" in line)
    assert " > " in transposes
    assert re.search(r"off PyTorch by .*\bsequence \d", table[-1])


def test_json_and_no_passes(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [tiny("sd15"), "-o", tmp_path, "--component", TEXT, "--json"]
    code, text, _ = run(capsys, *again, "--passes", "")
    assert code == 0
    (made,) = json.loads(text)
    assert (made["component"], made["dtype"], made["passes"]) == (TEXT, "float16", [])
    assert made["check"]["relative_error"]
    first = Path(made["file"]).read_bytes()
    code, text, _ = run(capsys, *again, "--passes", "transpose-pairs,dead-code")  # in its place
    (made,) = json.loads(text)
    assert [report["name"] for report in made["passes"]] == ["transpose-pairs", "dead-code"]
    assert made["passes"][0]["before"]["nodes"] > made["passes"][0]["after"]["nodes"]
    assert Path(made["file"]).read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == [".latentrt.lock", TEXT]


@pytest.mark.full
def test_a_unet_in_three(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [tiny("sd15"), "-o", tmp_path, "--component", "unet", "--dtype", "float32", "--split", "--json"]
    code, text, err = run(capsys, *args)
    assert code == 0, err
    made = json.loads(text)
    for part in made:
        errors = [error for case in part["check"]["relative_error"].values() for error in case.values()]
        assert max(errors) < part["check"]["limit"]
    graphs = {part["component"]: onnx.load(part["file"], load_external_data=False).graph for part in made}
    assert list(graphs) == ["unet.prompt", "unet.time", "unet.step"]
    given = [value.name for value in graphs["unet.step"].input]
    handed_on = [value.name for name in ("unet.time", "unet.prompt") for value in graphs[name].output]
    assert given == ["sample", *handed_on]
    assert "Gemm" not in {
        node.op_type for node in graphs["unet.step"].node
    }  # which the time's projections are


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["--component", "transformer"],
            r"has no component transformer; it has text_encoder, unet, vae_decoder,",
        ),
        (["--passes", "dead-code,speed"], r"there is no pass speed; there are constant-folding, "),
    ],
)
def test_what_is_refused(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    why: str,
) -> None:
    code, out, err = run(capsys, tiny("sd15"), "-o", tmp_path / "out", *options)
    assert (code, out) == (1, "")
    assert err.startswith("latentrt: ")
    assert why in err
    assert not (tmp_path / "out").exists()


def content(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("options", [["--component", TEXT], []], ids=["one", "all"])
def test_a_checkpoint_is_not_exported_over_itself(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    model = Path(shutil.copytree(tiny("sd15"), tmp_path / "model"))
    before = content(model)
    code, out, err = run(capsys, model, "-o", model, *options)
    assert (code, out) == (1, "")
    found = "config.json, model.safetensors"
    assert f"{model / TEXT} is no earlier export: it holds {found}; write to another folder" in err
    assert content(model) == before


def test_an_export_hidden_by_a_killed_process_is_restored(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / f".{TEXT}.old").mkdir()
    (tmp_path / f".{TEXT}.old" / "model.onnx").write_text("of before")

    def fail(*_: object) -> None:
        raise ExportError("it is wrong")

    monkeypatch.setattr(folder, "export_checked", fail)
    assert run(capsys, tiny("sd15"), "-o", tmp_path, "--component", TEXT)[0] == 1
    assert content(tmp_path) == {".latentrt.lock": b"", f"{TEXT}/model.onnx": b"of before"}


def test_waiting_for_another_export_is_said(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = FileLock(tmp_path / ".latentrt.lock")
    held.acquire()
    told: list[str] = []

    def warning(text: str, *values: object) -> None:
        told.append(text % values)
        held.release()

    monkeypatch.setattr(cache._log, "warning", warning)
    monkeypatch.setattr(folder, "export_checked", lambda *_: ([], {}))
    list(folder.export_model(str(tiny("sd15")), tmp_path, dtype=torch.float32, components=[TEXT]))
    assert told == [f"waiting for another process, which is exporting to {tmp_path}"]


@pytest.mark.parametrize(
    ("failure", "status", "told"),
    [(ExportError("it is wrong"), 1, "it is wrong"), (KeyboardInterrupt(), 130, "interrupted")],
    ids=["check", "ctrl-c"],
)
def test_a_failure_leaves_what_was_there(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    status: int,
    told: str,
) -> None:
    (tmp_path / TEXT).mkdir()
    (tmp_path / TEXT / "model.onnx").write_text("of before")
    (tmp_path / f".{TEXT}.partial").mkdir()  # of a run that was killed

    def fail(*_: object) -> None:
        assert (tmp_path / f".{TEXT}.partial" / "model.onnx").exists()
        raise failure

    monkeypatch.setattr(check, "check_export", fail)
    code, _, err = run(capsys, tiny("sd15"), "-o", tmp_path, "--component", TEXT)
    assert code == status
    assert told in err
    assert (tmp_path / TEXT / "model.onnx").read_text() == "of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".latentrt.lock", TEXT]
