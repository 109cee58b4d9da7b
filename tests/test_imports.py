"""The architecture, held: who may import whom, what stays unloaded, and that every folder is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "runtime", "export", "bench")
ALLOWED = {
    "errors": set(),
    "kernels": {"errors", "kernels"},
    "runtime": {"errors", "kernels", "runtime"},
    "export": {"errors", "kernels", "runtime", "export"},
    "bench": {"errors", "kernels", "runtime", "export", "bench", "__init__"},
    "cli": {"errors", "kernels", "runtime", "export", "bench", "__init__"},
}
# The one place in runtime that calls export: where a model is prepared and its cache lacks it.
EXCEPTIONS = {("runtime/prepare.py", "export")}


def sources() -> list[Path]:
    inside = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    return [ROOT / "errors.py", ROOT / "cli.py", ROOT / "__init__.py", *inside]


def imported(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, the project's own under `latentrt.`."""
    package = ["latentrt", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str | None:
    """`latentrt.runtime.vae` -> `runtime`; None for what is not the project's."""
    pieces = name.split(".")
    if pieces[0] != "latentrt":
        return None
    return pieces[1] if len(pieces) > 1 else None


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    here = relative.parts[0].removesuffix(".py")
    if here == "__init__":
        return
    reached = {part for name in imported(path) if (part := part_of(name)) is not None}
    known = {*FOLDERS, "errors", "cli"}
    reached = {part for part in reached if part in known}
    excused = {part for file, part in EXCEPTIONS if file == relative.as_posix()}
    assert reached <= ALLOWED[here] | excused


@pytest.mark.parametrize("folder", ["kernels", "runtime", "export"])
def test_the_library_never_imports_diffusers(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"diffusers", "transformers"}, path


def test_the_rule_itself_sees_a_wrong_arrow(tmp_path: Path) -> None:
    file = ROOT / "kernels" / "__init__.py"
    names = {part_of(n) for n in imported(file)}
    assert "kernels" in names  # relative imports are resolved, or the rule above would pass on anything


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'onnx', 'PIL'}"
    assert run(f"import sys, latentrt, latentrt.cli; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_unknown_names_say_what_there_is() -> None:
    import latentrt

    with pytest.raises(AttributeError, match=r"no attribute 'Pipelin'; it has .*Pipeline"):
        _ = latentrt.Pipelin
    assert set(latentrt.__all__) == {
        "AsyncEngine",
        "ImageRequest",
        "Pipeline",
        "PipelineOutput",
        "__version__",
    }
    assert all(getattr(latentrt, name) is not None for name in latentrt.__all__)


def test_every_package_is_declared() -> None:
    """A folder missing from pyproject's list would be missing from every wheel."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(["latentrt", *p.parent.relative_to(ROOT).parts])
        for folder in FOLDERS
        for p in (ROOT / folder).rglob("__init__.py")
    }
    assert set(declared) == found | {"latentrt"}
