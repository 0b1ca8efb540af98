"""Makes pictures, and reads what the comparing nodes write in tables and contact sheets."""

from __future__ import annotations

import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

HEAD = ["setting", "PSNR dB", "SSIM", "time", "compute"]


def noise(count: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def cells(table: str) -> list[list[str]]:
    """Returns the cells of a Markdown table by line, without its rule."""
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert head == HEAD and set("".join(rule)) == set("-:|")
    return rows


def distance(one: torch.Tensor, other: torch.Tensor) -> list[str]:
    """Returns PSNR and SSIM of two pictures by scikit-image, as the table has them."""
    a, b = one.double().numpy(), other.double().numpy()
    likeness = structural_similarity(a, b, win_size=7, data_range=1, channel_axis=-1)
    return [f"{peak_signal_noise_ratio(a, b, data_range=1):.1f}", f"{likeness:.3f}"]


def found(image: torch.Tensor, picture: torch.Tensor) -> bool:
    """Returns whether the picture is somewhere in the image, with each pixel the same in 8 bits."""
    wanted, sheet = ((one * 255).round().to(torch.uint8) for one in (picture, image[0]))
    height, width = wanted.shape[:2]
    starts = (sheet[: sheet.shape[0] - height + 1, : sheet.shape[1] - width + 1] == wanted[0, 0]).all(-1).nonzero().tolist()
    return any(torch.equal(sheet[top : top + height, left : left + width], wanted) for top, left in starts)


def enlarged(picture: torch.Tensor, factor: int) -> torch.Tensor:
    return picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
