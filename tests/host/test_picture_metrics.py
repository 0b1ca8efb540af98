"""PSNR and SSIM agree with numbers worked out by hand and with scikit-image."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_duca.nodes.pictures.metrics import psnr, ssim
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

DOCS = Path(__file__).resolve().parents[2] / "docs"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def photographs() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two crops of a shipped picture, one pixel apart."""
    pixels = np.asarray(Image.open(DOCS / "contact_sheet.png").convert("RGB")).astype(np.float32) / 255
    return torch.from_numpy(pixels[60:260, 20:400].copy()), torch.from_numpy(pixels[60:260, 21:401].copy())


PAIRS = {
    "noise": (noise(40, 33, 3), noise(40, 33, 3, seed=1)),
    "near": (noise(40, 33, 3), (noise(40, 33, 3) + 0.01 * noise(40, 33, 3, seed=1)).clamp(0, 1)),
    "dark": (0.01 * noise(20, 20, 3), 0.01 * noise(20, 20, 3, seed=1)),
    "one window": (noise(7, 7, 3), noise(7, 7, 3, seed=1)),
    "a row of windows": (noise(7, 30, 3), noise(7, 30, 3, seed=1)),
    "flat against noise": (torch.full((16, 16, 3), 0.5), noise(16, 16, 3)),
    "a real picture": photographs(),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS)
def test_scikit_image_says_the_same(one, other):
    a, b = one.double().numpy(), other.double().numpy()
    assert psnr(one, other) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-6)
    expected = structural_similarity(a, b, win_size=7, data_range=1, channel_axis=-1)
    assert ssim(one[None], other[None]) == pytest.approx(expected, abs=1e-6)
    assert expected < 0.9999, "pictures that are alike would prove little"


def test_psnr_by_hand():
    black = torch.zeros(2, 2, 1)
    assert psnr(black, black + 0.1) == pytest.approx(20)
    one_of_four = black.clone()
    one_of_four[0, 0] = 1
    assert psnr(black, one_of_four) == pytest.approx(10 * math.log10(4))
    assert psnr(torch.stack([black, black]), torch.stack([black, one_of_four])) == pytest.approx(10 * math.log10(8))
    assert psnr(black, black) == math.inf


def test_ssim_by_hand():
    """Flat pictures differ only in their means, and a pattern and its negative only in the sign of the covariance."""
    dark, light = torch.full((1, 9, 9, 3), 0.2), torch.full((1, 9, 9, 3), 0.6)
    assert ssim(dark, light) == pytest.approx((2 * 0.2 * 0.6 + 0.0001) / (0.2**2 + 0.6**2 + 0.0001))
    pattern = torch.tensor([0.0] * 24 + [0.5] + [1.0] * 24).reshape(1, 7, 7, 1)  # mean 1/2, sample variance 48/4/48 = 1/4
    assert ssim(pattern, 1 - pattern) == pytest.approx((-2 * 0.25 + 0.0009) / (2 * 0.25 + 0.0009))
    assert ssim(pattern, pattern) == pytest.approx(1, abs=1e-12)


def test_ssim_of_several_is_their_mean():
    ones, others = noise(3, 12, 10, 3), noise(3, 12, 10, 3, seed=1)
    apart = [ssim(ones[i : i + 1], others[i : i + 1]) for i in range(3)]
    assert len(set(apart)) == 3 and ssim(ones, others) == pytest.approx(sum(apart) / 3, abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [(6, 40), (40, 6)])
def test_pictures_below_a_window(height, width):
    with pytest.raises(ValueError, match=f"at least 7x7 pixels, not {width}x{height}"):
        ssim(noise(1, height, width, 3), noise(1, height, width, 3))
