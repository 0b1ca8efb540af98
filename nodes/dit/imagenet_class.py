"""Node ImageNet Class: what a class-conditional DiT has instead of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .model import CLASS_LABEL, NO_CLASS

_NONE = 1000  # ImageNet's classes are 0 to 999
_SHOWN = (
    (207, "golden retriever"), (360, "otter"), (387, "red panda"), (974, "geyser"),
    (88, "macaw"), (979, "valley"), (417, "balloon"), (279, "Arctic fox"),
)  # fmt: skip


class ImageNetClass(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shown = ", ".join(f"{number} {name}" for number, name in _SHOWN)
        return io.Schema(
            node_id="DuCaImageNetClass",
            display_name="ImageNet Class",
            category="model_patches/duca",
            description="The class that a class-conditional DiT is to draw, and the null class to move away from.",
            inputs=[
                io.Int.Input(
                    "class_number",
                    default=_SHOWN[0][0],
                    min=0,
                    max=_NONE,
                    tooltip=f"One of ImageNet's classes, 0 to 999; {_NONE} is no class at all. For example: {shown}.",
                )
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The class, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="The null class, for the sampler. At cfg 1 it is not used."),
            ],
        )

    @classmethod
    def execute(cls, class_number: int) -> io.NodeOutput:
        if not 0 <= class_number <= _NONE:  # by link, where nobody has checked
            raise ValueError(f"class_number is {class_number}, but ImageNet's classes are 0 to 999, and {_NONE} is none")
        return io.NodeOutput(class_conditioning(class_number), class_conditioning(NO_CLASS))


def class_conditioning(label: int) -> list[list[Any]]:
    """Host conditioning of a class. There is no text in it: nodes that work on text fail with it, and do not quietly draw another class."""
    return [[None, {CLASS_LABEL: torch.tensor([label])}]]
