"""`kernels/registry.py`, `tuning.py` and `roofline.py`: what the registry says of each operator, the data of block
sizes, rooflines, and the command that shows them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_configs import sdxl
from latentrt import cli
from latentrt.errors import RequestError
from latentrt.kernels import aot, as_nodes, registry, roofline, tuning
from latentrt.kernels._triton import Launch
from latentrt.kernels.registry import Case, OpSpec, allowed_error, specs
from latentrt.runtime.engines.packing import defer_biases
from latentrt.runtime.models.unet import UNet, UNetConfig
from latentrt.runtime.models.vae import VAEConfig, VAEDecoder
from tolerances import KERNEL_ULPS, KERNEL_VERSUS_REFERENCE
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
ATTENTION = specs(["attention"])[0]
HALF = torch.float16


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("spec", specs(), ids=lambda s: s.name)
def test_every_case_is_planned_for_every_architecture(spec: OpSpec, arch: int) -> None:
    """On the meta device: the data have block sizes, and every parameter of every kernel is given."""
    for case in spec.cases:
        for dtype in (torch.float16, torch.float32):
            args = case.inputs(dtype, torch.device("meta"))
            out, steps = spec.plan(*args, arch=arch)
            assert steps
            for launch in (step for step in steps if isinstance(step, Launch)):
                types, values, _ = aot.signature(launch)
                assert set(values) <= set(types)
                assert set(launch.args) | set(launch.constants) == set(types), launch.kernel
            got = out if isinstance(out, torch.Tensor) else out[0]
            want = spec.op(*args)
            assert got.shape == (want if isinstance(want, torch.Tensor) else want[0]).shape


def test_the_work_of_self_attention() -> None:
    """Two matmuls of 4096 x 4096 x 64 for each of 10 heads of 2 images; q, k, v and the result once."""
    case = ATTENTION.cases[0]
    assert case.flops == 2 * (2 * 4096 * 4096 * 64) * 10 * 2
    assert case.elements == 4 * 2 * 4096 * 640
    h200 = roofline.gpu("h200")
    assert roofline.floor_us(case, HALF, h200) == pytest.approx(case.flops / 790e12 * 1e6)
    traffic = Case("all traffic", case.inputs, flops=0, elements=1_000_000)
    assert roofline.floor_us(traffic, HALF, h200) == pytest.approx(2e6 / 4.3e12 * 1e6)


def test_the_work_of_a_sampler_step() -> None:
    """The model's two outputs in its dtype; float32 are latents, noise and three of history, some read and written."""
    case, rescaled = specs(["sampler_step"])[0].cases
    assert case.nbytes(HALF) == rescaled.nbytes(HALF)
    x, out, history, noise, *_ = case.inputs(HALF, torch.device("meta"))
    assert case.nbytes(HALF) == 2 * x.nbytes + out.nbytes + 2 * history.nbytes + noise[0].nbytes


def test_every_operator_is_held_to_the_tests_tolerance() -> None:
    """What is timed on a GPU passes the same gate as in the tests, which nothing loosens on the way."""
    assert (registry.TIMES_REFERENCE, registry.ULPS) == (KERNEL_VERSUS_REFERENCE, KERNEL_ULPS)
    exact, off = torch.tensor([1.0, 1.5]).double(), torch.tensor([1.0, 1.5 + 2**-9])
    assert allowed_error(off, exact) == 2 * 2**-9
    assert allowed_error(exact.half(), exact) == 2 * 2**-10
    assert allowed_error(torch.zeros(2), torch.zeros(2).double()) == 0


