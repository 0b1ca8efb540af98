"""Lets ComfyUI import torchvision where its compiled operators do not fit the torch build (CPU-only torch).

Python imports this module when a process starts, and only host processes have it on their path. Where torchvision's library loads,
it changes nothing.
"""

import importlib.abc
import importlib.util
import sys

_KEPT: list = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define_missing_operators()
        return None


def _define_missing_operators():
    import torch

    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return
    from pathlib import Path

    for library in Path(package.submodule_search_locations[0]).glob("_C*.*"):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            continue
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(fragment)  # the definitions last as long as this object


sys.meta_path.insert(0, _BeforeTorchvision())
