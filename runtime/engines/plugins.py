"""The project's Triton kernels as TensorRT plugins (IPluginV3), for both products.

A node of the domain `latentrt` becomes a plugin where a creator of its type is registered while its model is parsed,
and its function's standard operators where none is: see `export.functions`. So plugins are switched by operator, over
the same ONNX file. They are off unless asked for: nobody has measured them.

| | while an engine is built | in an engine that runs |
| --- | --- | --- |
| created from | the node's attributes; kernels come from `export.plugin_kernels` | what the engine holds |
| shapes, dtypes, formats, workspace | told to the builder | |
| serialised | attributes and kernels, for every architecture of the engine | |
| launched | where the builder times it (TensorRT) | on the engine's stream, by the CUDA driver |

Kernels are loaded and the numbers of a launch are worked out when a context is made or its shapes change; enqueue
puts pointers in place and launches, allocates nothing, and can be captured in a CUDA graph. Nothing here imports
torch or triton. On a GPU this has never run.

Tensors are taken in their plain order only: TensorRT's linear format, q, k and v contiguous. Every node holds its own
copy of its kernels: TensorRT asks each for what to keep, more than once, and not every answer ends up in the engine.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BackendError, RequestError
from ..sha256 import digest_of_files
from .plugin_code import Code, Prepared, driver
from .plugin_launch import DTYPES, OPERATORS, Operator

__all__ = [
    "AOT_ATTENTION",
    "NAMESPACE",
    "PluginCalls",
    "building",
    "failures",
    "formats",
    "loading",
    "parse_plugins",
    "versions",
]

NAMESPACE, _VERSION = "latentrt", "1"
"""Namespace and version of the exported nodes."""

AOT_ATTENTION = "DotProductAttention:aot"
"""The plugin that is compiled into an engine of TensorRT, which then needs no Python: `export.quick_plugins`."""

_FORMAT = "1"
"""Format of the serialised data. Engines of another format are refused."""

_PACKAGE = Path(__file__).resolve().parents[2]
# The kernels and the code that chooses, compiles and launches them: a change in any makes cached engines stale.
_SOURCES = (
    "kernels/_attention_triton.py",
    "kernels/_attention_softmax.py",
    "kernels/_attention_aot.py",
    "kernels/_dispatch.py",
    "kernels/_group_norm_triton.py",
    "kernels/_triton.py",
    "kernels/aot.py",
    "kernels/binaries.py",
    "kernels/tuned",
    "kernels/tuning.py",
    "runtime/engines/plugins.py",
    "runtime/engines/plugin_code.py",
    "runtime/engines/plugin_launch.py",
    "export/plugin_kernels.py",
    "export/quick_plugins.py",
)


def parse_plugins(text: str) -> tuple[str, ...]:
    """The plugins that "all", "none" or a list such as "GroupNorm,DotProductAttention" names, sorted.

    Raises:
        RequestError: there is none of a name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(sorted(OPERATORS))
    if names == ["none"]:
        return ()
    unknown = [name for name in names if name not in (*OPERATORS, AOT_ATTENTION)]
    if unknown or not names:
        raise RequestError(
            f"there is no plugin {', '.join(map(repr, unknown)) or repr(text)}; there are {', '.join(OPERATORS)}, "
            f"and all or none; for TensorRT also {AOT_ATTENTION}"
        )
    if {AOT_ATTENTION, AOT_ATTENTION.partition(":")[0]} <= set(names):
        raise RequestError(f"{text!r} names two plugins for one operator; name one of them")
    return tuple(sorted(set(names)))


def versions(names: Sequence[str]) -> dict[str, str]:
    """Each plugin's version with a digest of what its kernels are made of: part of an engine's key."""
    return dict.fromkeys(names, f"{_FORMAT}-{_digest()}")


def formats(of: Mapping[str, str]) -> dict[str, str]:
    """What of such versions decides whether an engine that has the plugins can be loaded."""
    return {name: version.partition("-")[0] for name, version in of.items()}


