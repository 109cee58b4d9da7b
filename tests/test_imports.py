"""The architecture: who may import whom, what stays unloaded, and that every folder is packaged.

Import statements are read, at any depth; what `importlib.import_module` loads (engines of the registry, the commands of
the command line, `_LAZY` names) is not seen.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
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
    "bench": {"errors", "kernels", "runtime", "export", "bench"},
    "cli": {"errors", "kernels", "runtime", "export", "bench"},
}
# The one place in runtime that calls export: where a model is prepared and its cache lacks it.
EXCEPTIONS = {("runtime/prepare.py", "export")}


def sources() -> list[Path]:
    inside = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    return [ROOT / "errors.py", ROOT / "cli.py", ROOT / "__init__.py", *inside]


def imported(path: Path, text: str | None = None) -> Iterator[str]:
    """Absolute names of what a file imports, the project's own under `latentrt.`; of `text`, were that its content."""
    package = ["latentrt", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8") if text is None else text)):
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


def reached(path: Path, text: str | None = None) -> set[str]:
    """Parts of the project that a file imports."""
    known = {*FOLDERS, "errors", "cli"}
    return {part for name in imported(path, text) if (part := part_of(name)) in known}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    here = relative.parts[0].removesuffix(".py")
    if here == "__init__":
        return
    excused = {part for file, part in EXCEPTIONS if file == relative.as_posix()}
    assert reached(path) <= ALLOWED[here] | excused


@pytest.mark.parametrize(
    "line",
    [
        "from ..runtime import vae",
        "import latentrt.bench.run",
        "from latentrt.export import onnx",
        "from .. import cli",
        "def f():\n    from ..export.check import checked",
    ],
)
def test_a_wrong_import_is_found(line: str) -> None:
    assert not reached(ROOT / "kernels" / "geglu.py", line) <= ALLOWED["kernels"]


def test_every_exception_is_needed() -> None:
    for file, part in EXCEPTIONS:
        assert part in reached(ROOT / file)


@pytest.mark.parametrize("folder", ["kernels", "runtime", "export"])
def test_the_library_never_imports_diffusers(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"diffusers", "transformers"}, path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


HEAVY = "{'torch', 'numpy', 'diffusers', 'transformers', 'onnx', 'PIL'}"


def test_import_loads_nothing_heavy() -> None:
    assert run(f"import sys, latentrt, latentrt.cli; print(sorted({HEAVY} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["bench", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """So that it answers at once on any machine."""
    code = f"""
        import sys
        from latentrt.cli import main
        try:
            main({arguments})
        except SystemExit as ended:
            print(ended.code, sorted({HEAVY} & set(sys.modules)))
        """
    shown = run(textwrap.dedent(code)).splitlines()
    assert shown[0].startswith("usage: latentrt")
    assert shown[-1] == "0 []"


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


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_test_that_is_named_exists(document: str) -> None:
    """Also by a pattern: `test_cache*.py`, `test_<name>_triton.py`."""
    text = (ROOT / document).read_text("utf-8")
    for name in set(re.findall(r"\btest_[a-z0-9_<>*]+\.py", text)):
        assert any((ROOT / "tests").rglob(re.sub("<[a-z]+>", "*", name))), name
