"""`runtime/engines/plugins.py`: plugins by name, what their versions follow, that each is registered once."""

from __future__ import annotations

import re

import pytest
import tensorrt_rtx_bindings as rtx
from latentrt.errors import BackendError, RequestError
from latentrt.runtime.engines import plugins
from latentrt.runtime.engines.plugin_launch import OPERATORS


def test_choosing() -> None:
    assert plugins.parse_plugins("none") == ()
    assert plugins.parse_plugins("all") == tuple(sorted(OPERATORS))
    assert plugins.parse_plugins(" GroupNormSilu,GroupNorm, GroupNorm") == ("GroupNorm", "GroupNormSilu")
    with pytest.raises(RequestError, match=r"no plugin 'Geglu'; there are GroupNorm, .* and all or none"):
        plugins.parse_plugins("GroupNorm,Geglu")


def test_a_version_follows_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = plugins.versions(["GroupNorm"]).values()
    monkeypatch.setattr(plugins, "_SOURCES", plugins._SOURCES[1:])
    plugins._digest.cache_clear()
    (after,) = plugins.versions(["GroupNorm"]).values()
    assert before != after
    assert before.partition("-")[0] == after.partition("-")[0] == "1"
    assert all((plugins._PACKAGE / source).exists() for source in plugins._SOURCES)


def test_every_module_of_a_plugin_s_kernels_counts() -> None:
    """Those that its kernels' modules import, too; plugins run no attention by TMA or by PyTorch's libraries."""
    listed = [source for source in plugins._SOURCES if source.startswith("kernels/_")]
    imported = {
        f"kernels/{name}.py"
        for source in listed
        for name in re.findall(r"^from \.(_\w+) import", (plugins._PACKAGE / source).read_text("utf-8"), re.M)
    }
    assert imported - set(listed) <= {"kernels/_attention_tma.py", "kernels/_attention_library.py"}


@pytest.mark.parametrize(
    ("name", "version", "why"),
    [
        ("Geglu", "1-abc", r"plugin Geglu 1-abc, and this latentrt has only GroupNorm, .*; build it again"),
        (
            "GroupNorm",
            "2-abc",
            r"plugin GroupNorm 2-abc, and this latentrt has it in version 1; build it again",
        ),
    ],
)
def test_a_plugin_that_is_missing(name: str, version: str, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        plugins.loading(rtx, {name: version})


def test_loading_registers_once() -> None:
    registry = rtx.get_plugin_registry()
    plugins.loading(rtx, {"GroupNorm": "1-x"})
    plugins.loading(rtx, {"GroupNorm": "1-y"})
    try:
        found = registry.get_creator("GroupNorm", "1", "latentrt")
        assert found is plugins._loaded[id(rtx), "GroupNorm"][0]
    finally:  # for tests that register their own
        registry.deregister_creator(plugins._loaded.pop((id(rtx), "GroupNorm"))[0])
