"""Calibrates a model by sampling with it: records runs, measures sensitivities and tries plans out."""

from .calibrate import Calibrator, Learned, Wishes
from .tape import Sample

__all__ = ["Calibrator", "Learned", "Sample", "Wishes"]