@cache
def _digest() -> str:
    files: list[Path] = []
    for source in _SOURCES:
        path = _PACKAGE / source
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    try:
        compiler = metadata.version("triton")
    except metadata.PackageNotFoundError:
        compiler = "no triton"
    return hashlib.sha256(f"{digest_of_files(files, _PACKAGE)} {compiler}".encode()).hexdigest()[:12]


@dataclass
class PluginCalls:
    """What the plugins of one build were called for, and what they choked on.

    Attributes:
        kernels: files of `kernels.binaries`, by key and architecture.
        counts: by plugin, how often it was created, configured and serialised.
        failures: why a plugin refused.
    """

    kernels: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _read: dict[str, Code] = field(default_factory=dict)

    def files(self, key: str) -> Mapping[int, Path]:
        """The kernels of that key, else those for any number of attention keys: they are compiled from the model, which
        does not say a number that only the engine's sizes fix."""
        return self.kernels.get(key) or self.kernels.get(key.replace(" short=1", " short=0"), {})

    def code(self, key: str) -> Code:
        """These kernels, read once: many nodes share them."""
        if key not in self._read:
            files = self.files(key)
            if not files:
                raise BackendError(f"no kernels were compiled for {key}")
            self._read[key] = Code.of({arch: path.read_bytes() for arch, path in files.items()})
        return self._read[key]

    @contextmanager
    def watching(self, who: str, *, swallow: bool = False) -> Iterator[None]:
        """Remember what is raised: TensorRT catches it and does not say what it was.

        Raised while an engine is built it may end the process (TensorRT for RTX 1.7, `configure_plugin`) or be passed
        over (`get_fields_to_serialize`), so there it is swallowed, and who builds looks at `failures`.
        """
        try:
            yield
        except Exception as error:
            self.failures.append(f"{who}: {error}")
            if not swallow:
                raise


@contextmanager
def building(
    trt: Any, names: Sequence[str], kernels: Mapping[str, Mapping[int, Path]]
) -> Iterator[PluginCalls]:
    """Parsers and builders of this process take these plugins meanwhile, but for `AOT_ATTENTION`."""
    calls = PluginCalls(kernels, {name: Counter() for name in names})
    registry = trt.get_plugin_registry()
    creators = [_creator(trt, OPERATORS[name], calls) for name in names if name != AOT_ATTENTION]
    try:
        for creator in creators:
            if not registry.register_creator(creator, NAMESPACE):
                raise BackendError(f"the plugin {creator.name} is registered already")
        yield calls
    finally:
        for creator in creators:
            registry.deregister_creator(creator)


_loaded: dict[tuple[int, str], tuple[Any, PluginCalls]] = {}
_loading = threading.Lock()


def loading(trt: Any, wanted: Mapping[str, str]) -> None:
    """From now on engines with these plugins (by name, their versions) can be deserialised.

    Raises:
        BackendError: one of them is not in this latentrt.
    """
    for name, built_format in formats(wanted).items():
        if name == AOT_ATTENTION:
            continue  # it is all in the engine
        if name not in OPERATORS or built_format != _FORMAT:
            have = f"it in version {_FORMAT}" if name in OPERATORS else f"only {', '.join(OPERATORS)}"
            raise BackendError(
                f"its engine was built with the plugin {name} {wanted[name]}, and this latentrt has {have}; build it "
                "again with `latentrt build`, or use the latentrt that built it"
            )
        key = (id(trt), name)
        with _loading:
            if key not in _loaded:
                calls = PluginCalls(counts={name: Counter()})
                creator = _creator(trt, OPERATORS[name], calls)
                trt.get_plugin_registry().register_creator(creator, NAMESPACE)
                _loaded[key] = creator, calls  # TensorRT keeps no creator alive


def failures(trt: Any) -> list[str]:
    """Why plugins of loaded engines refused since this was last asked."""
    found: list[str] = []
    for (module, _), (_, calls) in list(_loaded.items()):
        if module == id(trt):
            found += calls.failures
            calls.failures.clear()
    return found


