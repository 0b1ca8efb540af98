"""Linear layers for tests of factors, and a reference of the factors' product."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def reference_product(weight, rank, method, in_magnitude, out_magnitude):
    """Returns A·B in float64, written from docs/method.md, section 3.2."""
    left, right = np.ones(weight.shape[0]), np.ones(weight.shape[1])
    if method != "svd":
        left, right = out_magnitude**0.5, in_magnitude**0.5
        left, right = np.maximum(left, left.max() / 1000), np.maximum(right, right.max() / 1000)
    u, s, vt = np.linalg.svd(np.diag(left) @ weight @ np.diag(right), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    return np.diag(1 / left) @ u @ np.diag(s) @ vt @ np.diag(1 / right)


class ClippedInput(nn.Linear):
    """Has scaled fp8 activations: inputs beyond 448 steps are clamped in place, the others are rounded to 3 binary digits."""

    def forward(self, x):
        x.clamp_(-4.48, 4.48)
        return super().forward((x / 0.01).to(torch.float8_e4m3fn).to(x.dtype) * 0.01)


def linear(kind=nn.Linear, inputs=40, outputs=24, bias=1.0):
    torch.manual_seed(5)
    module = kind(inputs, outputs)
    module.bias.data.mul_(bias)
    return module