class Calls(TorchDispatchMode):
    """Counts calls of the operators, by name and shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "latentrt":
            self.found[func.__name__.partition(".")[0], shapes(args)] += 1
        return func(*args, **(kwargs or {}))


def shapes(args: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))


def test_the_cases_are_what_sdxl_calls() -> None:
    """At 1024x1024: one forward of the base UNet with guidance, and one of the VAE's decoder, as the back end triton
    lays them out."""
    with META, torch.no_grad(), as_nodes(), Calls() as calls:
        unet = UNet(UNetConfig.from_dict(sdxl("base", "unet")))
        decoder = VAEDecoder(VAEConfig.from_dict(sdxl("base", "vae")))
        defer_biases(unet)
        defer_biases(decoder)
        sizes = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        unet(torch.empty(2, 4, 128, 128), torch.empty(2), torch.empty(2, 77, 2048), **sizes)
        decoder(torch.empty(1, 4, 128, 128))
    known = {
        (spec.name, shapes(case.inputs(HALF, META))): case.calls
        for spec in specs()
        if spec.name != "sampler_step"
        for case in spec.cases
        if case.calls
    }
    assert known == calls.found


@pytest.mark.parametrize("name", ["group_norm", "group_norm_silu"])
def test_pytorchs_group_norm_is_also_timed_in_the_layout_that_it_computes_in(name: str) -> None:
    (spec,) = specs([name])
    x = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    args = (x, torch.randn(64), torch.randn(64), 32, 1e-5, torch.randn(2, 64))
    contiguous = {}
    for baseline, call in spec.baselines.items():
        own = spec.baseline_inputs.get(baseline, lambda *args: args)(*args)
        contiguous[baseline] = own[0].is_contiguous()
        torch.testing.assert_close(call(*own), spec.reference(*args))
    assert list(contiguous.values()) == [False, True]
    assert [baseline.endswith(", contiguous") for baseline in contiguous] == [False, True]


def test_the_work_of_a_forward() -> None:
    """Of the UNet with guidance, in half precision: what other ways to count it gave."""
    work = {spec.name: spec.cases for spec in specs()}
    flops = sum(case.flops * case.calls for case in work["attention"] if case.name.startswith("self"))
    assert flops == pytest.approx(2 * 0.75e12, rel=0.01)
    norms = [*work["group_norm"], *work["group_norm_silu"]]
    traffic = {
        vae: sum(c.nbytes(HALF) * c.calls for c in norms if c.name.startswith("VAE") == vae) for vae in (0, 1)
    }
    assert traffic[0] == pytest.approx(1.24e9, rel=0.01)
    assert traffic[1] == pytest.approx(11e9 * 2 / 3, rel=0.01)
    vae = sum(c.nbytes(HALF, cache=0) * c.calls for c in norms if c.name.startswith("VAE"))
    assert vae == pytest.approx(11e9, rel=0.01)  # each element is read twice


def test_what_the_cache_holds_is_read_once() -> None:
    large, small = (
        next(c for c in specs(["group_norm_silu"])[0].cases if c.name == name)
        for name in ("VAE 128 x 1024 x 1024", "1280 x 32 x 32")
    )
    once, l2 = 2 * 128 * 2**20, 50 * 2**20
    assert large.nbytes(HALF) == 2 * once
    assert large.nbytes(HALF, l2) == 3 * once - l2
    assert small.nbytes(HALF, l2) == small.nbytes(HALF)
    assert ATTENTION.cases[0].nbytes(HALF, 0) == ATTENTION.cases[0].nbytes(HALF)


def test_rooflines_refuse_what_they_do_not_know() -> None:
    with pytest.raises(RequestError, match=r"no ceilings are known for the GPU 'V100'; there are H200, "):
        roofline.gpu("V100")
    with pytest.raises(RequestError, match=r"float16 and bfloat16, not torch.float32"):
        roofline.floor_us(ATTENTION.cases[0], torch.float32, roofline.gpu("L4"))


def test_an_architecture_without_data_takes_the_nearest_older(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", logger="latentrt")
    for _ in range(2):
        assert tuning.constants("attention", 103, HALF, "d64") == tuning.constants(
            "attention", 100, HALF, "d64"
        )
    assert [r.getMessage() for r in caplog.records] == [
        "no tuned block sizes for sm_103; using those of sm_100"
    ]
    with pytest.raises(KeyError, match=r"tuned/sm_90.json has no attention 16/d63"):
        tuning.constants("attention", 90, HALF, "d63")


def test_saving_block_sizes_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.save(90, "one", {"16/b": {"BLOCK": 2}, "16/a": {"BLOCK": 1}})
    tuning.save(90, "two", {"16/a": {"BLOCK": 3}}, {"gpu": "G"})
    path = tuning.save(90, "one", {"16/b": {"BLOCK": 4}})
    assert json.loads(path.read_text()) == {
        "arch": 90,
        "measured_on": {"two": {"gpu": "G", "keys": ["16/a"]}},
        "tables": {"one": {"16/a": {"BLOCK": 1}, "16/b": {"BLOCK": 4}}, "two": {"16/a": {"BLOCK": 3}}},
    }
    assert tuning.constants("one", 90, HALF, "b") == {"BLOCK": 4}


def test_what_the_library_takes_the_place_of_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For who can launch nothing else; until a kernel is chosen again."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    first, second = ({"BLOCK": n, "num_warps": 4, "num_stages": 1} for n in (1, 2))
    tuning.save(90, "one", {"16/a": first})
    for _ in range(2):
        path = tuning.save(90, "one", {"16/a": tuning.LIBRARY})
        assert json.loads(path.read_text())["tables"]["one"] == {
            "16/a": {"LIBRARY": 1},
            "16/a-kernel": first,
        }
    tuning.save(90, "one", {"16/a": second})
    assert json.loads(path.read_text())["tables"]["one"] == {"16/a": second}


def plain(block: int) -> tuning.Row:
    return tuning.Row({"BLOCK": block}, 4, 1, tma=False, specialize=False)


def test_the_plain_row_beside_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    first, second, third = ({"BLOCK": n, "num_warps": 4, "num_stages": 1} for n in (1, 2, 3))
    tuning.save(90, "one", {"16/a": first})
    assert tuning.plain("one", 90, HALF, "a") == plain(1)
    tuning.save(90, "one", {"16/a": {**second, "TMA": 1}})
    assert tuning.plain("one", 90, HALF, "a") == plain(1)  # what it was before
    tuning.save(90, "one", {"16/a-kernel": third, "16/a": {**second, "TMA": 1}})
    assert tuning.plain("one", 90, HALF, "a") == plain(3)
    tuning.save(90, "one", {"16/a": tuning.LIBRARY})
    assert tuning.plain("one", 90, HALF, "a") == plain(3)
    with tuning.trying("one", {**second, "TMA": 1}) as asked:
        assert tuning.plain("one", 90, HALF, "a") == plain(2)
    assert asked == {"16/a"}


@pytest.mark.parametrize("options", [{"TMA": 1}, {"TMA": 1, "SPECIALIZE": 1}], ids=str)
def test_a_choice_is_what_the_tensors_can_be_launched_with(
    options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    first, second = ({"BLOCK": n, "num_warps": 4, "num_stages": 1} for n in (1, 2))
    described = tuning.Row({"BLOCK": 2}, 4, 1, tma=True, specialize="SPECIALIZE" in options)
    choice = partial(tuning.choice, "one", 90, HALF, "a")
    tuning.save(90, "one", {"16/a": first})
    assert choice(descriptors=True) == choice(descriptors=False) == plain(1)
    tuning.save(90, "one", {"16/a": {**second, **options}})
    assert (choice(descriptors=True), choice(descriptors=False)) == (described, plain(1))
    tuning.save(90, "one", {"16/a": tuning.LIBRARY})
    assert choice(descriptors=True) is choice(descriptors=False) is None
    with tuning.trying("one", {**second, **options}) as asked:
        assert (choice(descriptors=True), choice(descriptors=False)) == (described, plain(2))
    assert asked == {"16/a"}


@pytest.mark.parametrize("arch", tuning.architectures())
def test_every_row_has_a_plain_one(arch: int) -> None:
    for rows in tuning.load(arch)["tables"].values():
        for key, row in rows.items():
            assert tuning.is_plain(row) or tuning.is_plain(rows[f"{key}-kernel"])


@pytest.mark.usefixtures("untuned")
def test_the_kernels_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reports(requests: list[aot.Request]) -> list[list[aot.Report]]:
        return [
            [aot.Report(r.op, "k", r.arch, 128, 0, 0, 49152, 0, {"HGMMA": 24}, 0, False, 900, 8, 3, {})]
            for r in requests
        ]

    monkeypatch.setattr(aot, "reports", reports)
    assert cli.main(["kernels", "--op", "attention", "--gpu", "h100"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("sm_90, bfloat16; floors of H100 by datasheet ceilings\n")
    assert "attention, self 4096 x 10 heads" in table
    assert "24 HGMMA" in table
    by_library = [line for line in table.splitlines() if line == "    PyTorch's libraries, by kernels/tuned"]
    assert len(by_library) == 1  # the VAE's
    assert cli.main(["kernels", "--op", "attention", "--arch", "sm_80", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["arch"] == 80
    assert data["rows"][0]["floor_us"] == pytest.approx(108.7, abs=0.1)
    assert data["rows"][0]["kernels"][0]["registers"] == 128
    assert [row["library"] for row in data["rows"]] == [False] * 4 + [True]
    assert cli.main(["kernels", "--op", "conv"]) == 1
    assert "no operator is called conv; there are" in capsys.readouterr().err
    assert cli.main(["kernels", "--op", "attention", "--arch", "sm_12"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "latentrt: kernels cannot be compiled for sm_12; they can for sm_80, sm_86, sm_89, sm_90, sm_100, sm_120\n"
    )