def _creator(trt: Any, operator: Operator, calls: PluginCalls) -> Any:
    plugin = _plugin_class(trt, operator, calls)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.name = operator.name
            self.plugin_namespace = NAMESPACE
            self.plugin_version = _VERSION
            field_types = {int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}
            empty = [
                trt.PluginField(name, b"", field_types[value_type])
                for name, value_type in operator.attributes.items()
            ]
            self.field_names = trt.PluginFieldCollection(empty)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {field.name: field for field in fields}
            if phase == trt.TensorRTPhase.BUILD:
                made = None  # with which the parser rejects the node
                with calls.watching(f"{operator.name} of {name}", swallow=True):
                    given = {n: value_type(found[n].data[0]) for n, value_type in operator.attributes.items()}
                    made = plugin(given, Code())
                    calls.counts[operator.name]["created"] += 1
                return made
            with calls.watching(operator.name):
                code = Code.from_bytes(_content(found["kernels"]))
                return plugin(json.loads(_content(found["attributes"])), code)

    return Creator()


def _content(field: Any) -> bytes:
    return np.asarray(field.data).astype(np.int8).tobytes()


def _plugin_class(trt: Any, operator: Operator, calls: PluginCalls) -> Any:
    names = {getattr(trt, name): name for name in DTYPES}

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, attributes: Mapping[str, Any], code: Code) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = operator.name
            self.plugin_namespace = NAMESPACE
            self.plugin_version = _VERSION
            self.num_outputs = 1
            self._attributes = attributes
            self._code = code
            self._launches: list[Prepared] = []
            self._fields: list[Any] = []

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self._attributes, self._code)

        # --- while an engine is built

        def get_output_data_types(self, inputs: Any) -> Any:
            return [inputs[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, build: Any) -> Any:
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, position: int, tensors: Any, num_inputs: int) -> bool:
            here, first = tensors[position].desc, tensors[0].desc
            return here.format == trt.TensorFormat.LINEAR and here.type == first.type and first.type in names

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            shapes = [tuple(x.desc.dims) for x in inputs]
            calls.counts[operator.name]["configured"] += 1
            with calls.watching(f"{operator.name} of {shapes}", swallow=True):
                if len(shapes) != operator.inputs:
                    raise BackendError(f"{len(shapes)} inputs, and it takes {operator.inputs}")
                self._code = calls.code(operator.key(names[inputs[0].desc.type], shapes, self._attributes))

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            shapes = [tuple(x.max) for x in inputs]
            # The same for every architecture; none where there are no kernels, of which `failures` tells.
            constants = next(iter(self._code.constants.values()), None)
            return 0 if constants is None else operator.most_workspace(shapes, self._attributes, constants)

        # --- in an engine

        def get_fields_to_serialize(self) -> Any:
            calls.counts[operator.name]["serialized"] += 1
            content = {
                "attributes": json.dumps(self._attributes).encode(),
                "kernels": self._code.packed,
            }
            # As numbers of one byte, of which any number may be zero; TensorRT reads them after this has returned.
            self._fields = [
                trt.PluginField(name, np.frombuffer(data, np.int8), trt.PluginFieldType.INT8)
                for name, data in content.items()
            ]
            return trt.PluginFieldCollection(self._fields)

        def attach_to_context(self, context: Any) -> Any:
            with calls.watching(operator.name):
                driver().load(self._code)  # before any graph is captured
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            """There is one only; but a plugin without this method ends the engine."""

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            shapes = [tuple(x.dims) for x in inputs]
            with calls.watching(f"{operator.name} of {shapes}"):
                cuda = driver()
                constants, cubins = self._code.of_arch(cuda.arch())
                plan = operator.plan(shapes, self._attributes, constants)
                self._launches = [
                    Prepared(launch, cubins[launch.role], cuda.function(cubins[launch.role]))
                    for launch in plan.launches
                ]

        def enqueue(
            self, inputs: Any, outputs: Any, sources: Any, results: Any, workspace: int, stream: int
        ) -> None:
            with calls.watching(operator.name):
                for launch in self._launches:
                    launch(driver(), sources, results, workspace, stream)

    return Plugin
