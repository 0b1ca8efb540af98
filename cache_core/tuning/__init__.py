"""Runs a model again and again to find out what serves it best: records it, measures it, tries plans out."""

from .calibrate import Calibrator, Learned, Wishes
from .tape import Sample

__all__ = ["Calibrator", "Learned", "Sample", "Wishes"]
