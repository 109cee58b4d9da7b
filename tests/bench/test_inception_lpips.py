"""`bench/inception.py` and `lpips.py`: Inception for FID, AlexNet for LPIPS, with random weights here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from latentrt.bench.inception import Inception, InceptionFeatures, read_tensors
from latentrt.bench.lpips import Lpips
from latentrt.errors import BackendUnavailableError, RequestError
from safetensors.torch import save_file
from tolerances import FEATURES, LPIPS_RELATIVE
from torch import nn


@pytest.fixture(scope="module")
def inception() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


def test_inception_has_the_published_layers(inception: Inception) -> None:
    state = {k: v for k, v in inception.state_dict().items() if not k.endswith("num_batches_tracked")}
    # torchvision's inception_v3 has 23,834,568 parameters besides its auxiliary head, 2,049,000 of them in its fc.
    assert sum(p.numel() for p in inception.parameters()) == 23_834_568 - 2_049_000
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7dbl_4.conv.weight": (128, 128, 7, 1),
        "Mixed_6e.branch7x7_3.bn.running_var": (192,),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_inceptions_blocks_branch_as_published(inception: Inception) -> None:
    """The last block, written out: its halves see the same, and its pooling is the one that FID has."""
    block = inception.Mixed_7c
    x = torch.rand(1, 2048, 8, 8)
    with torch.no_grad():
        a = block.branch3x3_1(x)
        b = block.branch3x3dbl_2(block.branch3x3dbl_1(x))
        parts = [
            block.branch1x1(x),
            block.branch3x3_2a(a),
            block.branch3x3_2b(a),
            block.branch3x3dbl_3a(b),
            block.branch3x3dbl_3b(b),
            block.branch_pool(F.max_pool2d(x, 3, 1, 1)),
        ]
        assert torch.equal(block(x), torch.cat(parts, dim=1))
        sizes = []
        hooks = [
            inception.get_submodule(name).register_forward_hook(
                lambda m, i, out: sizes.append(tuple(out.shape[1:]))
            )
            for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7a")
        ]
        assert inception(torch.zeros(1, 3, 299, 299)).shape == (1, 2048)
    for hook in hooks:
        hook.remove()
    assert sizes == [
        (64, 147, 147),
        (192, 71, 71),
        (288, 35, 35),
        (768, 17, 17),
        (768, 17, 17),
        (1280, 8, 8),
    ]


def test_inception_reads_weights_and_sees_as_they_say(inception: Inception, tmp_path: Path) -> None:
    state = {k: v for k, v in inception.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048)}, tmp_path / "inception.pth")
    features = InceptionFeatures(tmp_path / "inception.pth")
    assert features.name == "Inception-v3 (inception.pth)"
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        wanted = inception(F.interpolate(x, (299, 299), mode="bilinear") / 127.5 - 1)
    assert features.features([picture, picture]) == pytest.approx(wanted.repeat(2, 1).numpy(), abs=FEATURES)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="is not Inception-v3 for FID: Conv2d_1a_3x3"):
        InceptionFeatures(tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match=r"is not AlexNet: features\.0\.weight is missing"):
        Lpips(tmp_path / "other.safetensors")
    torch.save(nn.Linear(1, 1), tmp_path / "code.pth")  # which could run code
    with pytest.raises(RequestError, match=r"code\.pth cannot be read as weights"):
        read_tensors(tmp_path / "code.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(RequestError, match="holds no state dict"):
        read_tensors(tmp_path / "list.pth")
    with pytest.raises(RequestError, match="is no file"):
        read_tensors(tmp_path / "none.pth")


def test_lpips_is_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics' own network, over the same weights of AlexNet's features."""
    import torchmetrics.functional.image.lpips as theirs

    torch.manual_seed(0)
    alexnet = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    )
    save_file({f"features.{k}": v for k, v in alexnet.state_dict().items()}, tmp_path / "alexnet.safetensors")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda name, pretrained: alexnet)
    network = theirs._LPIPS(net="alex", pnet_rand=True)
    lpips = Lpips(tmp_path / "alexnet.safetensors")
    a, b = torch.rand(2, 1, 3, 80, 72)
    with torch.no_grad():
        wanted = float(network(a, b, normalize=True))
    assert wanted > 1e-4
    assert lpips(a, b) == pytest.approx(wanted, rel=LPIPS_RELATIVE)
    assert lpips(a, a) == 0
    assert lpips(a, (a + 0.02 * b).clamp(0, 1)) < lpips(a, b)


def test_lpips_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image.lpips", None)
    with pytest.raises(
        BackendUnavailableError, match=r'torchmetrics is not installed, .* "latentrt\[bench\]"'
    ):
        Lpips(tmp_path / "alexnet.safetensors")
