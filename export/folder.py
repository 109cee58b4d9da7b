"""A checkpoint's components as ONNX files in a folder: what `latentrt export` does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..errors import ExportError, RequestError
from ..runtime.cache import locked, no_room
from ..runtime.engines.onnxruntime import OnnxRuntimeBackend
from ..runtime.engines.split import in_parts
from ..runtime.loading import load_components, select_components
from ..runtime.place import dtype_name
from ..runtime.weights import open_checkpoint
from .check import export_checked
from .passes import DEFAULT, Report, check_names

__all__ = ["Exported", "export_model"]

_MODEL = "model.onnx"
_FILES = {_MODEL, f"{_MODEL}.data"}  # of a component
_LISTED = 3  # outputs whose errors are told, and files that are in the way


@dataclass(frozen=True)
class Exported:
    """One component.

    Attributes:
        file: its model; the weights lie beside it, in a file of its name with `.data` at the end.
        passes: what each pass did.
        check: the errors that ONNX Runtime makes beside PyTorch, and their limit; empty in bfloat16, which ONNX
            Runtime does not run on the CPU.
        seconds: from reading the weights to the end of the check.
    """

    component: str
    dtype: str
    file: Path
    passes: list[Report]
    check: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "component": self.component,
            "dtype": self.dtype,
            "file": str(self.file),
            "passes": [report.to_json() for report in self.passes],
            "check": self.check,
            "seconds": round(self.seconds, 3),
        }

    def to_text(self) -> str:
        """A report: where it is, a table of what each pass left, and how far it is from PyTorch."""
        lines = [f"{self.component}, {self.dtype}, {self.seconds:.1f} s: {self.file}"]
        lines.append(f"    {'':<20}{'nodes':>16}{'initialisers':>18}{'bytes':>30}")
        for report in self.passes:
            pairs = zip(astuple(report.before), astuple(report.after), strict=True)
            nodes, initializers, size = (f"{a:,} > {b:,}" if a != b else f"{a:,}" for a, b in pairs)
            lines.append(f"    {report.name:<20}{nodes:>16}{initializers:>18}{size:>30}")
        for sizes, errors in self.check.get("relative_error", {}).items():
            worst = sorted(errors.items(), key=lambda named: -named[1])[:_LISTED]
            found = ", ".join(f"{name} {error:.1e}" for name, error in worst)
            others = f" and less in {len(errors) - _LISTED} others" if len(errors) > _LISTED else ""
            lines.append(f"    off PyTorch by {found}{others} at {sizes}")
        return "\n".join(lines)


def export_model(
    model: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    components: Sequence[str] = (),
    passes: Sequence[str] = DEFAULT,
    split: bool = False,
    variant: str | None = None,
) -> Iterator[Exported]:
    """Write `folder/NAME/model.onnx` for each component, telling of each as it is there.

    A component's folder is written aside and renamed once its check has passed, in place of an earlier export.

    Args:
        model: as `Pipeline.from_pretrained` takes it.
        dtype: of the weights and activations. A VAE that overflows in float16 stays in float32.
        components: only these; all by default.
        passes: names of `passes.PASSES`, in order.
        split: a UNet as its parts, `unet.prompt`, `unet.time` and `unet.step`: see `runtime.engines.split`.
        variant: of the weight files.

    Raises:
        RequestError: there is no such component or pass, or a component's folder holds what no export wrote.
        CheckpointError, ExportError: what each says, a full disk included.
        OSError: the folder cannot be written.
    """
    check_names(passes)
    # ONNX Runtime checks each export.
    found = load_components(open_checkpoint(model, variant=variant), dtype, upcast=OnnxRuntimeBackend.upcast)
    named = select_components(found, components, model).values()
    wanted = [part for whole in named for part in (in_parts(whole) if split else (whole,))]
    for component in wanted:
        _refuse_others(folder / component.name)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(FileLock(folder / ".latentrt.lock"), f"exporting to {folder}"):
        for component in wanted:
            _restore(folder / component.name)
        for component in wanted:
            name = component.name
            begun = time.perf_counter()
            aside = folder / f".{name}.partial"
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            aside.mkdir()
            try:
                reports, check = export_checked(component, aside / _MODEL, passes)
                _replace(aside, folder / name)
            except OSError as error:
                if full := no_room(error):
                    raise ExportError(
                        f"{full} while writing {name} to {folder} ({error}); free some, or write to another folder"
                    ) from error
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            yield Exported(
                name,
                dtype_name(component.dtype),
                folder / name / _MODEL,
                reports,
                check,
                time.perf_counter() - begun,
            )


def _refuse_others(target: Path) -> None:
    """Only an earlier export is replaced: a checkpoint has folders of the components' names too."""
    if not target.exists():
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    if others := sorted(found - _FILES):
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        raise RequestError(
            f"{target} is no earlier export: it holds {', '.join(others[:_LISTED])}{more}; write to another folder"
        )


def _replace(aside: Path, target: Path) -> None:
    """Rename a whole folder, which may take the place of another; that one is seen whole until then."""
    old = _aside(target)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _restore(target: Path) -> None:
    """Undo what a run that was killed did of `_replace`."""
    old = _aside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
