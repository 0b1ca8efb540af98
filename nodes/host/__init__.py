"""Hooks into ComfyUI. `attach` puts a cache on a MODEL; it and the calibrator are built on `listen`.

Everything in which hosts differ has a file: `recording` (what they do around blocks), `guests` (guiders of two models), `samplers` (what a
sampler does to a latent), `network_options` (which options tell passes apart).
"""

from .cached_model import HostOptions, attach, book_of, free_memory
from .hooks import detach, listen
from .keys import KEY
from .starting import check_transformer, model_times, run_start

__all__ = ["KEY", "HostOptions", "attach", "book_of", "check_transformer", "detach", "free_memory", "listen", "model_times", "run_start"]
