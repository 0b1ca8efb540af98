"""Measures how close one picture is to another: PSNR and SSIM (Wang et al. 2004), in plain torch.

SSIM is computed as benchmarks usually do: with a uniform 7×7 window and sample covariances, as the mean over colours and over all windows
that lie within the picture. Both functions take colours in 0..1 and compute in float64, on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

WINDOW = 7
_SMALL_MEAN, _SMALL_VARIANCE = 0.01**2, 0.03**2  # keep dark and flat windows from a division by zero


def psnr(reference: torch.Tensor, picture: torch.Tensor) -> float:
    """Returns the PSNR of two tensors of one shape in dB, of all pixels together. It is infinite where they are equal."""
    error = (reference.double().cpu() - picture.double().cpu()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def ssim(reference: torch.Tensor, pictures: torch.Tensor) -> float:
    """Returns the mean SSIM of two batches (N, H, W, C) of pictures. It is at most 1, where they are equal.

    Raises:
        ValueError: Where a side is below the window.
    """
    height, width = reference.shape[1:3]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, not {width}x{height}")
    values = [_ssim_of_one(one, other) for one, other in zip(reference, pictures, strict=True)]  # one at a time, to save memory
    return sum(values) / len(values)


def _ssim_of_one(one: torch.Tensor, other: torch.Tensor) -> float:
    x, y = (picture.double().cpu().movedim(-1, 0) for picture in (one, other))
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = _windows(x), _windows(y)
    variances = unbiased * (_windows(x * x) - mean_x**2 + _windows(y * y) - mean_y**2)
    covariance = unbiased * (_windows(x * y) - mean_x * mean_y)
    likeness_of_means = (2 * mean_x * mean_y + _SMALL_MEAN) / (mean_x**2 + mean_y**2 + _SMALL_MEAN)
    likeness_of_patterns = (2 * covariance + _SMALL_VARIANCE) / (variances + _SMALL_VARIANCE)
    return (likeness_of_means * likeness_of_patterns).mean().item()


def _windows(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean of every window of (C, H, W). First down, then across is a third of the work."""
    return functional.avg_pool2d(functional.avg_pool2d(values, (WINDOW, 1), 1), (1, WINDOW), 1)
