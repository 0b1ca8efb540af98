"""Hooks into ComfyUI. `attach` puts a cache on a MODEL; it and the calibrator are built on `listen`.

What hosts differ in has a file each: `recording` (what is done around blocks), `guests` (guiders of two models), `samplers` (what a
sampler does), `network_options` (what tells passes apart).
"""

from .cached_model import HostOptions, attach, book_of, free_memory
from .hooks import detach, listen
from .keys import KEY
from .starting import check_transformer, model_times, run_start

__all__ = ["KEY", "HostOptions", "attach", "book_of", "check_transformer", "detach", "free_memory", "listen", "model_times", "run_start"]
