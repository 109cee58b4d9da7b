"""`runtime/engines/plugins.py`: engines with plugins on a GPU: against the same without, against PyTorch, in a CUDA
graph, and without PyTorch.

Never run yet: written without a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engine_checks import assert_replays, inputs
from latentrt.export.measures import relative_error
from latentrt.runtime.engines import plugins
from latentrt.runtime.engines.base import Component, Engine
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.engines.tensorrt import TensorRTBackend, TensorRTRTXBackend
from tolerances import ENGINE_FLOAT16

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

BACKENDS = {"tensorrt": TensorRTBackend, "tensorrt-rtx": TensorRTRTXBackend}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module", params=[*BACKENDS])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    found = BACKENDS[request.param]().availability(torch.device("cuda"), torch.float16)
    if not found.ok:
        pytest.skip(f"{request.param}: {found.reason}; {found.remedy}")
    return request.param, tmp_path_factory.mktemp(request.param)


def load(cache: tuple[str, Path], demo_unet: Component, device: torch.device, text: str) -> Engine:
    backend = BACKENDS[cache[0]](with_plugins=plugins.parse_plugins(text))
    return backend.load(demo_unet, device=device, cache_dir=cache[1])


@pytest.mark.parametrize("text", ["all", *plugins.parse_plugins("all")])
def test_with_plugins_as_without_and_as_pytorch(
    text: str, cache: tuple[str, Path], demo_unet: Component, device: torch.device
) -> None:
    eager = EagerBackend().load(demo_unet, device=device, cache_dir=None)
    engine, plain = (load(cache, demo_unet, device, names) for names in (text, "none"))
    assert engine.entry != plain.entry
    for which in (0, 1, 0):
        x = inputs(demo_unet, device, which)
        got = engine(x)["prediction"]
        assert relative_error(got, eager(x)["prediction"]) < ENGINE_FLOAT16
        assert relative_error(got, plain(x)["prediction"]) < ENGINE_FLOAT16


def test_it_is_captured_and_replayed(
    cache: tuple[str, Path], demo_unet: Component, device: torch.device
) -> None:
    assert_replays(load(cache, demo_unet, device, "all"), demo_unet, device)


WITHOUT_TORCH = textwrap.dedent("""
    import ctypes, json, sys
    for name in ("torch", "triton", "onnx"):
        sys.modules[name] = None  # importing it fails
    import numpy as np
    from latentrt.runtime.engines import plugins, products

    product, plan, names, source, target = sys.argv[1:]
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        code = getattr(cuda, name)(*arguments)
        assert code == 0, (name, code)

    def memory(size):
        address = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 256)))
        return address

    context = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    stream = ctypes.c_void_p()
    call("cuStreamCreate", ctypes.byref(stream), 1)
    trt = products.load(products.product(product))
    plugins.loading(trt, json.loads(names))
    log = products.logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(open(plan, "rb").read())
    assert engine is not None, log.why()
    run = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    run.set_optimization_profile_async(0, stream.value)
    for name, x in np.load(source).items():
        held = memory(x.nbytes)
        call("cuMemcpyHtoD_v2", held, x.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(x.nbytes))
        run.set_tensor_address(name, held.value)
        run.set_input_shape(name, x.shape)
    run.infer_shapes()
    out = np.empty(tuple(run.get_tensor_shape("prediction")), np.float16)
    held = memory(out.nbytes)
    run.set_tensor_address("prediction", held.value)
    size = run.update_device_memory_size_for_shapes()
    run.set_device_memory(memory(size).value, size)
    assert run.execute_async_v3(stream.value), (log.why(), plugins.failures(trt))
    call("cuStreamSynchronize", stream)
    call("cuMemcpyDtoH_v2", out.ctypes.data_as(ctypes.c_void_p), held, ctypes.c_size_t(out.nbytes))
    np.save(target, out)
""")


def test_it_runs_where_torch_and_triton_are_not(
    cache: tuple[str, Path], demo_unet: Component, device: torch.device, tmp_path: Path
) -> None:
    engine = load(cache, demo_unet, device, "all")
    assert engine.entry is not None
    x = inputs(demo_unet, device, 0)
    wanted = engine(x)["prediction"].cpu()
    np.savez(tmp_path / "x.npz", **{name: value.cpu().numpy() for name, value in x.items()})
    names = json.dumps(plugins.versions(plugins.parse_plugins("all")))
    files = (str(engine.entry / "model.plan"), names, str(tmp_path / "x.npz"), str(tmp_path / "y.npy"))
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, cache[0], *files], check=True, timeout=300)
    assert relative_error(torch.from_numpy(np.load(tmp_path / "y.npy")), wanted) < ENGINE_FLOAT16
