"""Reads the base weights of a loaded model: the checkpoint's own, whatever LoRA is on them and however they are packed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...cache_core.calibration.fingerprint import VALUES

_COMPILED = "_orig_mod."  # torch.compile adds it to names, before or after a LoRA was put on


@dataclass(frozen=True, eq=False)
class BaseWeight:
    """A base weight.

    Args:
        module: The module that it belongs to.
        attribute: Its name there.
        tensor: The weight as it is kept: as loaded, or packed.
    """

    module: Any
    attribute: str
    tensor: Tensor

    @property
    def is_gguf(self) -> bool:
        """Whether it is a weight of ComfyUI-GGUF: often packed bytes, whose `shape` is that of the dense weight."""
        return hasattr(self.tensor, "tensor_shape") and hasattr(self.module, "get_weight")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is kept in, by which it was rounded. For packed integers, the dtype that they are unpacked to."""
        for tensor in (self._kept(), self.tensor):  # the dtype of a quantised weight is that of its computation
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float32

    def dense(self) -> Tensor:
        """Returns the weight as the layer uses it, unpacked and scaled, without LoRAs."""
        if not self.is_gguf:
            convert = getattr(self.module, f"convert_{self.attribute}", None)  # the host's, for scaled and quantised weights
            return self.tensor if convert is None else convert(self.tensor)
        packed: Any = self.tensor
        patches, packed.patches = getattr(packed, "patches", []), []  # LoRAs, which `get_weight` would add
        try:
            return self.module.get_weight(packed, torch.float32)
        finally:
            packed.patches = patches

    def _kept(self) -> Tensor:
        kept = self.tensor.detach()
        while hasattr(kept, "__tensor_flatten__"):  # a wrapper around other tensors has no memory of its own
            kept = getattr(kept, kept.__tensor_flatten__()[0][0])
        return kept.as_subclass(Tensor)

    def some_bytes(self) -> bytes:
        """Returns a few bytes from the middle of it, as they lie in memory."""
        flat = self._kept().reshape(-1)
        return flat[flat.numel() // 2 :][:16].view(torch.uint8).cpu().numpy().tobytes()


def base_weights(model: ModelPatcher) -> dict[str, BaseWeight]:
    """Returns all weights that count for a fingerprint, by the model's own names.

    The host must have ejected the model (`model.use_ejected()`).
    """
    # clones share their backups; an independent patcher of the same network has other ones, which are found while it is loaded
    patchers = [*(m.model for m in comfy.model_management.current_loaded_models if model.is_clone(m.model)), model]
    originals: dict[str, Tensor] = {}
    # a LoRA by hook is put on last, so what it replaced is the base weight only where no other LoRA replaced it before
    for table in (*(p.hook_backup for p in patchers), *(p.backup for p in patchers)):
        originals.update((key.replace(_COMPILED, ""), kept[0]) for key, kept in table.items())
    weights = {}
    for place, module in model.model.diffusion_model.named_modules(remove_duplicate=False):
        for attribute, current in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{place}.{attribute}".removeprefix(".").replace(_COMPILED, "")
            weight = BaseWeight(module, attribute, originals.get(f"diffusion_model.{name}", current))
            if (weight.is_gguf or weight.tensor.is_floating_point()) and math.prod(weight.tensor.shape) >= VALUES:
                weights[name] = weight
    return dict(sorted(weights.items()))
