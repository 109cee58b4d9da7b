"""The full-size script, on a small UNet: what it writes loads, and what it measures is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from helpers.published_configs import sdxl
from latentrt.bench import full_size
from safetensors.torch import load_file

SMALL = {
    **sdxl("base", "unet"),
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_written_checkpoint_loads_and_runs(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = full_size.write_unet(tmp_path, SMALL)
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    result = full_size.measure(folder, dtype, 64)
    assert result.parameters == sum(t.numel() for t in state.values())
    assert result.weight_bytes == result.parameters * dtype.itemsize
    assert result.finite
    assert 0.1 < result.output_std < 10


def test_the_peak_before_is_in_no_ratio(tmp_path: Path) -> None:
    """A peak that was higher than loading's, as of writing the weights, once made loading look free."""
    full_size.write_unet(tmp_path, SMALL)
    code = """
    import sys, torch
    from pathlib import Path
    from latentrt.bench.full_size import measure

    before = torch.ones(1 << 27)  # 512 MB
    del before
    result = measure(Path(sys.argv[1]), torch.float32, 64)
    print(result.load_ratio, result.forward_ratio)
    """
    command = [sys.executable, "-c", dedent(code), str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    load, forward = map(float, told.split())
    assert load > 0.9
    assert forward > 0.9


def test_main_keeps_a_named_folder_and_writes_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "unet", tmp_path / "results" / "full.json"
    full_size.write_unet(folder, SMALL)
    full_size.main(["--folder", str(folder), "--size", "64", "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    result = report["result"]
    assert report["command"].startswith(f"python -m latentrt.bench.full_size --folder {folder} --size 64")
    assert f"{result['parameters'] / 1e6:,.2f} M parameters in bfloat16" in printed
    assert "writing" not in printed
    assert (folder / "model_index.json").is_file()


def test_a_size_that_is_no_multiple_of_8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        full_size.main(["--size", "500"])
    assert "--size 500: it must be a multiple of 8" in capsys.readouterr().err
