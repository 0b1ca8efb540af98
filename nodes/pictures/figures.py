"""Turns a Matplotlib figure into an image of the host."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def image_of(figure: Figure) -> torch.Tensor:
    """Draws the figure and returns it as an image (1, H, W, 3) in 0..1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype("float32") / 255
    return torch.from_numpy(pixels.copy())[None]
